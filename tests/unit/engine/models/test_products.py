"""Products with frozen matrices are the same, whichever library multiplies."""

import pytest
import torch
import torch.nn.functional as F

from tensafe_nb.engine.models import products
from tests.close import assert_close


@pytest.mark.parametrize("onednn", [False, True])
def test_either_library_multiplies_to_the_same_product_and_gradient(
    onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        onednn = False
    monkeypatch.setattr(products, "onednn_is_quicker", lambda: onednn)
    torch.manual_seed(0)
    weight, bias = torch.randn(300, 256), torch.randn(300)
    x = torch.randn(2, 5, 256, requires_grad=True)
    assert products.by_onednn(x.flatten(0, 1), weight) == onednn
    found, expected = products.FrozenLinear.apply(x, weight, bias), F.linear(x, weight, bias)
    slopes = torch.randn(2, 5, 300)
    assert_close(found, expected)
    assert_close(torch.autograd.grad(found, x, slopes)[0], torch.autograd.grad(expected, x, slopes)[0])


def test_small_matrices_and_other_types_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_is_quicker", lambda: True)
    assert not products.by_onednn(torch.ones(4, 8), torch.ones(8, 8))
    half = torch.bfloat16
    assert not products.by_onednn(torch.ones(4, 256, dtype=half), torch.ones(256, 256, dtype=half))
