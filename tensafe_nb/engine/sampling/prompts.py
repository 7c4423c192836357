"""What a model says of the tokens of prompts themselves: one forward pass over them, beside the one that samples."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from tensafe_nb.config import SamplingConfig
from tensafe_nb.engine.accumulation import no_tick, place
from tensafe_nb.engine.forward import ForwardPass
from tensafe_nb.protocol.batch import IGNORE, BatchData
from tensafe_nb.protocol.results import TopLogprobs

ReadPrompts: TypeAlias = tuple[tuple[tuple[float | None, ...], ...], tuple[tuple[TopLogprobs, ...], ...]]


@torch.no_grad()
def read_prompts(
    forward: ForwardPass, prompts: Sequence[Sequence[int]], config: SamplingConfig
) -> ReadPrompts:
    """Return each prompt's logprobs, and the most likely tokens of its places; both empty unless asked for.

    Log-probabilities are those of `forward`: at temperature 1, over the whole vocabulary.
    """
    top = min(config.top_prompt_logprobs, forward.model.vocab_size)
    if not config.reads_prompts:
        return (), ()
    batch = of_prompts(prompts)
    logprobs = np.zeros(batch.shape, dtype=np.float32)
    tokens, values = (np.zeros((*batch.shape, top), dtype) for dtype in (np.int64, np.float32))
    for rows, part in forward.micro_batches(batch, None, no_tick):
        if (part.labels == IGNORE).all():
            continue  # a prompt of one token has nothing to say of itself
        found: list[tuple[Tensor, Tensor]] = []

        def score(logits: Tensor, labels: Tensor, found: list[tuple[Tensor, Tensor]] = found) -> Tensor:
            scores = torch.log_softmax(logits, -1)
            if top:
                best, which = scores.topk(top)
                found.append((best, which))
            return scores.gather(1, labels.unsqueeze(1)).squeeze(1)

        outputs = forward.outputs(part, forward.tensors(part, batch))
        place(logprobs, batch, rows, outputs.map_logits(score))
        if top:
            place(values, batch, rows, torch.cat([best for best, _ in found]))
            place(tokens, batch, rows, torch.cat([which for _, which in found]))
        del outputs  # its logits can be large: let go of them before the next piece's are computed
    each = [len(prompt) - 1 for prompt in prompts]
    own = tuple((None, *map(float, logprobs[row, :n])) for row, n in enumerate(each))
    likeliest = tuple(
        (
            (),
            *(tuple(zip(tokens[row, at].tolist(), values[row, at].tolist(), strict=True)) for at in range(n)),
        )
        for row, n in enumerate(each)
    )
    return own if config.prompt_logprobs else (), likeliest if top else ()


def of_prompts(prompts: Sequence[Sequence[int]]) -> BatchData:
    """Return prompts as the rows of a batch, each token but the first the label of the one before it."""
    shape = len(prompts), max(map(len, prompts))
    ids, mask, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, IGNORE)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
        labels[row, : len(prompt) - 1] = prompt[1:]
    return BatchData.unchecked(ids, mask, labels)
