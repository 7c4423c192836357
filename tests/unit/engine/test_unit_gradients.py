"""Rows are rows, whatever is trained, whatever the counts, whatever the architecture; a loss that couples is found."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import tensafe_nb as tn
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.models.load import ASSETS
from tensafe_nb.errors import PrivacyUnitError, ValidationError
from tensafe_nb.losses import resolve_loss
from tensafe_nb.protocol.batch import BatchData

from .private import TOKEN_CE, CountingAccount, clipped_sum, examples, one_at_a_time, private_engine

C = 0.01
V = 128
SHAPE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BIDIRECTIONAL = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 66,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
RECURRENT = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "tied": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "bert": lambda: transformers.BertConfig(**BIDIRECTIONAL),
    "roberta": lambda: transformers.RobertaConfig(**BIDIRECTIONAL, pad_token_id=0),
    "mixtral": lambda: transformers.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "rwkv": lambda: transformers.RwkvConfig(**RECURRENT, num_hidden_layers=2, attention_hidden_size=32),
    "recurrentgemma": lambda: transformers.RecurrentGemmaConfig(
        **RECURRENT,
        num_hidden_layers=3,
        num_attention_heads=4,
        lru_width=32,
        attention_window_size=32,
        pad_token_id=0,
    ),
}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import shutil

    made: dict[str, str] = {}

    def folder(name: str) -> str:
        if name not in made:
            target: Path = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).save_pretrained(target)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(ASSETS / "tiny" / file, target)
            made[name] = str(target)
        return made[name]

    return folder


def rows_of(*lengths: int, labels: tuple[int, ...] | None = None) -> BatchData:
    """Rows of such lengths, of which the last so many positions are labelled."""
    batch = examples(lengths, vocabulary=V)
    if labels is None:
        return batch
    kept = np.full_like(batch.labels, -100)
    for row, (length, count) in enumerate(zip(lengths, labels, strict=True)):
        at = slice(length - 1 - count, length - 1)
        kept[row, at] = batch.labels[row, at]
    return BatchData(batch.input_ids, batch.attention_mask, kept, dict(batch.extras))


def worst_move(engine: Engine, batch: BatchData) -> float:
    """Return how far one row moves the sum, in units of C."""
    whole, rows = clipped_sum(engine, batch), np.arange(len(batch))
    return max(float((whole - clipped_sum(engine, batch.take(np.delete(rows, k)))).norm()) / C for k in rows)


COINCIDENCES = {
    "rows = positions": rows_of(4, 4, 4, 4),
    "rows = labelled positions": rows_of(6, 6, 6, labels=(2, 0, 1)),
    "one labelled position a row": rows_of(6, 5, 4, labels=(1, 1, 1)),
    "rows = heads": rows_of(5, 3, 6, 2),
    "one position": rows_of(2, 2),
    "ragged": rows_of(5, 12, 3, 8),
}
TRAINED = {
    "all weights": False,
    "the head": tn.LoRAConfig(rank=2, target_modules=("lm_head",)),
    "head and attention": tn.LoRAConfig(rank=2, target_modules=("lm_head", "q_proj")),
    "the embeddings": tn.LoRAConfig(rank=2, target_modules=("embed_tokens",)),
    "linear layers": None,
}


@pytest.mark.parametrize("name", ["llama", "tied"])
@pytest.mark.parametrize("trained", TRAINED)
def test_no_coincidence_of_counts_takes_other_things_for_rows(model_of: Any, name: str, trained: str) -> None:
    engine = private_engine(
        model_ref=model_of(name), lora=TRAINED[trained], dtype="float32", dp={"max_grad_norm": C}
    )
    for first in ("rows = labelled positions", "ragged"):  # whichever the way is chosen by
        engine.training_step.gradients.chosen.clear()  # type: ignore[union-attr]
        clipped_sum(engine, COINCIDENCES[first])
        for label, batch in COINCIDENCES.items():
            exact = one_at_a_time(engine, batch, C)
            off = float((clipped_sum(engine, batch) - exact).norm())
            assert off <= 1e-4 * C * len(batch), (label, first)
            assert worst_move(engine, batch) <= 1 + 1e-4, (label, first)


@pytest.mark.parametrize("name", ["bert", "roberta", "mixtral", "rwkv", "recurrentgemma"])
@pytest.mark.parametrize("lora", [tn.LoRAConfig(rank=2), False])
def test_every_architecture_is_trained_and_no_row_moves_more_than_c(
    model_of: Any, name: str, lora: Any
) -> None:
    engine = private_engine(
        model_ref=model_of(name),
        lora=lora,
        dtype="float32",
        dp={"max_grad_norm": C, "noise_multiplier": 1.0},
    )
    assert worst_move(engine, rows_of(5, 12, 3, 8)) <= 1 + 1e-4
    engine.forward_backward(rows_of(5, 3), TOKEN_CE)
    assert engine.optim_step().step == 1


@pytest.mark.parametrize(
    ("name", "ahead"), [("bert", True), ("roberta", True), ("llama", False), ("rwkv", False)]
)
def test_a_model_that_looks_ahead_is_told_what_is_padding(model_of: Any, name: str, ahead: bool) -> None:
    engine = Engine(tn.TrainingConfig(model_ref=model_of(name), dtype="float32"))
    assert engine.model.looks_ahead is ahead
    short, padded = rows_of(4), rows_of(4, 11)
    alone, beside = (
        engine.compute_logprobs(batch).logprobs[0, :3] for batch in (short, padded.take(np.arange(2)))
    )
    assert np.allclose(alone, beside, atol=1e-5)


# losses


def row_sums(outputs: Any) -> Tensor:
    sums: Tensor = -outputs.sum_rows(outputs.logprobs)
    return sums


def only_from_three_rows_on(outputs: Any, batch: Any) -> Tensor:
    """Couple, but not in a probe of two rows."""
    count = len(batch["input_ids"])
    return row_sums(outputs) / (len(batch["labels"]) if count > 2 else 1)


class FromTheThirdCallOn:
    """Couples, but not when it is asked first."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, outputs: Any, batch: Any) -> Tensor:
        self.calls += 1
        sums = row_sums(outputs)
        return sums - sums.mean() if self.calls > 8 and len(sums) > 1 else sums


