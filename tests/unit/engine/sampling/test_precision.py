"""Sampling in fewer bits: what was drawn from is what is said, the adapter counts at once, and rows stay apart."""

from typing import Any

import numpy as np
import pytest
import torch

import tensafe_nb as tn
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.sampling import copies
from tensafe_nb.engine.sampling.copies import precision_of
from tensafe_nb.engine.sampling.decoding import Decoder
from tensafe_nb.losses import resolve_loss
from tensafe_nb.protocol.results import SampleResult
from tests.close import assert_close

FAST = [name for name, (packing, within) in copies.FAST.items() if copies.works(packing, within)]
PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12], [30, 31, 32, 33]]
CONFIG = tn.TrainingConfig(
    device="cpu",
    dtype="float32",
    lora_config=tn.LoRAConfig(rank=4),
    optimizer=tn.OptimizerConfig(learning_rate=1e-2),
)


@pytest.fixture(autouse=True)
def _one_thread_and_any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(
        copies, "multiplies_bf16", lambda device: True
    )  # without instructions it is slow, not wrong


@pytest.fixture
def engine(batch: tn.BatchData) -> Engine:
    engine = Engine(CONFIG)
    learn(engine, batch)
    return engine


def learn(engine: Engine, batch: tn.BatchData) -> None:
    engine.forward_backward(batch, resolve_loss("token_ce"))
    engine.optim_step()


def off(engine: Engine, result: SampleResult) -> float:
    """Return by how much the sampler's logprobs differ from the trained weights', on average."""
    found = []
    for sequence in result.sequences:
        ids, start = [*sequence.prompt_tokens, *sequence.tokens], len(sequence.prompt_tokens) - 1
        labels = [*([-100] * start), *sequence.tokens, -100]
        scored = engine.compute_logprobs(tn.BatchData([ids], labels=[labels])).logprobs[0, start:-1]
        found.append(np.abs(scored - sequence.raw_logprobs))
    return float(np.concatenate(found).mean())


def sampling(precision: str, **fields: Any) -> tn.SamplingConfig:
    return tn.SamplingConfig(
        **{"max_new_tokens": 8, "seed": 3, "ignore_end": True, "precision": precision, **fields}
    )


@pytest.mark.parametrize("precision", FAST)
def test_tokens_are_drawn_from_nearly_what_trains_also_after_a_step(
    engine: Engine, precision: str, batch: tn.BatchData
) -> None:
    for _ in range(2):
        result = engine.sample(PROMPTS, sampling(precision))
        assert result.precision == precision
        assert 0 < off(engine, result) < 0.03
        assert engine.sample(PROMPTS, sampling(precision)).sequences == result.sequences, "the same seed"
        learn(engine, batch)
    assert engine.sample(PROMPTS, sampling("exact")).precision == "exact"
    assert off(engine, engine.sample(PROMPTS, sampling("exact"))) < 1e-4


@pytest.mark.parametrize("precision", FAST)
def test_a_row_draws_the_same_bit_for_bit_among_any_others_of_its_length(
    engine: Engine, precision: str
) -> None:
    together = engine.sample(PROMPTS, sampling(precision, num_samples=2)).sequences
    alone = engine.sample(PROMPTS[1:2], sampling(precision, num_samples=2)).sequences
    for row, other in zip(alone, together[2:4], strict=True):
        assert row.tokens == other.tokens
        assert row.logprobs[1:] == other.logprobs[1:]
        assert_close(row.logprobs[0], other.logprobs[0])  # said by the exact weights, as they read the prompt


def test_copies_read_the_prompts_too_but_those_in_int8(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "PAYS_FROM_NUMBERS", 1)
    read: list[torch.Tensor] = []
    by_transformers = Decoder._read
    monkeypatch.setattr(
        Decoder, "_read", lambda self, ids, at: (read.append(ids), by_transformers(self, ids, at))[1]
    )
    shared = list(range(3, 90))
    prompts = [[*shared, *prompt] for prompt in ([5, 6], [7], [8, 9, 10], [11, 12], [13])]
    for precision in ("exact", *FAST):
        read.clear()
        result = engine.sample(prompts, sampling(precision, max_new_tokens=20))
        assert bool(read) == (precision == "int8")
        assert off(engine, result) < (1e-4 if precision == "exact" else 0.03)


