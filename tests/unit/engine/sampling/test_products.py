"""Products in fewer bits: about what float32 says, and of each row what it would be alone."""

from typing import Any

import pytest
import torch

from tensafe_nb.engine.sampling import products
from tests.close import assert_close

WAYS = {name: getattr(products, f"in_{name}") for name in ("float32", "bfloat16", "int8")}


@pytest.fixture(params=list(WAYS))
def way(request: pytest.FixtureRequest) -> Any:
    """Each way that this machine has: whichever is not there is never used."""
    way = WAYS[request.param]
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


def test_a_row_in_int8_comes_with_more_than_eight_bits() -> None:
    x, weight, _ = rows_and_weight()
    weight = (weight * 127 / weight.abs().amax(1, keepdim=True)).round()  # int8 itself: nothing is lost of it
    x[:, 0] = 50.0
    found, expected = products.in_int8(weight, None)(x), x @ weight.T
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_what_comes_of_a_row_is_the_same_bit_for_bit_among_any_others() -> None:
    x, weight, bias = rows_and_weight(40)
    x[7] *= 1e4
    a, b = weight[:3] / 9, bias.view(-1, 1).expand(-1, 3) / 9
    for way in WAYS.values():
        if way is products.in_float32 or not products.works(way, 0.5):
            continue
        product = products.beside(way(weight, bias), a, b)
        whole = product(x)
        for some in (x[:1], x[:2], x[:5], x[:33]):
            assert torch.equal(product(some), whole[: len(some)])


def test_an_adapter_beside_a_weight_is_added_to_it(way: Any) -> None:
    x, weight, bias = rows_and_weight()
    a, b = weight[:2], bias.view(-1, 1).expand(-1, 2)
    bare, adapted = way(weight, bias), products.beside(way(weight, bias), a, b)
    for some in (x[:1], x):
        assert_close(adapted(some) - bare(some), (some @ a.T @ b.T).numpy(), 1e-4)


def test_a_prompts_many_rows_are_multiplied_piece_by_piece(way: Any) -> None:
    x, weight, bias = rows_and_weight(2 * products.MOST_ROWS + 3)
    product = way(weight, bias)
    assert_close(product(x), torch.cat([product(part) for part in x.split(50)]).numpy(), 1e-5)
