"""A folder with an adapter is its base and that adapter: taken over exactly, or refused with the reason."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tensafe_nb as tn
from tensafe_nb.engine.models import load as models
from tests.unit.engine.models.test_reading import CONFIGS, edited, load, refusal, saved, with_tokenizer

pytestmark = [  # PEFT's own business
    pytest.mark.filterwarnings("ignore::FutureWarning:peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:(Model has|Setting `save_embedding):UserWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern:RuntimeWarning"),
]
IDS = torch.tensor([[5, 6, 7, 8, 9]])
BATCH = {"input_ids": IDS.tolist()}


def adapter(folder: Path, base: Path, **settings: Any) -> Any:
    """Write an adapter whose every weight matters, by plain PEFT; return the model it was saved from."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        **({"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings)
    )
    plain = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in plain.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    plain.save_pretrained(folder)
    return plain.eval()


def facts(folder: Path, **changes: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = getattr(model, "causal", model)(IDS).logits
    return found


IN_CI = ("Conv1D", "head trained whole", "adapted tied embedding", "a regular expression", "rank-stabilised")
KINDS = {
    "plain": ("llama", {}),
    "rank-stabilised": ("llama", {"use_rslora": True, "lora_alpha": 5}),
    "ranks of their own": ("llama", {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 3}}),
    "some blocks": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "a regular expression": ("llama", {"target_modules": r".*\.1\..*(q|v)_proj"}),
    "layers left out": ("llama", {"exclude_modules": ["k_proj"]}),
    "head trained whole": ("llama", {"modules_to_save": ["lm_head"]}),
    "embedding and head trained whole": ("llama tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "adapted embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "adapted tied head": ("qwen2", {"target_modules": ["lm_head", "q_proj"]}),
    "adapted tied embedding": ("gemma2", {"target_modules": ["embed_tokens"]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "biases": ("qwen2", {"bias": "lora_only", "target_modules": ["q_proj"]}),
    "experts": ("mixtral", {}),
    "state space": ("mamba", {"target_modules": ["in_proj", "x_proj"]}),
    "normalisation trained whole": ("llama", {"modules_to_save": ["norm"]}),
}


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")  # of PEFT before 0.19
@pytest.mark.parametrize(
    "kind", [kind if kind in IN_CI else pytest.param(kind, marks=pytest.mark.soak) for kind in KINDS]
)
def test_an_adapter_is_taken_over_trained_on_saved_exported_and_read_again(
    kind: str, service: tn.ServiceClient, tmp_path: Path
) -> None:
    shape, settings = KINDS[kind]
    base = saved(tmp_path / "base", CONFIGS[shape]())
    plain = adapter(tmp_path / "adapter", base, **settings)
    model = load(tmp_path / "adapter")
    assert torch.allclose(logits(model), logits(plain), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits(model), logits(load(base)), rtol=1e-2)

    tc = service.create_training_client(
        model_ref=str(tmp_path / "adapter"), optimizer={"learning_rate": 1e-2}, dtype="float32"
    )
    assert tc.config.lora_config is not None, "known before the model is loaded"
    before = tc.forward(BATCH).result().loss
    for _ in range(3):
        tc.forward_backward(BATCH)
        tc.optim_step()
    after = tc.forward(BATCH).result().loss
    assert after < before
    assert tc.sample("def", max_new_tokens=3, temperature=0).result().texts
    state = tc.save_state().result().artifact_id
    assert service.restore(state).forward(BATCH).result().loss == after
    assert tc.fork().forward(BATCH).result().loss == after
    assert tc.estimate(batch_size=1, length=8).needed_bytes > 0

    exported = service.export_adapter(state, tmp_path / "exported")
    again = service.create_training_client(model_ref=str(exported), dtype="float32")
    assert again.forward(BATCH).result().loss == pytest.approx(after, rel=1e-6)
    assert again.config.lora_config == tc.config.lora_config
    loaded = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), exported)
    assert loaded.eval()(IDS, labels=IDS).loss.item() == pytest.approx(after, rel=1e-5)
    whole = service.export_adapter(state, tmp_path / "whole", merged=True)
    merged = transformers.AutoModelForCausalLM.from_pretrained(whole).eval()
    assert merged(IDS, labels=IDS).loss.item() == pytest.approx(after, rel=1e-5)
    assert service.create_training_client(model_ref=str(whole), dtype="float32").forward(
        BATCH
    ).result().loss == pytest.approx(after, rel=1e-5)


def test_the_configuration_that_is_taken_over_is_the_adapters(
    service: tn.ServiceClient, tmp_path: Path
) -> None:
    base = saved(tmp_path / "base", CONFIGS["llama"]())
    adapter(tmp_path / "adapter", base, r=3, lora_alpha=7, lora_dropout=0.1)
    tc = service.create_training_client(model_ref=str(tmp_path / "adapter"))
    assert tc.tokenizer
    lora = tc.config.lora_config
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.dropout, lora.target_modules) == (3, 7.0, 0.1, "all-linear")
    same = tn.LoRAConfig(rank=3, target_modules="all-linear", dropout=0.0)
    again = service.create_training_client(model_ref=str(tmp_path / "adapter"), lora_config=same)
    assert again.tokenizer
    assert again.config.lora_config == lora.replace(dropout=0.0), "dropout is no part of an adapter"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"rank": 4}, r"rank=4 asked for, 2 in the adapter"),
        ({"alpha": 9}, r"alpha=9.0 asked for, 8.0 in the adapter"),
        ({"target_modules": ("q_proj",)}, r"target_modules=\('q_proj',\) asked for, 'all-linear' in"),
        ({"bias": "all"}, r"bias='all' asked for, 'none'"),
        ({"modules_to_save": ("lm_head",)}, r"modules_to_save=\('lm_head',\) asked for, \(\)"),
        ({"rank": 4, "alpha": 9}, r"alpha=9.0 .*; rank=4"),
    ],
)
def test_a_configuration_that_contradicts_the_adapter_is_refused_with_both_values(
    asked: dict[str, Any], said: str, tmp_path: Path
) -> None:
    base = saved(tmp_path / "base", CONFIGS["llama"]())
    adapter(tmp_path / "adapter", base)
    with pytest.raises(tn.ValidationError, match=f"contradicts the adapter in .*{said}"):
        load(tmp_path / "adapter", lora_config=tn.LoRAConfig(**asked))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "kind IA3, and only LoRA is trained here. To train on top of it, merge"),
        ({"peft_type": "PROMPT_TUNING"}, "cannot be merged either: give its base"),
        ({"peft_type": "PROMPT_TUNING"}, "kind PROMPT_TUNING"),
        ({"peft_type": None}, "kind None"),
        ({"use_dora": True}, "DoRA"),
        ({"task_type": "SEQ_CLS"}, "made for SEQ_CLS"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base's weights"),
        ({"init_lora_weights": "olora"}, "changes the base's weights"),
        ({"trainable_token_indices": [1]}, "single rows"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "used several times"),
        ({"lora_bias": True}, "biases of their own"),
        ({"something_new": {"a": 1}}, "something_new"),
        ({"target_modules": None}, "names no target_modules"),
        ({"r": 0}, "rank"),
    ],
)
def test_a_kind_of_adapter_that_would_have_to_be_approximated_is_refused(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    base = saved(tmp_path / "base", CONFIGS["llama"]())
    adapter(tmp_path / "adapter", base)
    assert said in str(refusal(facts(tmp_path / "adapter", **changes)))


def test_fields_that_newer_or_older_versions_write_and_leave_empty_do_no_harm(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", CONFIGS["llama"]())
    plain = adapter(tmp_path / "adapter", base)
    facts(tmp_path / "adapter", something_new=None, another=False, more=[], init_lora_weights="gaussian")
    assert torch.allclose(logits(load(tmp_path / "adapter")), logits(plain), rtol=1e-5)


def test_a_base_is_found_from_here_and_from_the_adapters_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = saved(tmp_path / "models" / "base", CONFIGS["llama"]())
    plain = adapter(tmp_path / "models" / "adapter", base)
    for named in ("../base", "models/base", str(base)):
        monkeypatch.chdir(tmp_path)
        facts(tmp_path / "models" / "adapter", base_model_name_or_path=named)
        assert torch.allclose(logits(load(tmp_path / "models" / "adapter")), logits(plain), rtol=1e-5)
        assert torch.allclose(logits(load("models/adapter")), logits(plain), rtol=1e-5)


def test_a_base_that_is_not_there_is_named_with_where_to_write_it(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", CONFIGS["llama"]())
    adapter(tmp_path / "adapter", base)
    for named in ("/no/such/base", "some-org/some-base", "./elsewhere"):
        facts(tmp_path / "adapter", base_model_name_or_path=named)
        assert named in str(refusal(tmp_path / "adapter"))
    facts(tmp_path / "adapter", base_model_name_or_path=None)
    assert "does not say what its base is" in str(refusal(tmp_path / "adapter"))


def test_an_adapter_that_was_not_fetched_says_how(tmp_path: Path) -> None:
    adapter(tmp_path / "adapter", saved(tmp_path / "base", CONFIGS["llama"]()))
    (tmp_path / "adapter" / "adapter_model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\n"
    )
    assert "Fetch them: git lfs pull" in str(refusal(tmp_path / "adapter"))


def test_an_adapter_on_an_adapter_and_one_in_a_folder_of_another_model_are_refused(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", CONFIGS["llama"]())
    adapter(tmp_path / "first", base)
    adapter(tmp_path / "second", base)
    facts(tmp_path / "second", base_model_name_or_path=str(tmp_path / "first"))
    assert "is an adapter itself" in str(refusal(tmp_path / "second"))
    shutil.copytree(tmp_path / "first", tmp_path / "both")
    saved(tmp_path / "both", CONFIGS["llama"]())
    assert "holds a whole model and an adapter of another base" in str(refusal(tmp_path / "both"))


def test_a_model_with_its_own_adapter_beside_it_is_both(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", CONFIGS["llama"]())
    plain = adapter(base, base)
    assert torch.allclose(logits(load(base)), logits(plain), rtol=1e-5)
    facts(base, base_model_name_or_path="")
    assert torch.allclose(logits(load(base)), logits(plain), rtol=1e-5)


def test_weights_that_do_not_fit_the_base_are_named(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", CONFIGS["llama"]())
    adapter(tmp_path / "adapter", base)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = load_file(file)
    name = sorted(whole)[0]
    save_file({k: v for k, v in whole.items() if k != name}, file)
    assert refusal(tmp_path / "adapter").details["missing"] == [name]
    save_file(whole | {"base_model.model.extra.lora_A.weight": torch.ones(2, 2)}, file)
    assert refusal(tmp_path / "adapter").details["unexpected"]
    save_file(whole | {name: torch.ones(3, 3)}, file)
    assert "(3, 3) there" in str(refusal(tmp_path / "adapter"))
    file.write_bytes(file.read_bytes()[:500])
    assert "cannot be read" in str(refusal(tmp_path / "adapter"))
    file.unlink()
    assert "has no weights" in str(refusal(tmp_path / "adapter"))
    torch.save(whole, tmp_path / "adapter" / "adapter_model.bin")
    load(tmp_path / "adapter")
    torch.save({"evil": os.system}, tmp_path / "adapter" / "adapter_model.bin")
    assert "more than tensors" in str(refusal(tmp_path / "adapter"))
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    assert "cannot be read" in str(refusal(tmp_path / "adapter"))


def test_a_base_that_is_not_whole_is_refused_beneath_an_adapter_too(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", CONFIGS["llama"]())
    adapter(tmp_path / "adapter", base)
    edited(base, lambda weights: {k: v for k, v in weights.items() if ".1." not in k})
    assert len(refusal(tmp_path / "adapter").details["missing"]) == 9


def test_the_tokenizer_is_the_adapters_where_it_brings_one(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", CONFIGS["llama"]())
    adapter(tmp_path / "adapter", base)
    assert "Assistant:" in load(tmp_path / "adapter").tokenizer.chat_template
    with_tokenizer(tmp_path / "adapter")
    settings = tmp_path / "adapter" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": "its own"}))
    assert load(tmp_path / "adapter").tokenizer.chat_template == "its own"


@pytest.mark.parametrize("shape", ["llama", "qwen2"])
def test_embeddings_that_were_resized_before_come_with_the_adapter(
    shape: str, service: tn.ServiceClient, tmp_path: Path
) -> None:
    base = saved(tmp_path / "base", CONFIGS[shape]())
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(2051)
    plain = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    torch.nn.init.normal_(plain.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    plain.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<a>", "<b>", "<c>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    batch = {"input_ids": [[5, 6, 2048, 2049, 2050]]}
    ids = torch.tensor(batch["input_ids"])
    expected = plain.eval()(ids, labels=ids).loss.item()

    tc = service.create_training_client(model_ref=str(tmp_path / "adapter"), dtype="float32")
    assert tc.forward(batch).result().loss == pytest.approx(expected, rel=1e-6)
    tc.forward_backward(batch)
    tc.optim_step()
    after = tc.forward(batch).result().loss
    state = tc.save_state().result().artifact_id
    assert service.restore(state).forward(batch).result().loss == after
    for merged in (False, True):
        out = service.export_adapter(state, tmp_path / f"out{merged}", merged=merged)
        again = service.create_training_client(model_ref=str(out), dtype="float32")
        assert again.forward(batch).result().loss == pytest.approx(after, rel=1e-5)


def test_reinforcement_learning_starts_from_the_adapter_as_its_reference(tmp_path: Path) -> None:
    from tensafe_nb.engine.engine import Engine

    base = saved(tmp_path / "base", CONFIGS["llama"]())
    adapter(tmp_path / "adapter", base)
    engine = Engine(tn.TrainingConfig(model_ref=str(tmp_path / "adapter"), dtype="float32", device="cpu"))
    batch = tn.BatchData(**BATCH)
    own, reference = (engine.compute_logprobs(batch, reference=r).logprobs for r in (False, True))
    assert (own == reference).all()


def test_an_adapter_trains_with_differential_privacy(service: tn.ServiceClient, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", CONFIGS["llama"]())
    adapter(tmp_path / "adapter", base, modules_to_save=["lm_head"])
    tc = service.create_training_client(
        model_ref=str(tmp_path / "adapter"),
        dtype="float32",
        dp_config=tn.DPConfig(sampling="worst_case", target_epsilon=None),
    )
    tc.forward_backward({"input_ids": [[5, 6, 7], [8, 9, 10]], "example_ids": ["a", "b"]})
    assert tc.optim_step().result().dp_metrics.noise_applied


def test_an_adapter_is_the_same_in_bfloat16(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", CONFIGS["llama"]())
    plain = adapter(tmp_path / "adapter", base, modules_to_save=["embed_tokens", "norm"])
    model = load(tmp_path / "adapter", dtype="bfloat16")
    assert {p.dtype for _, p in model.trainable} == {torch.float32}
    with model.autocast():
        found = logits(model).float()
    assert (found - logits(plain)).abs().max() <= 0.05 * logits(plain).abs().max()


def test_the_adapter_of_a_hub_id_that_was_downloaded_is_loaded_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = saved(tmp_path / "base", CONFIGS["llama"]())
    plain = adapter(tmp_path / "adapter", base)
    monkeypatch.setattr(
        models, "at_hand", lambda hub_id: str(tmp_path / "adapter") if hub_id == "org/lora" else hub_id
    )
    assert torch.allclose(logits(load("org/lora")), logits(plain), rtol=1e-5)
