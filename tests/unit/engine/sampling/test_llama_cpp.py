"""Sampling by llama.cpp without llama.cpp: what is refused and why, and the files that would be handed over.

What llama.cpp makes of them is tested with it: `make llama-cpp-parity`.
"""

import contextlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import tensafe_nb as tn
from tensafe_nb import rlvr
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.models import export
from tensafe_nb.engine.sampling import llama_cpp, sampler
from tensafe_nb.engine.sampling.decoding import Decoder, Rows

ASKED = tn.SamplingConfig(engine="llama.cpp")
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return engine_of(rank_pattern={"q_proj": 2}, use_rslora=True)


def engine_of(model_ref: str = "builtin:tiny", **lora: Any) -> Engine:
    settings = {"rank": 4, "alpha": 6, **lora}
    engine = Engine(
        tn.TrainingConfig(
            model_ref=model_ref, device="cpu", dtype="float32", lora_config=tn.LoRAConfig(**settings)
        )
    )
    for name, weight in engine.model.trainable:
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return engine


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "check_installed", lambda: None)


def test_where_it_is_not_installed_the_call_says_the_line_that_installs_it_and_nothing_is_queued(
    tc: tn.TrainingClient, service: tn.ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(llama_cpp, "version", version)
    for ask in (tc.sample, tc.stream, lambda *a, **k: service.sample(*a, model_ref="builtin:tiny", **k)):
        with pytest.raises(
            tn.ValidationError, match=r"not installed.*pip install \"tensafe_nb\[llama-cpp\]\""
        ):
            ask("def", engine="llama.cpp")
    assert tc.sample("def", max_new_tokens=2).result().sequences


def test_another_version_of_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "version", lambda _: "0.2.1")
    with pytest.raises(tn.ValidationError, match=f"in version 0.2.1.*for {llama_cpp.VERSION}"):
        llama_cpp.check_installed()


def test_the_version_is_the_one_that_the_extra_installs() -> None:
    pins = (Path(__file__).parents[4] / "pyproject.toml").read_text()
    assert f'llama-cpp = ["{llama_cpp.PACKAGE}=={llama_cpp.VERSION}"]' in pins


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"lora_config": None}, "trains all weights"),
        ({"lora_config": tn.LoRAConfig(bias="all")}, "LoRAConfig.bias"),
        ({"lora_config": tn.LoRAConfig(modules_to_save=("lm_head",))}, "modules_to_save"),
        ({"lora_config": tn.LoRAConfig(target_modules=["q_proj", "embed_tokens"])}, "model.embed_tokens"),
        ({"lora_config": tn.LoRAConfig(target_modules=".*(lm_head|q_proj)")}, "lm_head"),
        ({"lora_config": tn.LoRAConfig(), "device": "cuda"}, "on the processor"),
    ],
)
def test_what_it_cannot_sample_is_refused_at_the_call(
    installed: None, fields: dict[str, Any], reason: str
) -> None:
    config = tn.TrainingConfig(**fields)
    llama_cpp.check(tn.SamplingConfig(), config)
    with pytest.raises(tn.ValidationError, match=f"{reason}.*engine='torch'"):
        llama_cpp.check(ASKED, config)


@pytest.mark.parametrize(
    "lora",
    [
        None,
        tn.LoRAConfig(rank=2, modules_to_save=["lm_head"]),
        tn.LoRAConfig(rank=2, target_modules=["embed_tokens"]),
    ],
)
def test_what_draws_rollouts_is_refused_when_it_is_made(
    lora: tn.LoRAConfig | None, service: tn.ServiceClient
) -> None:
    tc = service.create_training_client(lora_config=lora)
    for make in (
        lambda **engine: rlvr.RLVRTrainer(
            tc, ["a"], lambda prompt, response: 1.0, prompts_per_step=1, **engine
        ),
        lambda **engine: rlvr.PolicySampler(tc, **engine),
        lambda **engine: rlvr.EnvironmentSampler(tc, plays_nothing, **engine),
    ):
        make(engine="torch")
        with pytest.raises(tn.ValidationError, match=r"engine='llama\.cpp'.*Sample with engine='torch'"):
            make(engine="llama.cpp")


@rlvr.environment
def plays_nothing(row: dict[str, Any]) -> Any:
    yield "?"
    return 0.0


def test_an_adapter_that_has_no_place_is_refused_before_the_first_step_too(
    random_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "library", lambda: None)
    lora = tn.LoRAConfig(rank=2, target_modules=["embed_tokens", "q_proj"])
    fresh = Engine(tn.TrainingConfig(model_ref=random_model("llama"), device="cpu", lora_config=lora))
    assert export.adds_nothing(fresh.model)
    with pytest.raises(tn.ValidationError, match=r"the adapter of 'model\.embed_tokens'"):
        llama_cpp.Policy(fresh.model)


