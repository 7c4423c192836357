"""Products in fewer bits: about what float32 says, and of each row what it would be alone."""

from typing import Any

import pytest
import torch

from tensafe_nb.engine.sampling import native, products
from tests.close import assert_close

WAYS = {name: getattr(products, f"in_{name}") for name in ("float32", "bfloat16", "int8")}
COMPILED = products.sums_int8() and native.library() is not None


@pytest.fixture(params=[*WAYS, "int8 by torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each way that this machine has: whichever is not there is never used."""
    kind = request.param.split()[0]
    if kind != request.param:
        monkeypatch.setattr(native, "library", lambda: None)
    way = WAYS[kind]
    return way if products.works(way, 0.5) else products.in_float32


def rows_and_weight(rows: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 96, generator=generator) for n in (rows, 32))
    return x, weight, torch.randn(32, generator=generator)


def test_a_product_is_about_that_of_float32_whatever_stands_out_in_a_row(way: Any) -> None:
    x, weight, bias = rows_and_weight()
    x[0, 5], x[1] = 300.0, 0.0  # as activations do; and a row of nothing
    found, expected = way(weight, bias)(x), x @ weight.T + bias
    off = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert off.max() < 0.02


@pytest.mark.parametrize("compiled", [True, False])
def test_a_row_in_int8_comes_with_more_than_eight_bits(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    x, weight, _ = rows_and_weight()
    weight = (weight * 127 / weight.abs().amax(1, keepdim=True)).round()  # int8 itself: nothing is lost of it
    x[:, 0] = 50.0
    found, expected = products.in_int8(weight, None)(x), x @ weight.T
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_what_comes_of_a_row_is_the_same_bit_for_bit_among_any_others(way: Any) -> None:
    x, weight, bias = rows_and_weight(40)
    x[7] *= 1e4
    a, b = weight[:3] / 9, bias[:17, None].expand(-1, 3) / 9
    if way is products.in_float32:
        return
    for few_rows in (True, False):
        product = products.beside(way(weight, bias), [(3, a, b)], len(weight), few_rows=few_rows)
        whole = product(x)
        for some in (x[:1], x[:2], x[:5], x[:33]):
            assert torch.equal(product(some), whole[: len(some)])


@pytest.mark.parametrize("few_rows", [True, False])
def test_adapters_beside_a_weight_are_added_to_their_own_outputs(way: Any, few_rows: bool) -> None:
    x, weight, bias = rows_and_weight()
    one, other = (weight[:2], bias[:5, None].expand(-1, 2)), (weight[2:9], bias[:21, None].expand(-1, 7))
    product = way(weight, bias)
    adapted = products.beside(product, [(0, *one), (9, *other)], len(weight), few_rows=few_rows)
    for some in (x[:1], x):
        expected = torch.zeros(len(some), len(weight))
        for first, (a, b) in ((0, one), (9, other)):
            expected[:, first : first + len(b)] += some @ a.T @ b.T
        assert_close(adapted(some) - product(some), expected.numpy(), 1e-4)


def test_a_prompts_many_rows_are_multiplied_piece_by_piece(way: Any) -> None:
    x, weight, bias = rows_and_weight(2 * products.MOST_ROWS + 3)
    product = way(weight, bias)
    assert_close(product(x), torch.cat([product(part) for part in x.split(50)]).numpy(), 1e-5)


@pytest.mark.parametrize(("rows", "d_in", "d_out"), [(1, 1, 1), (2, 5, 63), (3, 64, 65), (7, 130, 200)])
def test_any_shape_is_multiplied_in_int8(rows: int, d_in: int, d_out: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, d_in, generator=generator) for n in (rows, d_out))
    bias = torch.randn(d_out, generator=generator)
    scales = weight.abs().amax(1) / 127
    whole = (weight / scales[:, None]).round()
    expected = x @ (whole * scales[:, None]).T + bias
    product = products.in_int8(weight, bias)
    assert_close(product(x.unsqueeze(1)).squeeze(1), expected.numpy(), 1e-3, at_least=1)
    assert torch.equal(product(x.T.contiguous().T), product(x)), "rows that do not lie one after the other"


@pytest.mark.parametrize("name", ["in_float32", *(["in_int8"] if COMPILED else [])])
def test_what_is_no_number_stays_none_in_its_row_alone(name: str) -> None:
    x, weight, _ = rows_and_weight()
    x[2, 3], x[4, 7] = float("nan"), float("inf")
    found = getattr(products, name)(weight, None)(x)
    assert found.isfinite().all(1).tolist() == [n not in (2, 4) for n in range(len(x))]


@pytest.mark.parametrize("compiler", [None, "false", "there-is-no-such-compiler"])
def test_without_a_compiler_products_in_int8_are_torchs(
    compiler: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = rows_and_weight()
    monkeypatch.setattr(native.shutil, "which", lambda name: compiler)
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    assert native.library() is None
    assert native.packed(weight.to(torch.int8), bias, None) is None
    assert_close(products.in_int8(weight, bias)(x), (x @ weight.T + bias).numpy(), 0.05, at_least=1)
