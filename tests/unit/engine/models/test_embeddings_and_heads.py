"""Embeddings and heads under an adapter, and rows for new tokens: trained, checkpointed, exported, read again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tensafe_nb as tn
from tensafe_nb.engine.models import load as models
from tensafe_nb.engine.models.export import write_folder
from tests.unit.engine.models.test_reading import CONFIGS, SHAPE, load, saved

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BATCH = {"input_ids": [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]}
KINDS = {
    "adapted head": {"target_modules": ("lm_head", "q_proj")},
    "adapted embedding": {"target_modules": ("embed_tokens",)},
    "adapted embedding and head": {"target_modules": ("embed_tokens", "lm_head")},
    "head trained whole": {"modules_to_save": ("lm_head",)},
    "embedding trained whole": {"modules_to_save": ("embed_tokens",)},
    "both trained whole": {"modules_to_save": ("embed_tokens", "lm_head")},
    "one adapted, one whole": {"target_modules": ("embed_tokens",), "modules_to_save": ("lm_head",)},
    "a block trained whole": {"target_modules": ("q_proj",), "modules_to_save": ("mlp", "norm")},
}


def trained(service: tn.ServiceClient, folder: Path, **fields: Any) -> tn.TrainingClient:
    tc = service.create_training_client(
        model_ref=str(folder), dtype="float32", optimizer={"learning_rate": 3e-2}, **fields
    )
    for _ in range(3):
        tc.forward_backward(BATCH)
        tc.optim_step()
    return tc


@pytest.mark.parametrize("shape", [pytest.param("llama", marks=pytest.mark.soak), "llama tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_or_a_head_is_trained_checkpointed_and_exported_as_it_was_trained(
    kind: str, shape: str, service: tn.ServiceClient, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "m", CONFIGS[shape]())
    tc = trained(service, folder, lora_config=tn.LoRAConfig(rank=2, **KINDS[kind]))
    loss = tc.forward(BATCH).result().loss
    base = service.create_training_client(model_ref=str(folder), dtype="float32")
    assert loss < base.forward(BATCH).result().loss - 0.02
    state = tc.save_state().result().artifact_id
    for again in (service.restore(state), tc.fork()):
        assert again.forward(BATCH).result().loss == loss
    reference = tc.compute_logprobs(BATCH, reference=True).result().logprobs
    assert (reference == base.compute_logprobs(BATCH).result().logprobs).all(), "the base is kept"
    for merged in (False, True):
        out = service.export_adapter(state, tmp_path / f"out{merged}", merged=merged)
        back = service.create_training_client(model_ref=str(out), dtype="float32")
        assert back.forward(BATCH).result().loss == pytest.approx(loss, rel=1e-5)
    ids = torch.tensor(BATCH["input_ids"])
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "outTrue").eval()
    with torch.no_grad():
        assert plain(ids, labels=ids).loss.item() == pytest.approx(loss, rel=1e-5)


def test_a_head_that_was_not_touched_stays_tied_in_the_export(
    service: tn.ServiceClient, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "m", CONFIGS["llama tied"]())
    tc = trained(service, folder, lora_config=tn.LoRAConfig(rank=2))
    out = service.export_adapter(tc.save_state().result().artifact_id, tmp_path / "out", merged=True)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    "kind", ["head trained whole", "embedding trained whole", "adapted head", "adapted embedding"]
)
def test_embeddings_and_heads_are_trained_privately_with_each_rows_own_gradient(
    kind: str, service: tn.ServiceClient, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "m", CONFIGS["llama"]())

    def client(**fields: Any) -> tn.TrainingClient:
        tc = service.create_training_client(
            model_ref=str(folder),
            dtype="float32",
            lora_config=tn.LoRAConfig(rank=2, **KINDS[kind]),
            dp_config=tn.DPConfig(sampling="worst_case", target_epsilon=None, max_grad_norm=1e-2),
            **fields,
        )
        assert tc.tokenizer, (
            "loaded: PEFT's warnings are silenced for the whole process, one load after the other"
        )
        return tc

    one, two = client(), client(micro_batch_tokens=5)
    one_token_each = [[6, -100, -100, -100, -100], [11, -100, -100, -100, -100]]
    for labels in (
        one_token_each,  # as many tokens as rows: the way that is chosen here must do for the others too
        [[6, 7, 8, 9, -100], [11, -100, -100, -100, -100]],
        [[6, 7, 8, 9, -100], [11, 12, 13, 14, -100]],
    ):
        batch = BATCH | {"labels": labels, "example_ids": ["a", "b"]}
        results = [tc.forward_backward(batch).result() for tc in (one, two)]
        assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-4)
    assert one.optim_step().result().dp_metrics.noise_applied


@pytest.mark.parametrize(
    "shape", ["llama", *(pytest.param(name, marks=pytest.mark.soak) for name in ("gpt2", "phi", "mamba"))]
)
def test_rows_for_new_tokens_are_made_saved_exported_and_read_again(
    shape: str, service: tn.ServiceClient, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "m", CONFIGS[shape]())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>", "<end>"]})
    tokenizer.save_pretrained(folder)
    batch = {"input_ids": [[5, 2048, 7, 2049, 9]]}
    names = sorted({name.rpartition(".")[2] for name in models.embeddings_of(load(folder).causal)})
    targets = {"mamba": ("in_proj",)}.get(shape, "all-linear")
    frozen = tn.LoRAConfig(rank=2, target_modules=targets)
    for number, lora in enumerate((None, frozen, frozen.replace(modules_to_save=tuple(names)))):
        tc = service.create_training_client(
            model_ref=str(folder), dtype="float32", resize_embeddings=True, lora_config=lora, seed=number
        )
        first = tc.forward(batch).result().loss
        assert first < 9, "a new token is as likely as the others are on average"
        tc.forward_backward(batch)
        tc.optim_step()
        loss = tc.forward(batch).result().loss
        assert loss != first
        assert tc.sample("<tool>", max_new_tokens=2, temperature=0).result().texts
        state = tc.save_state().result().artifact_id
        for again in (service.restore(state), service.restore(state, seed=7), tc.fork()):
            assert again.forward(batch).result().loss == loss
        for merged in (False, True):
            out = service.export_adapter(state, tmp_path / f"{number}{merged}", merged=merged)
            back = service.create_training_client(model_ref=str(out), dtype="float32")
            assert back.forward(batch).result().loss == pytest.approx(loss, rel=1e-5)
            assert len(back.tokenizer) == 2050


def test_without_the_option_the_message_names_it_and_the_token(
    service: tn.ServiceClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tmp_path / "m", CONFIGS["llama"]())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    tc = service.create_training_client(model_ref=str(folder))
    said = r"It is '<new>': the tokenizer has 2049 tokens and the model 2048 rows.*resize_embeddings=True"
    with pytest.raises(tn.ValidationError, match=said):
        tc.forward({"input_ids": [[5, 2048]]}).result()
    with pytest.raises(tn.ValidationError, match=said):
        tc.sample("call <new>", max_new_tokens=1).result()
    assert "resize_embeddings=True" in caplog.text, "said when the client is made"
    with pytest.raises(tn.ValidationError, match=r"Was the text tokenised for another model"):
        tc.forward({"input_ids": [[5, 9999]]}).result()


def test_padding_may_be_a_token_that_the_model_has_no_row_for(
    tmp_path: Path, service: tn.ServiceClient
) -> None:
    tc = service.create_training_client(
        model_ref=str(saved(tmp_path / "m", CONFIGS["llama"]())), dtype="float32"
    )
    rows = {"input_ids": [[5, 6, 7], [8, 9, 2048]], "attention_mask": [[1, 1, 1], [1, 1, 0]]}
    usual = rows | {"input_ids": [[5, 6, 7], [8, 9, 0]]}
    assert tc.forward(rows).result().loss == tc.forward(usual).result().loss


def test_new_rows_that_stay_frozen_are_named_with_how_to_train_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tmp_path / "m", CONFIGS["llama"]())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    load(folder, resize_embeddings=True, lora_config=tn.LoRAConfig(rank=2))
    assert "modules_to_save=['embed_tokens', 'lm_head']" in caplog.text
    caplog.clear()
    load(folder, resize_embeddings=True, lora_config=tn.LoRAConfig(rank=2, modules_to_save=("embed_tokens",)))
    assert "frozen" not in caplog.text


def test_the_option_leaves_a_model_with_rows_enough_as_it_is(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", transformers.LlamaConfig(**(SHAPE | {"vocab_size": 2100})))
    assert load(folder, resize_embeddings=True).vocab_size == 2100


def test_a_rank_is_compared_with_the_layers_it_is_for(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", transformers.LlamaConfig(**(SHAPE | {"num_key_value_heads": 1})))
    load(folder, lora_config=tn.LoRAConfig(rank=12, target_modules=("q_proj",)))
    load(folder, lora_config=tn.LoRAConfig(rank=12, exclude_modules=("k_proj", "v_proj")))
    load(folder, lora_config=tn.LoRAConfig(rank=12, rank_pattern={"k_proj": 8, "v_proj": 8}))
    with pytest.raises(
        tn.ValidationError, match=r"layer \(8\), 'model.layers.0.self_attn.k_proj'.*rank ≤ 8, or"
    ):
        load(folder, lora_config=tn.LoRAConfig(rank=12))
    gpt2 = saved(
        tmp_path / "g",
        transformers.GPT2Config(vocab_size=2048, n_embd=16, n_layer=1, n_head=2, n_positions=8),
    )
    load(gpt2, lora_config=tn.LoRAConfig(rank=12))  # though the table of positions is smaller


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"modules_to_save": ("lm_haed",)}, r"no module named 'lm_haed'.*lm_head"),
        ({"target_modules": "q_proj"}, r"adapts no layer.*\['q_proj'\]"),
        ({"target_modules": ("q_proj",), "layers_to_transform": (7,)}, r"no block 7; its blocks are 0 to 1"),
        ({"layers_to_transform": (0, 2)}, r"no block 2"),
        ({"target_modules": ("self_attn",)}, r"no layer named 'self_attn'"),
        ({"target_modules": ()}, r"is empty"),
        (
            {"exclude_modules": r".*_proj"},
            r"'all-linear'\) adapts no layer.* exclude_modules='\.\*_proj' leaves out",
        ),
        (
            {"rank_pattern": {"q_prj": 4}},
            r"rank_pattern: no adapted layer is called 'q_prj'.*Did you mean 'q_proj'",
        ),
        ({"target_modules": ("q_proj",), "alpha_pattern": {"k_proj": 4}}, r"alpha_pattern: no adapted layer"),
        ({"target_parameters": ("experts.up",)}, r"no parameter named 'experts\.up'"),
    ],
)
def test_an_adapter_that_names_nothing_is_refused(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(tn.ValidationError, match=said):
        load(saved(tmp_path / "m", CONFIGS["llama"]()), lora_config=tn.LoRAConfig(rank=2, **fields))


def test_every_linear_layer_of_some_blocks_is_adapted_and_comes_back_from_an_export(tmp_path: Path) -> None:
    folder, some = saved(tmp_path / "m", CONFIGS["llama"]()), {"rank": 2, "layers_to_transform": [1]}
    adapted = load(folder, lora_config=tn.LoRAConfig(**some))
    names = [name for name, _ in adapted.trainable]
    listed = load(folder, lora_config=tn.LoRAConfig(target_modules=LINEAR, **some))
    assert names == [name for name, _ in listed.trainable] and all(".layers.1." in name for name in names)
    write_folder(adapted, tmp_path / "out", merged=False)
    back = load(tmp_path / "out", lora_config=tn.LoRAConfig(**some))
    assert names == [name for name, _ in back.trainable]
    assert all((p == q).all() for (_, p), (_, q) in zip(adapted.trainable, back.trainable, strict=True))


def test_blocks_stand_beside_names_and_experts_are_not_left_out_in_silence(tmp_path: Path) -> None:
    with pytest.raises(tn.ValidationError, match=r"regular expression, which has to name the blocks itself"):
        tn.LoRAConfig(target_modules=".*q_proj", layers_to_transform=[1])
    experts = saved(tmp_path / "m", CONFIGS["mixtral"]())
    with pytest.raises(tn.ValidationError, match=r"experts.*in all blocks or in none.*target_modules=\["):
        load(experts, lora_config=tn.LoRAConfig(rank=2, layers_to_transform=[1]))


def test_a_module_cannot_be_adapted_and_trained_whole() -> None:
    with pytest.raises(
        tn.ValidationError, match=r"\['lm_head'\] stands in target_modules and in modules_to_save"
    ):
        tn.LoRAConfig(target_modules=("lm_head",), modules_to_save=("lm_head",))
    with pytest.raises(tn.ValidationError, match="a string is a regular expression, and this is none"):
        tn.LoRAConfig(target_modules="*proj")
