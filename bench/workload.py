"""What several rows share: the built-in models on our side and the peer's, token batches, one training step."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import tensafe_nb as tn
from tensafe_nb.engine.models.load import ASSETS
from tensafe_nb.protocol.batch import IGNORE

RANK, ALPHA, LEARNING_RATE, WEIGHT_DECAY = 8, 16, 1e-4, 0.01
MODEL = f"builtin:tiny LoRA r{RANK}"
VOCABULARY = 2048


def tiny_client(service: tn.ServiceClient, **fields: Any) -> tn.TrainingClient:
    """Return a client whose model is loaded: transformers cannot load two models at once."""
    tc = service.create_training_client(
        model_ref="builtin:tiny",
        lora_config=tn.LoRAConfig(rank=RANK, alpha=ALPHA),
        optimizer={"name": "adamw", "learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
        dtype="float32",
        device="cpu",
        **fields,
    )
    assert tc.tokenizer
    return tc


def step_through(tc: tn.TrainingClient, batch: tn.BatchData) -> Callable[[], float]:
    """Return one training step: both operations queued, then both results waited for; it returns the loss."""

    def step() -> float:
        loss, done = tc.forward_backward(batch), tc.optim_step()
        done.result()
        return loss.result().loss

    return step


def plain_model(name: str) -> Any:
    """Return a built-in model, or that of a folder, as transformers loads it, for the peer."""
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(ASSETS / name, dtype=torch.float32)


def full(rows: int, tokens: int, labelled: float = 1.0) -> tn.BatchData:
    """Return random tokens without padding; a share of the positions, drawn at random, is labelled."""
    return _batch(rows, tokens, [tokens] * rows, labelled)


def ragged(rows: int, tokens: int) -> tn.BatchData:
    """Return rows from half to all of `tokens` long, padded on the right, every token labelled."""
    return _batch(rows, tokens, np.linspace(tokens // 2, tokens, rows, dtype=int), 1.0)


def _batch(rows: int, tokens: int, lengths: Sequence[int] | np.ndarray, labelled: float) -> tn.BatchData:
    chance = np.random.default_rng(0)
    ids, labels = chance.integers(3, VOCABULARY, (2, rows, tokens))
    mask = np.arange(tokens) < np.asarray(lengths)[:, None]
    rank = chance.permutation(rows * tokens).reshape(rows, tokens)
    kept = mask & (rank < labelled * rows * tokens)
    return tn.BatchData(np.where(mask, ids, 0), mask, np.where(kept, labels, IGNORE))