def test_copies_of_frozen_weights_are_made_once_and_those_of_trained_ones_after_each_step(
    engine: Engine, batch: tn.BatchData, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.Tensor] = []
    packing, within = copies.FAST["int8"]

    def counted(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        made.append(weight)
        return packing(weight, bias)

    monkeypatch.setitem(copies.FAST, "int8", (counted, within))
    trained = Engine(CONFIG.replace(lora_config=None))
    counts = []
    for each in (engine, trained):
        for _ in range(2):
            each.sample(PROMPTS, sampling("int8"))
            learn(each, batch)
            counts.append(len(made))
            made.clear()
    once = 4 * engine.model.causal.config.num_hidden_layers + 1
    assert [count // once for count in counts] == [1, 0, 1, 1]
    assert off(trained, trained.sample(PROMPTS, sampling("int8"))) < 0.03


def test_a_conversation_is_not_continued_from_what_another_precision_has_read(engine: Engine) -> None:
    prompt = [{"tokens": PROMPTS[0], "stream": 0}]
    drawn = engine.sample(
        prompt, sampling("exact", ignore_end=False, stop_tokens=list(range(3, 200)))
    ).sequences[0]
    longer = [{"tokens": [*PROMPTS[0], *drawn.tokens, 17], "stream": 0}]
    assert engine.turns is not None and engine.turns.known(tuple(longer[0]["tokens"]))
    found = engine.sample(longer, sampling("int8")).sequences
    engine.turns = None
    assert engine.sample(longer, sampling("int8")).sequences == found


def test_what_cannot_be_had_is_refused_with_the_reason(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = Engine(CONFIG.replace(dtype="bfloat16"))
    with pytest.raises(tn.ValidationError, match=r"computes in bfloat16.*dtype=\"float32\""):
        half.sample(PROMPTS, sampling("int8"))
    assert half.sample(PROMPTS, sampling("auto", max_new_tokens=1)).precision == "exact"
    with engine.model.peft.disable_adapter(), pytest.raises(tn.ValidationError, match="another adapter"):
        precision_of(engine.model, "int8", 1)
    for name, instead, reason in (
        ("multiplies_bf16", lambda device: False, "this processor has no products of bfloat16"),
        ("works", lambda packing, within: False, "this torch has no products of bfloat16"),
    ):
        with monkeypatch.context() as patch, pytest.raises(tn.ValidationError, match=reason):
            patch.setattr(copies, name, instead)
            precision_of(engine.model, "bfloat16", 1)
    monkeypatch.setattr(copies.memory, "available", lambda device: 1000)
    fresh = Engine(CONFIG.replace(lora_config=None))
    with pytest.raises(tn.ValidationError, match=r"would take \d+ MiB"):
        precision_of(fresh.model, "int8", 1)


def test_auto_takes_the_quickest_that_pays(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert precision_of(engine.model, "auto", 1) == "exact", "a small model is quick anyway"
    monkeypatch.setattr(copies, "PAYS_FROM_NUMBERS", 1)
    monkeypatch.setattr(copies, "works", lambda packing, within: True)

    def chosen(rows: int) -> str:
        return precision_of(engine.model, "auto", rows)

    monkeypatch.setattr(copies, "sums_int8", lambda: True)
    assert (chosen(1), chosen(16)) == ("int8", "bfloat16")
    monkeypatch.setattr(copies, "multiplies_bf16", lambda device: False)
    assert (chosen(1), chosen(16)) == ("int8", "int8")
    monkeypatch.setattr(copies, "sums_int8", lambda: False)
    assert (chosen(1), chosen(16)) == ("exact", "exact")
