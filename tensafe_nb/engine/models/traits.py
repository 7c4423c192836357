"""What an architecture does with its inputs, found out by asking it: three tokens, once, when it is loaded."""

from typing import Any

import torch
from torch import Tensor

from tensafe_nb.engine.models.load import LoadedModel


def looks_ahead(model: LoadedModel) -> bool:
    """Return whether what comes behind a token changes what a model says at it: then it has to know what is padding."""
    ids = _three_tokens(model)
    other = ids.clone()
    other[0, 2] = (other[0, 2] + 1) % model.vocab_size
    return not torch.equal(_logits(model, ids)[:, 0], _logits(model, other)[:, 0])


def counts_positions_from_zero(model: LoadedModel) -> bool:
    """Return whether a model may be told positions 0, 1, 2, … and then says what it says without being told."""
    ids = _three_tokens(model)
    positions = torch.arange(3, device=ids.device).unsqueeze(0)
    try:
        return torch.equal(_logits(model, ids), _logits(model, ids, position_ids=positions))
    except TypeError:  # it takes no positions
        return False


def _three_tokens(model: LoadedModel) -> Tensor:
    return torch.arange(1, 4, device=model.device).unsqueeze(0) % model.vocab_size


@torch.no_grad()
def _logits(model: LoadedModel, ids: Tensor, **more: Any) -> Tensor:
    with model.autocast():
        logits: Tensor = model.causal(input_ids=ids, use_cache=False, **more).logits
    return logits
