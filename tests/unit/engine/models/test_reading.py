"""What is loaded is what the folder holds, all of it: everything else is refused with its names and the way out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tensafe_nb as tn
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.models import gguf
from tensafe_nb.engine.models import load as models
from tensafe_nb.engine.models.load import ASSETS
from tensafe_nb.losses import resolve_loss
from tests.unit.engine.models.test_gguf import write_gguf

Weights = dict[str, torch.Tensor]
SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "llama tied": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "gemma2": lambda: transformers.Gemma2Config(**SHAPE, head_dim=8, sliding_window=16),
    "phi": lambda: transformers.PhiConfig(**SHAPE),
    "mixtral": lambda: transformers.MixtralConfig(**SHAPE, num_local_experts=4),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=2048,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    ),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=2048, n_embd=16, n_layer=2, n_head=2, n_positions=32),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=2048, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=4
    ),
    "mamba2": lambda: transformers.Mamba2Config(
        vocab_size=2048,
        hidden_size=16,
        num_hidden_layers=2,
        state_size=4,
        num_heads=4,
        head_dim=8,
        n_groups=1,
    ),
}


def with_tokenizer(folder: Path) -> Path:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "tiny" / file, folder)
    return folder


def saved(folder: Path, config: Any, **options: Any) -> Path:
    """Write a random model of a configuration, with the tiny tokenizer."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder, **options)
    return with_tokenizer(folder)


def edited(folder: Path, edit: Callable[[Weights], Weights]) -> Path:
    file = folder / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})
    return folder


def changed(folder: Path, **facts: Any) -> Path:
    """Write other facts into config.json; None takes one out."""
    file = folder / "config.json"
    kept = json.loads(file.read_text()) | facts
    file.write_text(json.dumps({name: value for name, value in kept.items() if value is not None}))
    return folder


def load(folder: Path | str, **fields: Any) -> models.LoadedModel:
    return models.load(
        tn.TrainingConfig(model_ref=str(folder), device="cpu", **({"dtype": "float32"} | fields))
    )


def refusal(folder: Path | str, **fields: Any) -> tn.ModelLoadError:
    with pytest.raises(tn.ModelLoadError) as caught:
        load(folder, **fields)
    return caught.value


