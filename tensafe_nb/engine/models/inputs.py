"""The inputs of a model: checked against its vocabulary and context, and what its architecture does with them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensafe_nb.config import SamplingConfig
from tensafe_nb.data.labels import TurnEnd, check_context, encode_prompts, turn_ends
from tensafe_nb.display import as_given
from tensafe_nb.engine.models.load import LoadedModel, too_few_rows
from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.batch import IGNORE, BatchData
from tensafe_nb.protocol.results import Prompt


def check_batch(batch: BatchData, model: LoadedModel, model_ref: str) -> None:
    """Refuse tokens outside the vocabulary and rows longer than the context.

    Raises:
        ValidationError: Says which token, or how long.
    """
    if not len(batch):
        raise ValidationError(
            "This batch is a Poisson draw that drew nothing: only forward_backward() of a private client takes it."
        )
    seen = np.where(batch.attention_mask == 0, 0, batch.input_ids)  # padding may be a token of no model
    labels = np.where(batch.labels == IGNORE, 0, batch.labels)
    for name, ids in (("input_ids", seen), ("labels", labels)):
        if int(ids.min()) < 0 or int(ids.max()) >= model.vocab_size:
            row, column = np.argwhere((ids < 0) | (ids >= model.vocab_size))[0]
            raise ValidationError(
                f"BatchData.{name}[{row}][{column}] is {ids[row, column]}: {as_given(model_ref)} has the tokens 0 to "
                f"{model.vocab_size - 1}. {_advice(int(ids[row, column]), model)}"
            )
    if model.context is not None and batch.shape[1] > model.context:
        raise ValidationError(
            f"BatchData has rows of {batch.shape[1]} tokens; {as_given(model_ref)} reads at most {model.context}. "
            f"Cut them: max_length={model.context} in tensafe_nb.data.batches."
        )


def _advice(token: int, model: LoadedModel) -> str:
    """Say what to do about a token that the model has no row for: it may be the tokenizer's own."""
    added = {number: text for text, number in model.tokenizer.get_vocab().items()}
    if token not in added:
        return "Was the text tokenised for another model? Use tc.tokenizer."
    return f"It is {as_given(added[token])}: {too_few_rows(max(added) + 1, model.vocab_size)}."


def encode(prompts: Sequence[Prompt], new_tokens: int, model: LoadedModel) -> list[list[int]]:
    """Return the token ids of prompts, checked against vocabulary and context.

    Raises:
        ValidationError: One is empty, outside the vocabulary, or too long together with what is to be drawn.
    """
    encoded, vocabulary, context = encode_prompts(model.tokenizer, prompts), model.vocab_size, model.context
    for index, ids in enumerate(encoded):
        if not ids:
            raise ValidationError(f"Prompt {index} is empty: give at least one token.")
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise ValidationError(
                f"Prompt {index} holds a token outside 0 to {vocabulary - 1}, the model's vocabulary. "
                f"{_advice(next(i for i in ids if not 0 <= i < vocabulary), model)}"
            )
        check_context(f"Prompt {index}", len(ids), new_tokens, context)
    return encoded


def to_draw(
    prompts: Sequence[Prompt], config: SamplingConfig, model: LoadedModel
) -> tuple[list[list[int]], list[TurnEnd], list[int | None]]:
    """Return of prompts the token ids, checked, what ends an answer to each, and its own stream of random numbers.

    Raises:
        ValidationError: A prompt does not fit the model, or a stop token is outside its vocabulary.
    """
    ids = encode(prompts, config.max_new_tokens, model)
    streams = [prompt.get("stream") if isinstance(prompt, Mapping) else None for prompt in prompts]
    turns = turn_ends(model.tokenizer, prompts)
    if config.stop_tokens:
        check_stop_tokens(config.stop_tokens, model)
        turns = [replace(turn, tokens=turn.tokens | set(config.stop_tokens)) for turn in turns]
    return ids, turns, streams


def check_stop_tokens(tokens: Sequence[int], model: LoadedModel) -> None:
    """Refuse stop tokens outside the vocabulary.

    Raises:
        ValidationError: Says which, and how large the vocabulary is.
    """
    for token in tokens:
        if token >= model.vocab_size:
            raise ValidationError(
                f"stop_tokens holds {as_given(token)}, which is never drawn: the model's vocabulary has "
                f"{model.vocab_size:,} tokens, 0 to {model.vocab_size - 1}. {_advice(token, model)}"
            )


def counts_positions_from_zero(model: LoadedModel) -> bool:
    """Return whether a model may be told positions 0, 1, 2, … and then says what it says without being told."""
    ids = three_tokens(model)
    positions = torch.arange(3, device=ids.device).unsqueeze(0)
    try:
        return torch.equal(logits_of(model, ids), logits_of(model, ids, position_ids=positions))
    except TypeError:  # it takes no positions
        return False


def three_tokens(model: LoadedModel) -> Tensor:
    """Return (1, 3) tokens that every vocabulary has."""
    return torch.arange(1, 4, device=model.device).unsqueeze(0) % model.vocab_size


@torch.no_grad()
def logits_of(model: LoadedModel, ids: Tensor, **more: Any) -> Tensor:
    """Return (B, T, V) what a model says of tokens (B, T), by its own forward pass."""
    with model.autocast():
        logits: Tensor = model.causal(input_ids=ids, use_cache=False, **more).logits
    return logits