def test_there_are_two_engines() -> None:
    with pytest.raises(tn.ValidationError, match=r"engine: .*'torch' or 'llama\.cpp'"):
        tn.SamplingConfig(engine="vllm")


@pytest.mark.parametrize(
    ("architecture", "lora", "reason"),
    [
        ("gpt2", {}, "the architecture 'gpt2'"),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, "the adapter of 'model.embed_tokens'"),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, "trained beside the adapter"),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_named(
    random_model: Any, tmp_path: Path, architecture: str, lora: dict[str, Any], reason: str
) -> None:
    engine = engine_of(random_model(architecture), **lora)
    with pytest.raises(tn.ValidationError, match=f"{reason}.*engine='torch'"):
        export.write_gguf_adapter(engine.model, tmp_path / "adapter.gguf")


def test_an_adapter_as_it_began_adds_nothing(engine: Engine) -> None:
    assert not export.adds_nothing(engine.model)
    assert export.adds_nothing(Engine(tn.TrainingConfig(lora_config=tn.LoRAConfig(rank=2))).model)


def tensors_in(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from gguf import GGUFReader

    file = GGUFReader(path)
    return {f.name: f.contents() for f in file.fields.values()}, {t.name: t.data for t in file.tensors}


def test_an_adapters_file_holds_its_factors_by_llama_cpps_names(engine: Engine, tmp_path: Path) -> None:
    export.write_gguf_adapter(engine.model, tmp_path / "adapter.gguf")
    facts, tensors = tensors_in(tmp_path / "adapter.gguf")
    assert facts["general.architecture"] == "llama" and facts["general.type"] == "adapter"
    assert facts["adapter.type"] == "lora" and facts["adapter.lora.alpha"] == 0  # B brings the scales
    config = engine.model.causal.config
    assert len(tensors) == 2 * len(LAYERS) * config.num_hidden_layers
    for theirs, ours in [
        ("attn_q", "self_attn.q_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("ffn_down", "mlp.down_proj"),
    ]:
        layer = engine.model.causal.get_submodule(f"model.layers.1.{ours}")
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        found = tensors[f"blk.1.{theirs}.weight.lora_b"] @ tensors[f"blk.1.{theirs}.weight.lora_a"]
        expected = (layer.scaling["default"] * b @ a).numpy()
        if theirs == "attn_q":  # llama.cpp's converter: (heads, 2, half) → (heads, half, 2)
            heads = config.num_attention_heads
            expected = expected.reshape(heads, 2, -1, len(expected)).swapaxes(1, 2).reshape(expected.shape)
        assert np.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_bases_file_is_read_by_transformers_as_the_model_it_was(
    random_model: Any, tmp_path: Path, architecture: str
) -> None:
    model = engine_of(random_model(architecture)).model
    export.write_gguf(model, tmp_path / "base.gguf")
    read = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="base.gguf", dtype=torch.float32
    )
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad(), model.peft.disable_adapter():
        assert (model.causal(ids).logits - read(ids).logits).abs().max() < 2e-3  # float16


class Beside:
    """Decodes as the model does, somewhere else, few rows at a time, and lets nobody join."""

    def __init__(self, model: Any) -> None:
        self.model, self.asked = model, list[Sequence[int]]()

    def rows(self, prompts: Sequence[Sequence[int]], samples: Sequence[int], new_tokens: int) -> Rows:
        self.asked.append(samples)
        return Closed(self.model, prompts, samples, new_tokens)

    def most_rows(self, longest: int) -> int:
        return 4


class Closed(Decoder):
    joinable = False


def test_rows_that_are_decoded_elsewhere_are_drawn_as_any(engine: Engine) -> None:
    prompts, asked = [[5, 6, 7], [8, 9]], tn.SamplingConfig(max_new_tokens=6, num_samples=5, ignore_end=True)
    beside = Beside(engine.model)
    plain, other = (
        sampler.sample(engine.model, prompts, asked, 3, lambda *_: None, elsewhere=elsewhere)
        for elsewhere in (None, lambda: beside)
    )
    assert [s.tokens for s in plain] == [s.tokens for s in other]
    assert beside.asked == [[4], [1, 3], [2]]


def test_a_file_that_is_handed_over_is_gone_then(tmp_path: Path) -> None:
    with llama_cpp.handed_over("some") as path:
        path.write_bytes(b"GGUF")
        assert path.read_bytes() == b"GGUF"
    with contextlib.suppress(FileNotFoundError):
        assert path.read_bytes() != b"GGUF"