def by_padding(outputs: Any, batch: Any) -> Tensor:
    """Divide by the columns, which the longest row decides."""
    return row_sums(outputs) / batch["input_ids"].shape[1]


def by_rank(outputs: Any, batch: Any) -> Tensor:
    sums = row_sums(outputs)
    return sums * (1 + sums.detach().argsort().argsort())


def by_history() -> Any:
    seen: list[float] = [0.0]

    def less_the_mean_so_far(outputs: Any, batch: Any) -> Tensor:
        sums = row_sums(outputs)
        seen.append(float(sums.detach().mean()))
        return sums - torch.tensor(seen).mean() * sums

    return less_the_mean_so_far


@pytest.mark.parametrize(
    "function",
    [only_from_three_rows_on, FromTheThirdCallOn(), by_padding, by_rank, by_history()],
    ids=["from 3 rows", "from call 9", "padding", "rank", "history"],
)
def test_a_loss_that_couples_rows_is_found_whenever_it_begins_to(function: Any) -> None:
    account = CountingAccount()
    engine, loss = private_engine(account, dp={"noise_multiplier": 1.0}), resolve_loss(function)
    with pytest.raises(PrivacyUnitError, match="another value when other rows are beside it"):
        for _ in range(12):
            engine.forward_backward(examples((5, 12, 3, 8, 7, 4)), loss)
            engine.optim_step()
    steps = len(account.charges)
    with pytest.raises(ValidationError, match="no gradients"):
        engine.optim_step()
    assert len(account.charges) == steps, "what was coupled is dropped and not charged"


def test_values_per_token_that_are_as_many_as_rows_are_not_taken_for_rows() -> None:
    def per_token(outputs: Any, batch: Any) -> Tensor:
        return -outputs.logprobs  # type: ignore[no-any-return]

    engine, loss = private_engine(), resolve_loss(per_token)
    engine.forward_backward(rows_of(6, 6, 6, labels=(1, 1, 1)), loss)  # one each: these are the rows
    with pytest.raises((PrivacyUnitError, ValidationError), match=r"another value|shape"):
        for _ in range(20):
            engine.forward_backward(rows_of(6, 6, 6, labels=(2, 0, 1)), loss)


