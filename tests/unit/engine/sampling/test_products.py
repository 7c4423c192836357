"""What is compiled for a token, and what torch has for it: about what float32 says, each row as if it were alone."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tensafe_nb.engine.sampling import llama, native, products
from tests.close import assert_close

WAYS = {name: getattr(products, f"in_{name}") for name in ("float32", "bfloat16", "int8")}
COMPILES = native.library() is not None


@pytest.fixture(scope="module")
def for_avx2() -> Iterator[Any]:
    """The same page of C for a processor without AVX-512."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        yield native._compiled.__wrapped__()


@pytest.fixture(params=["as it is", "for AVX2", "by torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is compiled here, what would be on AVX2, and nothing."""
    if request.param != "by torch" and not COMPILES:
        pytest.skip("no C compiler, or no processor with AVX2")
    if request.param == "for AVX2":
        compiled = request.getfixturevalue("for_avx2")
        monkeypatch.setattr(native, "library", lambda: compiled)
    elif request.param == "by torch":
        monkeypatch.setattr(native, "library", lambda: None)
    return native.library()


@pytest.fixture(params=list(WAYS))
def way(request: pytest.FixtureRequest, library: Any) -> Any:
    """Each way that this machine has: whichever is not there is never used."""
    way = WAYS[request.param]
    return way if products.works.__wrapped__(way, 0.5) else products.in_float32


def rows_and_weight(rows: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 96, generator=generator) for n in (rows, 32))
    return x, weight, torch.randn(32, generator=generator)


def test_a_product_is_about_that_of_float32_whatever_stands_out_in_a_row(way: Any) -> None:
    x, weight, bias = rows_and_weight()
    x[0, 5], x[1] = 300.0, 0.0  # as activations do; and a row of nothing
    found, expected = way(weight, bias)(x), x @ weight.T + bias
    off = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert off.max() < (1e-5 if way is products.in_float32 else 0.02)


def test_a_row_in_int8_comes_with_more_than_eight_bits(library: Any) -> None:
    x, weight, _ = rows_and_weight()
    weight = (weight * 127 / weight.abs().amax(1, keepdim=True)).round()  # int8 itself: nothing is lost of it
    x[:, 0] = 50.0
    found, expected = products.in_int8(weight, None)(x), x @ weight.T
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_what_comes_of_a_row_is_the_same_bit_for_bit_among_any_others(way: Any, library: Any) -> None:
    x, weight, bias = rows_and_weight(40)
    x[7] *= 1e4
    a, b = weight[:3] / 9, bias[:17, None].expand(-1, 3) / 9
    if way is products.in_float32 and library is None:
        return
    product = products.beside(way(weight, bias), [(3, a, b)], len(weight))
    whole = product(x)
    for some in (x[:1], x[:2], x[:5], x[:33]):
        assert torch.equal(product(some), whole[: len(some)])


def test_adapters_beside_a_weight_are_added_to_their_own_outputs(way: Any) -> None:
    x, weight, bias = rows_and_weight()
    one, other = (weight[:2], bias[:5, None].expand(-1, 2)), (weight[2:9], bias[:21, None].expand(-1, 7))
    product = way(weight, bias)
    adapted = products.beside(product, [(0, *one), (9, *other)], len(weight))
    for some in (x[:1], x):
        expected = torch.zeros(len(some), len(weight))
        for first, (a, b) in ((0, one), (9, other)):
            expected[:, first : first + len(b)] += some @ a.T @ b.T
        assert_close(adapted(some) - product(some), expected.numpy(), 1e-4)


def test_a_prompts_many_rows_are_multiplied_piece_by_piece(way: Any) -> None:
    x, weight, bias = rows_and_weight(2 * products.MOST_ROWS + 3)
    product = way(weight, bias)
    assert_close(product(x), torch.cat([product(part) for part in x.split(50)]).numpy(), 1e-5)


@pytest.mark.parametrize(("rows", "d_in", "d_out"), [(1, 3, 1), (2, 5, 63), (3, 64, 65), (7, 130, 200)])
def test_any_shape_is_multiplied(way: Any, rows: int, d_in: int, d_out: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, d_in, generator=generator) for n in (rows, d_out))
    bias, product = torch.randn(d_out, generator=generator), None
    if way is products.in_int8:  # what is int8 itself
        scales = weight.abs().amax(1) / 127
        weight = (weight / scales[:, None]).round() * scales[:, None]
    if way is products.in_bfloat16:
        x, weight = x.bfloat16().float(), weight.bfloat16().float()
    product, expected = way(weight, bias), x @ weight.T + bias
    assert_close(product(x.unsqueeze(1)).squeeze(1), expected.numpy(), 1e-2, at_least=1)
    assert torch.equal(product(x.T.contiguous().T), product(x)), "rows that do not lie one after the other"


