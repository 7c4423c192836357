"""What is kept of what was read: keys and values, so that no token of it is read twice.

That is of conversations that go on, and of beginnings that prompts have in common.
"""

from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_BYTES = 1 << 29  # of keys and values
ON_ACCELERATORS = 8  # times as many
SHARED_FROM = 32  # tokens: what is shorter is neither read once for several prompts nor kept for others
PAYS_FROM = (
    256  # tokens that prompts need not read, from which on reading their beginning first is the quicker
)
SAVES_FROM = 4  # fewer tokens are as quick to read as to fetch
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
        if bool(mask.all()):
            return cls(layers, mask)
        order = mask.argsort(dim=1, stable=True)[:, -int(mask.sum(1).max()) :]
        places = order[:, None, :, None]
        together = [
            (keys.take_along_dim(places, 2), values.take_along_dim(places, 2)) for keys, values in layers
        ]
        return cls(together, mask.gather(1, order))


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    least = min(len(one), len(other))
    if one[:least] == other[:least]:
        return least
    return next(n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


@dataclass(slots=True, eq=False)
class RowRead:
    """Where a sequence that was read lies: a row of a read, of which others may be kept as well."""

    read: Read
    row: int


class Prefixes:
    """Sequences that were read, and may be the beginning of prompts to come.

    They are kept in lexical order, in which a prompt's neighbours are those that share most with it.

    Args:
        version: Of the weights that have read them, and their precision.
        device: Where they lie, which bounds how many there are: those that were used longest ago are let go.
        whole: Prompts go on from whole sequences alone: then what is known of one depends on no other conversation.
    """

    def __init__(self, version: tuple[int, str], device: torch.device, *, whole: bool = False) -> None:
        self.version, self._whole = version, whole
        self._left = MOST_BYTES * (1 if device.type == "cpu" else ON_ACCELERATORS)
        self._order: list[tuple[int, ...]] = []
        self._places: dict[tuple[int, ...], RowRead] = {}
        self._lengths: Counter[int] = Counter()
        self._reads: OrderedDict[int, tuple[Read, set[tuple[int, ...]]]] = OrderedDict()  # last used, last

    def keep(self, sequences: Sequence[tuple[int, ...]], read: Read) -> None:
        """Keep rows of which these tokens were read, in place of those that they go on from, while there is room."""
        if read.size > self._left + sum(other.size for other, _ in self._reads.values()):
            return
        own: set[tuple[int, ...]] = set()
        self._reads[id(read)], self._left = (read, own), self._left - read.size
        for row, tokens in enumerate(sequences):
            at = bisect_left(self._order, tokens)
            before, behind = self._order[max(at - 1, 0) : at], self._order[at : at + 1]
            begins_another = bool(behind) and behind[0][: len(tokens)] == tokens
            if tokens in self._places or (begins_another and not self._whole):
                continue
            self._order.insert(at, tokens)
            self._places[tokens] = RowRead(read, row)
            self._lengths[len(tokens)] += 1
            own.add(tokens)
            if before and tokens[: len(before[0])] == before[0] and not self._whole:
                self._drop(before[0])
        if not own:
            self._left += self._reads.pop(id(read))[0].size
        while self._left < 0:
            for tokens in list(next(iter(self._reads.values()))[1]):
                self._drop(tokens)

    def _drop(self, tokens: tuple[int, ...]) -> None:
        read = self._places.pop(tokens).read
        self._lengths[len(tokens)] -= 1
        del self._order[bisect_left(self._order, tokens)]
        _, others = self._reads[id(read)]
        others.remove(tokens)
        if not others:
            del self._reads[id(read)]
            self._left += read.size

    def known(self, prompt: tuple[int, ...]) -> int:
        """Return how many tokens at the beginning of a prompt were read, all but its last at most."""
        return self._nearest(prompt)[0]

    def _nearest(self, prompt: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        if self._whole:
            lengths = [length for length, count in self._lengths.items() if count and length < len(prompt)]
            beginnings = (prompt[:length] for length in sorted(lengths, reverse=True))
            tokens = next((tokens for tokens in beginnings if tokens in self._places), ())
            return len(tokens), tokens
        at = bisect_left(self._order, prompt)
        found = [(common(tokens, prompt), tokens) for tokens in self._order[max(at - 1, 0) : at + 1]]
        length, tokens = max(found, default=(0, ()))
        return min(length, len(prompt) - 1), tokens

    def take(self, prompts: Sequence[tuple[int, ...]]) -> Read | None:
        """Return how prompts begin, as far as it was read; None where reading all of them takes hardly longer."""
        found = [self._nearest(prompt) for prompt in prompts]
        unread = max(len(prompt) - known for prompt, (known, _) in zip(prompts, found, strict=True))
        if max(map(len, prompts)) - unread < SAVES_FROM or not all(tokens for _, tokens in found):
            return None
        places = [self._places[tokens] for _, tokens in found]
        for place in places:
            self._reads.move_to_end(id(place.read))
        return beginnings(places, [known for known, _ in found])


def beginnings(places: Sequence[RowRead], lengths: Sequence[int]) -> Read:
    """Return the first tokens of sequences, so many of each, as one read: they stand last, nothing before them."""
    count, longest, device = len(places), max(lengths), places[0].read.mask.device

    def room(of: Tensor) -> Tensor:
        return of.new_zeros(count, of.shape[1], longest, of.shape[3])

    whole = [(room(keys), room(values)) for keys, values in places[0].read.layers]
    wanted = torch.tensor(lengths, device=device)
    mask = torch.arange(longest, device=device) >= longest - wanted[:, None]
    for read in {id(place.read): place.read for place in places}.values():
        at = [number for number, place in enumerate(places) if place.read is read]
        where, rows = (
            torch.tensor(at, device=device),
            torch.tensor([places[n].row for n in at], device=device),
        )
        begin = read.mask.shape[1] - read.mask.sum(1)[rows]  # all tokens of a row come last
        from_here = begin + wanted[where] - longest
        taken = (from_here[:, None] + torch.arange(longest, device=device)).clamp(0, read.mask.shape[1] - 1)
        own = mask[where][:, None, :, None]
        for layer, of_read in zip(whole, read.layers, strict=True):
            for tensor, source in zip(layer, of_read, strict=True):
                tensor[where] = source[rows].take_along_dim(taken[:, None, :, None], 2) * own
    return Read(whole, mask.to(places[0].read.mask.dtype))