@pytest.mark.parametrize("name", CONFIGS)
def test_a_whole_folder_of_every_shape_is_loaded_bit_for_bit(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", CONFIGS[name]())
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(load(folder).causal(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_missing_weight_of_any_shape_is_named(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", CONFIGS[name]())
    names = sorted(load_file(folder / "model.safetensors"))
    for lost in (names[0], names[len(names) // 2], names[-1]):
        edited(folder, lambda weights, lost=lost: {k: v for k, v in weights.items() if k != lost})
        error = refusal(folder)
        assert error.details["missing"] or "put together" in str(error), lost  # an expert is part of a stack
        saved(folder, CONFIGS[name]())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_weight_without_a_place_is_refused_unless_it_is_to_be_ignored(name: str, tmp_path: Path) -> None:
    folder = edited(
        saved(tmp_path / "m", CONFIGS[name]()), lambda w: w | {"v_head.summary.weight": torch.ones(1, 16)}
    )
    error = refusal(folder)
    assert error.details["unexpected"] == ["v_head.summary.weight"]
    assert "ignore_weights=['v_head.summary.weight']" in str(error)
    for pattern in ("v_head", r"^v_head\.", "*.summary.*", "v_head.*"):
        load(folder, ignore_weights=[pattern])
    assert refusal(folder, ignore_weights=["v_heads"]).details["unexpected"]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "policy.net."])
@pytest.mark.parametrize("name", ["llama tied", "gpt2", "mamba"])
def test_the_prefix_of_a_wrapper_is_named_with_what_to_save_instead(
    name: str, prefix: str, tmp_path: Path
) -> None:
    folder = edited(
        saved(tmp_path / "m", CONFIGS[name]()),
        lambda weights: {f"{prefix}{k}": v for k, v in weights.items()},
    )
    assert f"begin with {prefix!r}" in str(refusal(folder))


def test_a_prefix_that_transformers_understands_loads_the_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", CONFIGS["llama"]())
    ids = torch.tensor([[5, 6, 7]])
    expected = load(folder).causal(ids).logits
    edited(folder, lambda weights: {f"model.{k}": v for k, v in weights.items()})
    assert torch.equal(load(folder).causal(ids).logits, expected)


@pytest.mark.parametrize(("layers", "said"), [(3, "3 layers"), (1, "1 layers, and the file holds layer 1")])
def test_a_number_of_layers_that_is_not_the_files_is_named(layers: int, said: str, tmp_path: Path) -> None:
    folder = changed(saved(tmp_path / "m", CONFIGS["llama"]()), num_hidden_layers=layers, layer_types=None)
    assert f"config.json says {said}" in str(refusal(folder))


def test_a_shape_that_is_not_that_of_the_configuration_is_named_with_both(tmp_path: Path) -> None:
    folder = changed(saved(tmp_path / "m", CONFIGS["llama"]()), intermediate_size=20)
    error = refusal(folder)
    assert "model.layers.0.mlp.up_proj.weight (24, 16) there, (20, 16) by config.json" in str(error)
    assert len(error.details["mismatched"]) == 6


def test_a_missing_or_damaged_file_of_several_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", CONFIGS["llama"](), max_shard_size="40KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    assert "damaged or cut off" in str(refusal(folder))
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n")
    assert "git lfs pull" in str(refusal(folder))
    shard.unlink()
    assert f"files of weights: {shard.name}" in str(refusal(folder))


def test_a_tokenizer_that_is_missing_or_was_not_fetched_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", CONFIGS["llama"]())
    (folder / "tokenizer.json").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n"
    )
    assert "tokenizer.json only says where they are. Fetch them: git lfs pull" in str(refusal(folder))
    for file in folder.glob("*token*"):
        file.unlink()
    assert "it comes without a tokenizer. Put tokenizer.json" in str(refusal(folder))


def test_an_address_is_told_the_id_that_it_holds() -> None:
    with pytest.raises(tn.ModelLoadError, match=r"Give a model of the hub by its id: 'maker/model'\."):
        load("https://hub.example/maker/model/tree/main")


def test_a_weight_that_attention_hides_is_named_once_a_gradient_finds_it(
    service: tn.ServiceClient, tmp_path: Path
) -> None:
    folder = edited(
        saved(tmp_path / "m", CONFIGS["llama"]()),
        lambda w: {k: v * torch.nan if k.endswith("0.self_attn.q_proj.weight") else v for k, v in w.items()},
    )
    tc = service.create_training_client(model_ref=str(folder), dtype="float32")
    with pytest.raises(
        tn.NonFiniteLossError, match=r"hold NaN or infinity: model\.layers\.0\.self_attn\.q_proj"
    ):
        tc.forward_backward({"input_ids": [[5, 6, 7]]}).result()


def test_a_shard_without_what_the_index_promises_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", CONFIGS["llama"](), max_shard_size="40KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    kept = load_file(shard)
    lost = sorted(kept)[0]
    save_file({k: v for k, v in kept.items() if k != lost}, shard, metadata={"format": "pt"})
    if len(kept) > 1:
        assert refusal(folder).details["missing"] == [lost]


def test_a_pickle_of_tensors_is_read_and_one_of_anything_else_is_not(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", CONFIGS["llama"]())
    ids = torch.tensor([[5, 6, 7]])
    expected = load(folder).causal(ids).logits
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert torch.equal(load(folder).causal(ids).logits, expected)
    torch.save(weights | {"evil": Path("x")}, folder / "pytorch_model.bin")
    assert "code that comes with a model is never run" in str(refusal(folder))


def test_weights_stored_as_whole_numbers_are_refused(tmp_path: Path) -> None:
    folder = edited(
        saved(tmp_path / "m", CONFIGS["llama"]()),
        lambda w: {k: (v * 100).to(torch.int8) if "q_proj" in k else v for k, v in w.items()},
    )
    assert "model.layers.0.self_attn.q_proj.weight (I8)" in str(refusal(folder))


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    folder = edited(
        saved(tmp_path / "m", CONFIGS["llama"]()),
        lambda w: {k: v * torch.nan if k.endswith("0.mlp.up_proj.weight") else v for k, v in w.items()},
    )
    assert "hold NaN or infinity: model.layers.0.mlp.up_proj.weight" in str(refusal(folder))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_every_float_type_are_read(kind: torch.dtype, tmp_path: Path) -> None:
    folder = edited(
        saved(tmp_path / "m", CONFIGS["llama"]()), lambda w: {k: v.to(kind) for k, v in w.items()}
    )
    assert {p.dtype for p in load(folder).causal.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "mxfp4"])
def test_a_quantised_folder_is_refused_with_its_method(method: str, tmp_path: Path) -> None:
    folder = changed(saved(tmp_path / "m", CONFIGS["llama"]()), quantization_config={"quant_method": method})
    assert f"stored quantised ({method})" in str(refusal(folder))


def test_a_classifier_is_refused_whether_its_head_is_tied_or_not(tmp_path: Path) -> None:
    for name, tied in (("untied", False), ("tied", True)):
        config = transformers.Qwen2Config(**SHAPE, tie_word_embeddings=tied, num_labels=2)
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / name)
        assert "Qwen2ForSequenceClassification, which has no language-model head" in str(
            refusal(with_tokenizer(tmp_path / name))
        )
        changed(tmp_path / name, architectures=None)
        assert "score.weight" in refusal(tmp_path / name).details["unexpected"]


def test_a_body_without_its_head_is_refused(tmp_path: Path) -> None:
    transformers.AutoModel.from_config(CONFIGS["llama"]()).save_pretrained(tmp_path / "m")
    error = refusal(with_tokenizer(tmp_path / "m"))
    assert error.details["missing"] == ["lm_head.weight"] and "tie_word_embeddings" in str(error)


def test_a_body_whose_head_is_its_embedding_is_whole(tmp_path: Path) -> None:
    transformers.AutoModel.from_config(CONFIGS["qwen2"]()).save_pretrained(tmp_path / "m")
    model = load(with_tokenizer(tmp_path / "m"))
    assert model.causal.get_output_embeddings().weight is model.causal.get_input_embeddings().weight


def test_encoders_with_decoders_and_models_that_see_pictures_are_refused(tmp_path: Path) -> None:
    t5 = transformers.T5Config(vocab_size=2048, d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    said = str(refusal(with_tokenizer(tmp_path / "t5")))
    assert "encoder and a decoder" in said or "T5ForConditionalGeneration" in said
    folder = changed(saved(tmp_path / "seeing", CONFIGS["llama"]()), vision_config={"hidden_size": 8})
    assert "takes more than text (vision_config)" in str(refusal(folder))


def test_a_model_that_sees_later_tokens_is_loaded_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bert = transformers.BertConfig(
        vocab_size=2048, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    assert "BertForMaskedLM" in str(refusal(with_tokenizer(tmp_path / "bert")))
    torch.manual_seed(0)
    transformers.BertLMHeadModel(bert).save_pretrained(tmp_path / "again")
    load(with_tokenizer(tmp_path / "again"))
    assert "see the ones after it" in caplog.text


def test_code_of_a_models_own_is_never_run(tmp_path: Path) -> None:
    folder = changed(
        saved(tmp_path / "m", CONFIGS["llama"]()),
        model_type="homemade",
        auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
    )
    (folder / "code.py").write_text("raise SystemExit('ran')")
    said = str(refusal(folder))
    assert "never run" in said and "trust_remote_code=True" not in said


def test_a_folder_that_is_no_model_says_what_it_holds(tmp_path: Path) -> None:
    saved(tmp_path / "outer" / "inner", CONFIGS["llama"]())
    assert f"for instance '{tmp_path / 'outer' / 'inner'}'" in str(refusal(tmp_path / "outer"))
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "m.gguf").touch()
    assert "It holds GGUF files" in str(refusal(tmp_path / "g"))
    assert "is a file. Give the folder" in str(refusal(tmp_path / "outer" / "inner" / "config.json"))
    (tmp_path / "empty").mkdir()
    assert "this one holds nothing" in str(refusal(tmp_path / "empty"))
    (tmp_path / "outer" / "inner" / "model.safetensors").unlink()
    changed(saved(tmp_path / "list", CONFIGS["llama"]()))
    (tmp_path / "list" / "config.json").write_text("[]")
    assert "could not be loaded" in str(refusal(tmp_path / "list"))
    assert "holds no weights" in str(refusal(tmp_path / "outer" / "inner"))


def test_a_head_that_differs_from_the_embedding_stays_its_own_though_the_configuration_ties_them(
    service: tn.ServiceClient, tmp_path: Path
) -> None:
    folder = changed(saved(tmp_path / "m", CONFIGS["llama"]()), tie_word_embeddings=True)
    tc = service.create_training_client(model_ref=str(folder), dtype="float32")
    batch = {"input_ids": [[5, 6, 7, 8]]}
    expected = tc.forward(batch).result().loss
    out = service.export_adapter(tc.save_state().result().artifact_id, tmp_path / "out")
    again = service.create_training_client(model_ref=str(out), dtype="float32")
    assert again.forward(batch).result().loss == expected
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_client_of_a_folder_that_is_not_whole_is_in_error_with_the_names(
    service: tn.ServiceClient, tmp_path: Path
) -> None:
    folder = edited(
        saved(tmp_path / "m", CONFIGS["llama"]()), lambda w: {k: v for k, v in w.items() if "norm" not in k}
    )
    tc = service.create_training_client(model_ref=str(folder))
    with pytest.raises(
        tn.ModelLoadError, match=r"5 weights of the model are not in it: model.layers.0.input"
    ):
        tc.forward_backward({"input_ids": [[1, 2, 3]]}).result()
    assert tc.status == "ERROR"


def test_a_gguf_file_that_lacks_a_weight_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.unit.engine.models import test_gguf

    tensors = test_gguf._tensors
    monkeypatch.setattr(
        test_gguf, "_tensors", lambda heads: (t for t in tensors(heads) if t[0] != "blk.1.ffn_up.weight")
    )
    path = write_gguf(tmp_path / "lacking.gguf")
    with pytest.raises(tn.ModelLoadError, match=r"model.layers.1.mlp.up_proj.weight") as caught:
        gguf.converted(path)
    assert caught.value.details["missing"] == ["model.layers.1.mlp.up_proj.weight"]
    assert test_gguf.folders() == []


def test_an_old_checkpoint_with_buffers_that_transformers_knows_to_ignore_is_loaded(tmp_path: Path) -> None:
    folder = edited(
        saved(tmp_path / "m", CONFIGS["gpt2"]()),
        lambda w: w | {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 32, 32) for i in range(2)},
    )
    load(folder)
    edited(folder, lambda w: w | {f"transformer.h.{i}.attn.masked_bias": torch.ones(1) for i in range(2)})
    pattern = r"transformer.h.\d+.attn.masked_bias"  # which it does not know: said with the pattern that covers them
    assert repr([pattern]) in str(refusal(folder))
    load(folder, ignore_weights=[pattern])
    folder = edited(
        saved(tmp_path / "l", CONFIGS["llama"]()),
        lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    )
    load(folder)


def test_what_a_batch_says_of_padding_is_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(transformers.modeling_utils.logger, "warning_once", said.append)
    config = transformers.GPT2Config(
        vocab_size=2048, n_embd=16, n_layer=1, n_head=2, n_positions=32, pad_token_id=0
    )
    folder = saved(tmp_path / "m", config)
    engine = Engine(tn.TrainingConfig(model_ref=str(folder), device="cpu", lora_config=tn.LoRAConfig(rank=2)))
    engine.forward_backward(tn.BatchData([[0, 5, 6, 0]]), resolve_loss("token_ce"))
    engine.sample([[0, 5, 6, 0]], tn.SamplingConfig(max_new_tokens=2))
    assert not said