def test_what_is_no_number_stays_none_in_its_row_alone(way: Any, library: Any) -> None:
    if library is None and way is not products.in_float32:
        return
    x, weight, _ = rows_and_weight()
    x[2, 3], x[4, 7] = float("nan"), float("inf")
    found = way(weight, None)(x)
    assert found.isfinite().all(1).tolist() == [n not in (2, 4) for n in range(len(x))]


def test_a_compiled_norm_is_that_of_torch(library: Any) -> None:
    if library is None:
        return
    x, weight = torch.randn(5, 3, 100), torch.randn(100)
    assert_close(native.Norm(weight, 1e-5)(x), F.rms_norm(x, (100,), weight, 1e-5).numpy(), 1e-6)


@pytest.mark.parametrize(
    ("rows", "new", "heads", "groups", "width", "here"),
    [
        (3, 1, 9, 3, 64, 10),
        (2, 4, 4, 2, 32, 3),
        (1, 8, 4, 4, 16, 7),
        (2, 1, 6, 2, 96, 33),
        (2, 2, 2, 1, 128, 20),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_compiled_attention_finds_what_torchs_finds_and_of_a_row_what_it_finds_alone(
    library: Any, rows: int, new: int, heads: int, groups: int, width: int, here: int, padded: bool
) -> None:
    if library is None:
        return
    generator = torch.Generator().manual_seed(here)
    angles = torch.randn(rows, new, width // 2, generator=generator)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    mask = torch.ones(rows, here + new, dtype=torch.long)
    mask[0, :3] = 0  # an empty place, which sees itself
    projected = torch.randn(rows * new, (heads + 2 * groups) * width, generator=generator)
    before = [torch.randn(rows, groups, here + new + 2, width, generator=generator) for _ in range(2)]
    found = []
    for kind in (llama.Attention, native.Attention):
        kept = [tensor.clone() for tensor in before]
        attend = kind(cos, sin, mask if padded else None, here, width**-0.5)
        found.append([attend(projected, *kept), *kept])
    for expected, ours in zip(*found, strict=True):
        assert_close(ours, expected.numpy(), 1e-5)
    last = [tensor[-1:].clone() for tensor in before]
    alone = native.Attention(cos[-1:], sin[-1:], None, here, width**-0.5)(projected[-new:], *last)
    if rows > 1:
        assert torch.equal(alone, found[1][0][-new:])


def test_attention_to_what_is_no_number_finds_none(library: Any) -> None:
    if library is None:
        return
    cos, kept = torch.ones(1, 1, 16), [torch.zeros(1, 1, 5, 16) for _ in range(2)]
    projected = torch.zeros(1, 48)
    kept[0][0, 0, 1, 2] = math.nan
    assert native.Attention(cos, cos, None, 3, 1.0)(projected, *kept).isnan().all()


@pytest.mark.parametrize("compiler", [None, "false", "there-is-no-such-compiler"])
def test_without_a_compiler_products_are_torchs(
    compiler: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = rows_and_weight()
    monkeypatch.setattr(native.shutil, "which", lambda name: compiler)
    monkeypatch.setattr(native, "_compiled", native._compiled.__wrapped__)
    assert native.library() is None
    assert native.Product.of(weight, bias) is None
    for way, off in ((products.in_int8, 0.05), (products.in_float32, 1e-5)):
        assert_close(way(weight, bias)(x), (x @ weight.T + bias).numpy(), off, at_least=1)


def test_what_is_compiled_is_compiled_once_and_while_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from threading import Event

    begun, made = Event(), []

    def compile_() -> str:
        begun.set()
        made.append("compiled")
        return "library"

    from functools import cache

    monkeypatch.setattr(native, "_compiled", cache(compile_))
    native.begin()
    begun.wait()
    assert native.library() == native.library() == "library"
    assert made == ["compiled"]
