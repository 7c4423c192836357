"""The fused LoRA layer beside PEFT's own: the same numbers, and PEFT's own wherever the case is not the plain one."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners import lora
from torch import Tensor, nn

import tensafe_nb as tn
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.models import load as models
from tensafe_nb.engine.models.fused_lora import FrozenLinear, FusedLinear
from tensafe_nb.engine.sampling import copies, native
from tensafe_nb.losses import resolve_loss
from tensafe_nb.privacy.per_example import way_for
from tests.close import assert_close


def adapted(*, fused: bool, dropout: float = 0.0, bias: str = "none", **layer: object) -> nn.Module:
    """Return one adapted layer, 12 → 7, with an adapter that does something."""
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=3, lora_alpha=5, lora_dropout=dropout, bias=bias, target_modules=["0"])
    if fused:
        settings._register_custom_module({nn.Linear: FusedLinear})
    model = peft.get_peft_model(nn.Sequential(nn.Linear(12, 7, **layer)), settings)
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    assert isinstance(model.base_model.model[0], FusedLinear) is fused
    return model.double()


def through(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return what comes out, and the gradients of x and of everything trained."""
    x = x.clone().requires_grad_()
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    slopes = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y, *torch.autograd.grad(y, [x, *trained], slopes)]


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("shape", [(4,), (2, 5), (2, 1, 3)])
def test_outputs_and_all_gradients_equal_pefts(shape: tuple[int, ...], bias: str) -> None:
    found, expected = (through(adapted(fused=fused, bias=bias), inputs(*shape)) for fused in (True, False))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


needs_compiler = pytest.mark.skipif(
    native.library() is None, reason="no C compiler, or no processor with AVX2: the products are torch's"
)


@needs_compiler
@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_by_compiled_products_outputs_and_gradients_are_the_same(
    bias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_is_quicker_than_mkl", lambda: True)
    found = []
    for compiled in (False, True):
        model = adapted(fused=True, bias=bias).float()
        model.base_model.model[0].compiled = compiled
        found.append(through(model, inputs(5, native.MANY_ROWS).float()))
    for theirs, ours in zip(*found, strict=True):
        assert_close(ours.detach(), theirs.detach().numpy(), 1e-5)


@needs_compiler
def test_a_frozen_layer_by_compiled_products_is_the_same() -> None:
    x, slopes = torch.randn(3, 40, 12), torch.randn(3, 40, 7)
    layer = nn.Linear(12, 7).requires_grad_(False)
    found = []
    for of in (layer, lambda h: FrozenLinear.apply(h, layer.weight, layer.bias)):
        h = x.clone().requires_grad_()
        y = of(h)
        found.append((y.detach(), *torch.autograd.grad(y, h, slopes)))
    for theirs, ours in zip(*found, strict=True):
        assert_close(ours, theirs.numpy(), 1e-5)


@needs_compiler
def test_a_large_model_trains_by_them_and_a_small_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(least: int) -> tuple[Engine, float, float]:
        monkeypatch.setattr(copies, "PAYS_FROM_NUMBERS", least)
        engine = Engine(tn.TrainingConfig(lora_config=tn.LoRAConfig(rank=4), dtype="float32", device="cpu"))
        result = engine.forward_backward(tn.BatchData([range(3, 60)]), resolve_loss("token_ce"))
        return engine, result.loss, result.grad_norm

    monkeypatch.setattr(native, "_is_quicker_than_mkl", lambda: True)
    made: list[int] = []
    product = native.product
    monkeypatch.setattr(native, "product", lambda *of, **how: made.append(1) or product(*of, **how))
    small, *expected = trained(10**12)
    assert not made and not any(layer.compiled for layer in fused(small))
    large, *found = trained(1)
    assert made and all(layer.compiled for layer in fused(large))
    assert found == pytest.approx(expected, rel=1e-5)


def fused(engine: Engine) -> list[FusedLinear]:
    return [layer for layer in engine.model.causal.modules() if isinstance(layer, FusedLinear)]


def test_gradients_are_those_of_the_formula() -> None:
    model = adapted(fused=True)
    layer = model.base_model.model[0]
    a, b = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
    x = inputs(3).requires_grad_()
    found = torch.autograd.grad(model(x).square().sum(), [x, a, b])
    with torch.no_grad():
        base, s = layer.base_layer, layer.scaling["default"]
    y = x @ base.weight.T + base.bias + s * (x @ a.T) @ b.T
    for ours, theirs in zip(found, torch.autograd.grad(y.square().sum(), [x, a, b]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_layer_whose_input_needs_no_gradient_still_trains_its_adapter() -> None:
    y = adapted(fused=True)(inputs(2))
    assert y.requires_grad


def test_dropout_disabled_adapters_and_merged_weights_are_pefts_own() -> None:
    x = inputs(4)
    ours, theirs = (adapted(fused=fused, dropout=0.5).train() for fused in (True, False))
    torch.manual_seed(3)
    dropped = ours(x)
    torch.manual_seed(3)
    assert torch.equal(dropped, theirs(x))
    assert not torch.equal(dropped, ours.eval()(x))
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(ours(x), theirs(x))
    before = ours(x)
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), before)


def test_bfloat16_weights_under_autocast_give_what_peft_gives_to_rounding() -> None:
    found = []
    for fused in (True, False):
        model = adapted(fused=fused).float()
        model.base_model.model[0].base_layer.bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            found.append(through(model, inputs(6).bfloat16()))
    assert found[0][0].dtype is torch.bfloat16
    assert [t.dtype for t in found[0]] == [t.dtype for t in found[1]]
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() <= 0.02 * theirs.abs().max()


def test_a_copy_computes_with_its_own_adapter() -> None:
    model = adapted(fused=True)
    other = copy.deepcopy(model)
    nn.init.zeros_(other.base_model.model[0].lora_B["default"].weight)
    assert not torch.equal(model(inputs(2)), other(inputs(2)))


def test_the_engine_fuses_its_adapters() -> None:
    loaded = models.load(tn.TrainingConfig(lora_config=tn.LoRAConfig(rank=2), device="cpu"))
    assert {type(m) for m in loaded.causal.modules() if isinstance(m, lora.LoraLayer)} == {FusedLinear}


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_a_record_gets_each_rows_gradient_in_place_of_their_sum(bias: str) -> None:
    model, x = adapted(fused=True, bias=bias).float(), inputs(4, 5).float()
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = [torch.autograd.grad(model(x[i : i + 1]).square().sum(), trained) for i in range(4)]
    way = way_for(model, trained)
    assert way is not None
    with way.recording([1] * 4):
        model(x).square().sum().backward()
    assert all(p.grad is None for p in trained)
    for number, found in enumerate(way.collect()):
        assert_close(found.written_out(), torch.stack([gradients[number] for gradients in expected]))


def test_an_exported_adapter_says_nothing_of_it(tmp_path: Path) -> None:
    loaded = models.load(tn.TrainingConfig(lora_config=tn.LoRAConfig(rank=2), device="cpu"))
    loaded.peft.save_pretrained(tmp_path)
    assert "Fused" not in (tmp_path / "adapter_config.json").read_text()