def test_a_loss_that_turns_scalar_is_refused() -> None:
    def sometimes(outputs: Any, batch: Any) -> Tensor:
        sums = row_sums(outputs)
        return sums.mean() if len(sums) > 2 else sums

    engine, loss = private_engine(), resolve_loss(sometimes)
    with pytest.raises(PrivacyUnitError, match="one value per row before"):
        engine.forward_backward(examples((5, 6, 7)), loss)


def test_the_look_at_a_part_asks_the_loss_and_not_the_model() -> None:
    asked: list[int] = []

    def counted(outputs: Any, batch: Any) -> Tensor:
        asked.append(len(batch["input_ids"]))
        return row_sums(outputs)

    engine, loss = private_engine(), resolve_loss(counted)
    clipped_sum(engine, examples((5, 12, 3, 8)), loss=loss)
    passes: list[int] = []
    engine.model.causal.register_forward_pre_hook(lambda *_: passes.append(1))
    engine.model.causal.get_decoder().register_forward_pre_hook(lambda *_: passes.append(1))
    asked.clear()
    clipped_sum(engine, examples((5,) * 8), loss=loss)
    assert asked == [8, 2] and len(passes) == 1
    asked.clear()
    clipped_sum(engine, examples((5,) * 8))
    assert asked == [], "the toolkit's own losses are known"


def row_means(outputs: Any, batch: Any) -> Tensor:
    counts = outputs.sum_rows(torch.ones_like(outputs.logprobs)).clamp(min=1)
    return -outputs.sum_rows(outputs.logprobs) / counts  # type: ignore[no-any-return]


def test_a_loss_that_couples_by_its_gradient_alone_is_found_when_it_begins_to() -> None:
    def surrogate(outputs: Any, batch: Any) -> Tensor:
        rows = row_means(outputs, batch)
        return (rows - rows.detach()) * (rows.detach().mean() if len(rows) > 2 else 1.0)

    engine = private_engine()
    engine.forward_backward(examples((5, 7)), resolve_loss(surrogate))
    with pytest.raises(PrivacyUnitError, match="another gradient"):
        engine.forward_backward(examples((5, 7, 4, 9)), resolve_loss(surrogate))


@pytest.mark.parametrize("lengths", [(5,), (5, 7, 4)])
@pytest.mark.parametrize("scalar", [True, False])
def test_a_loss_that_remembers_other_rows_is_refused(lengths: tuple[int, ...], scalar: bool) -> None:
    seen = [0.0]

    def against_the_past(outputs: Any, batch: Any) -> Tensor:
        rows = row_means(outputs, batch)
        seen[0] = 0.5 * seen[0] + 0.5 * float(rows.detach().mean())
        return (rows * seen[0]).mean() if scalar else rows * seen[0]

    with pytest.raises(PrivacyUnitError, match=r"remembers|beside it"):
        private_engine().forward_backward(examples(lengths), resolve_loss(against_the_past))


@pytest.mark.parametrize("lora", [None, {}], ids=["adapters", "all weights"])
@pytest.mark.parametrize("scalar", [True, False])
def test_a_loss_that_keeps_rows_apart_passes_in_every_batch(lora: Any, scalar: bool) -> None:
    def mixed(outputs: Any, batch: Any) -> Tensor:
        rows = row_means(outputs, batch) + outputs.embeddings.square().mean(1)
        return rows.mean() if scalar else rows

    engine = private_engine(lora=lora, dp={"max_grad_norm": C})
    for number, lengths in enumerate([(5, 7, 4, 9, 2), (3,), (8, 8, 8, 2, 2, 2, 2, 2)]):
        batch = examples(lengths, seed=number)
        expected = one_at_a_time(engine, batch, C, resolve_loss(mixed))
        found = clipped_sum(engine, batch, loss=resolve_loss(mixed))
        assert float((found - expected).norm()) <= 1e-4 * float(expected.norm())
