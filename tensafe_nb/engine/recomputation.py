"""Activation checkpointing: layers keep their input alone, and compute the rest again when the backward pass needs it.

Chen et al. 2016, arXiv:1604.06174. By torch's non-reentrant checkpoint, one for each layer, so that hooks, adapters and
autocast work as they do without; the dropout of the second pass is that of the first.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from tensafe_nb.display import as_given
from tensafe_nb.engine.models.load import LoadedModel
from tensafe_nb.errors import ValidationError

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def layers_of(model: LoadedModel, model_ref: str) -> list[nn.Module]:
    """Return the layers of a model that can be computed again by themselves: those that transformers marks.

    Raises:
        ValidationError: The architecture has none.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: dict[str, nn.Module] = {}
    for name, module in model.causal.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, GradientCheckpointingLayer) and not inside:
            found[name] = module
    if not found:
        raise ValidationError(
            f"gradient_checkpointing: {as_given(model_ref)} is a {type(model.causal).__name__}, which has no layers "
            f"that can be computed again by themselves. Leave it out, and lower micro_batch_tokens instead."
        )
    return list(found.values())


@contextlib.contextmanager
def recomputed(
    layers: Sequence[nn.Module], *, draws: bool, again: Callable[[], Contexts] | None
) -> Iterator[None]:
    """Let layers forget, for one forward pass, what they compute; the backward pass computes it again.

    Args:
        layers: Of the model.
        draws: Whether they draw from torch's random stream: its state is kept for the second time.
        again: Makes the contexts of a layer's first and second time.
    """
    own = [layer.__dict__.get("forward") for layer in layers]
    options: dict[str, Any] = {} if again is None else {"context_fn": again}
    for layer in layers:
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=draws, **options
        )
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
