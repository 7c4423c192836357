"""What is kept of conversations between turns: keys and values, so that no token of them is read twice."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_BYTES = 1 << 29  # of keys and values
ON_ACCELERATORS = 8  # times as many
Layers = list[tuple[Tensor, Tensor]]  # of each layer keys and values, (R, groups, T, width)


@dataclass(frozen=True, slots=True)
class Read:
    """Rows that a model has read.

    Attributes:
        layers: Of each layer keys and values, (R, groups, T, width).
        mask: (R, T), 1 where a place holds a token of its row; the last place does.
    """

    layers: Layers
    mask: Tensor

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

    @classmethod
    def of(cls, layers: Layers, mask: Tensor) -> "Read":
        """Take rows without the empty places between their tokens: all tokens of a row come last."""
        order = mask.argsort(dim=1, stable=True)[:, -int(mask.sum(1).max()) :]
        places = order[:, None, :, None]
        together = [
            (keys.take_along_dim(places, 2), values.take_along_dim(places, 2)) for keys, values in layers
        ]
        return cls(together, mask.gather(1, order))


def joined(parts: Sequence[tuple[Read, Tensor, Tensor]]) -> Read:
    """Return rows of several reads as one: each part is a read, which of its rows, and where in the whole they go."""
    layers = [
        (
            at_the_end([layer[0] for layer in of_parts], parts),
            at_the_end([layer[1] for layer in of_parts], parts),
        )
        for of_parts in zip(*(read.layers for read, _, _ in parts), strict=True)
    ]
    # (R, T) as the keys of one head with a width of 1
    masks = at_the_end([read.mask[:, None, :, None] for read, _, _ in parts], parts)
    return Read(layers, masks[:, 0, :, 0])


def at_the_end(tensors: Sequence[Tensor], parts: Sequence[tuple[Read, Tensor, Tensor]]) -> Tensor:
    """Return (R, groups, T, width) of tensors that have fewer places: what they hold stands last, nothing before it."""
    count, longest = sum(len(rows) for _, rows, _ in parts), max(tensor.shape[2] for tensor in tensors)
    whole = tensors[0].new_zeros(count, tensors[0].shape[1], longest, tensors[0].shape[3])
    for tensor, (_, rows, places) in zip(tensors, parts, strict=True):
        whole[places, :, longest - tensor.shape[2] :] = tensor[rows]
    return whole


class Prefixes:
    """Conversations that may go on, by their streams: which tokens were read of each, and where they lie.

    Args:
        version: Of the weights that have read them, and their precision.
        device: Where they lie, which bounds how many there are: those beyond that are read anew.
    """

    def __init__(self, version: tuple[int, str], device: torch.device) -> None:
        self.version = version
        self._left = MOST_BYTES * (1 if device.type == "cpu" else ON_ACCELERATORS)
        self._kept: dict[int | None, tuple[tuple[int, ...], Read, int]] = {}

    def keep(self, streams: Sequence[int | None], tokens: Sequence[tuple[int, ...]], read: Read) -> None:
        """Keep rows of which these tokens were read, as long as there is room."""
        self._left -= read.size
        if self._left >= 0:
            for row, (stream, of_row) in enumerate(zip(streams, tokens, strict=True)):
                self._kept[stream] = of_row, read, row

    def has_begun(self, stream: int | None, prompt: Sequence[int]) -> bool:
        """Whether what was kept under a stream is the beginning of a prompt, and not all of it."""
        tokens, *_ = self._kept.get(stream, ((),))
        return 0 < len(tokens) < len(prompt) and tokens == tuple(prompt[: len(tokens)])

    def take(self, streams: Sequence[int | None]) -> Read:
        """Return rows in this order."""
        found = [self._kept[stream] for stream in streams]
        reads = {id(read): read for _, read, _ in found}
        device = found[0][1].mask.device
        parts = []
        for key, read in reads.items():
            places = [place for place, (_, other, _) in enumerate(found) if id(other) == key]
            rows = [found[place][2] for place in places]
            parts.append((read, torch.tensor(rows, device=device), torch.tensor(places, device=device)))
        return joined(parts)
