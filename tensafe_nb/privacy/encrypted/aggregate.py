"""The sum of many members' LoRA updates, added up by a server that can open none of them; the members read the mean.

All members of a cohort share one secret key, and the server has none. The server together with any one member could
open every update; who cannot exclude that needs another protocol. The mean itself still tells something about each
member: clip and add noise on the members' side for a bound on that.

A slot of CKKS is a complex number, and to add is to add both of its parts: each holds a number of its own, so that a
ciphertext holds N of them, not N/2.

The mean of Bs and the mean of As is not the mean of the B·A. Where all members keep the same A and train B alone, it is
(FFA-LoRA, Sun et al. 2024, arXiv:2403.12313): `Layout.of(tensors, frozen=["lora_A"])` sends the Bs, and refuses a
member whose A is another one.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite, prod
from typing import Any, NoReturn

import numpy as np

from tensafe_nb.checks import checked
from tensafe_nb.display import as_given, with_article
from tensafe_nb.errors import EncryptionContextError, ValidationError
from tensafe_nb.privacy.encrypted.envelope import Connection, KeySource, open_bundle
from tensafe_nb.privacy.encrypted.parameters import Parameters, parameters_named
from tensafe_nb.privacy.encrypted.scheme import Tick, Vector, dump, no_tick, numbers, scheme_of, unshared

MOST_MEMBERS = 4096
MOST_PARAMETERS = 2**24
MOST_TOTAL = (
    2.0**13
)  # of a sum: with both parts so large it takes √2·2^13·2^45 of the 2^59 that 60 bits have by sign
GRID = 2.0**-24  # the mean is rounded to multiples of it: values of CKKS are never published raw
Tensors = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Layout:
    """Which tensors are averaged, in what order, and a digest of those that all members have in common.

    Attributes:
        shapes: Of the tensors that are averaged, by name.
        frozen: Parts of the names of tensors that stay as they are and are not sent.
        digest: SHA-256 of the frozen tensors; "" where there is none.
    """

    shapes: Mapping[str, tuple[int, ...]]
    frozen: tuple[str, ...] = ()
    digest: str = ""

    @classmethod
    def of(cls, tensors: Tensors, frozen: Sequence[str] | str = ()) -> "Layout":
        """Return the layout of tensors by name, of which those are frozen whose name has one of these parts in it.

        Raises:
            ValidationError: Nothing is left to average, or it is too much.
        """
        marks = (frozen,) if isinstance(frozen, str) else tuple(frozen)
        arrays = _arrays(tensors)
        shapes = {n: arrays[n].shape for n in sorted(arrays) if not any(m in n for m in marks)}
        layout = cls(shapes, marks, _digest(arrays, marks))
        if not 1 <= layout.size <= MOST_PARAMETERS:
            raise ValidationError(
                f"There are {layout.size} numbers to average; 1 to {MOST_PARAMETERS} can be."
            )
        if nowhere := [mark for mark in marks if not any(mark in name for name in arrays)]:
            raise ValidationError(
                f"frozen={nowhere!r}: no tensor has this in its name, so that nothing would be compared. The tensors "
                f"that stay as they are belong to the update, too; they are not sent."
            )
        return layout

    @property
    def size(self) -> int:
        """How many numbers are averaged."""
        return sum(map(prod, self.shapes.values()))

    def flat(self, tensors: Tensors) -> Vector:
        """Return the numbers to average in one row.

        Raises:
            ValidationError: Other names or shapes, a frozen tensor that differs, or values that are not finite.
        """
        arrays = _arrays(tensors)
        found = Layout.of(arrays, self.frozen)
        if found.shapes != self.shapes:
            odd = sorted(set(found.shapes.items()) ^ set(self.shapes.items()))
            raise ValidationError(f"The update does not have the cohort's tensors: {odd[0][0]} differs.")
        if found.digest != self.digest:
            raise ValidationError(
                f"The frozen tensors ({', '.join(self.frozen)}) are not those of the cohort, and the mean of the rest "
                f"would belong to no member's model. Start from the same ones, and do not train them."
            )
        flat = np.concatenate([arrays[name].ravel() for name in self.shapes])
        if not np.isfinite(flat).all():
            raise ValidationError("The update has NaN or infinite values. Nothing was encrypted.")
        return flat

    def tensors(self, flat: Vector) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
        """Return the row as tensors by name."""
        sizes = [prod(shape) for shape in self.shapes.values()]
        parts = np.split(flat, np.cumsum(sizes)[:-1])
        return {
            n: part.reshape(s).astype(np.float32)
            for (n, s), part in zip(self.shapes.items(), parts, strict=True)
        }


class Cohort:
    """What the members of a round have in common: their layout, and the secret key. Make a new one for each round.

    Args:
        layout: Of the update.
        members: How many take part; the sum is given out when all of them are in it.
        params: Name of a parameter set for sums.

    Example:
        >>> cohort = Cohort(Layout.of(update), members=3)
        >>> aggregator = Aggregator(cohort.public_bundle())
        >>> members = [CohortMember(cohort.secret_bytes(), number) for number in range(3)]
        >>> for member, update in zip(members, updates):
        ...     aggregator.add(member.encrypt(update))
        >>> mean = members[0].decrypt(aggregator.total())
    """

    def __init__(self, layout: Layout, members: int, params: str = "n8192-sum") -> None:
        if type(members) is not int or not 2 <= members <= MOST_MEMBERS:
            raise ValidationError(f"A cohort has 2 to {MOST_MEMBERS} members, not {members!r}.")
        if not isinstance(layout, Layout):
            raise ValidationError(
                f"A cohort agrees on a Layout: Layout.of(update). This is {with_article(type(layout).__name__)}."
            )
        self.layout, self.members = layout, members
        self.parameters = parameters_named(params, "sum")
        self.connection = Connection()
        scheme = scheme_of(self.parameters)
        self._secret = dump(scheme.seal.KeyGenerator(scheme.context).secret_key())

    def __reduce__(self) -> NoReturn:
        unshared(
            "A Cohort",
            "its secret key would lie in a file. Give secret_bytes() to members, over a safe line.",
        )

    def __repr__(self) -> str:
        return f"Cohort({self.members} members, {self.layout.size:,} numbers, context {self.connection.context[:8]}…)"

    def public_bundle(self, keys: KeySource | None = None) -> bytes:
        """Return what the server needs: how many numbers and members there are. No key of the scheme is in it.

        Args:
            keys: Wraps the key that authenticates messages; the server then needs the same source.
        """
        fields = {"params": self.parameters.name, "size": self.layout.size, "members": self.members}
        return self.connection.bundle(fields, [], keys)

    def secret_bytes(self) -> bytes:
        """Return what a member needs, the secret key among it: give it to members alone, never to the server."""
        told = {
            "params": self.parameters.name,
            "members": self.members,
            "context": self.connection.context,
            "secret": self.connection.secret.hex(),
            "shapes": {name: list(shape) for name, shape in self.layout.shapes.items()},
            "frozen": list(self.layout.frozen),
            "digest": self.layout.digest,
            "key": self._secret.hex(),
        }
        return json.dumps(told).encode()


class CohortMember:
    """One member of a cohort: encrypts its update, and reads the mean.

    Args:
        secret: `Cohort.secret_bytes()`.
        number: Which member this is, from 0.

    Raises:
        ValidationError: There is no such member.
        EncryptionContextError: `secret` is not what a cohort gives its members.
    """

    def __init__(self, secret: bytes, number: int) -> None:
        try:
            told = json.loads(secret)
            shapes = {name: tuple(shape) for name, shape in told["shapes"].items()}
            self.layout = Layout(shapes, tuple(told["frozen"]), told["digest"])
            self.members: int = told["members"]
            self._connection = Connection(told["context"], bytes.fromhex(told["secret"]))
            key = bytes.fromhex(told["key"])
            self.parameters = parameters_named(told["params"], "sum")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
            raise EncryptionContextError(
                "This is not what Cohort.secret_bytes() gave to its members."
            ) from err
        if type(number) is not int or not 0 <= number < self.members:
            raise ValidationError(f"The cohort's members are 0 to {self.members - 1}, not {number!r}.")
        self.number = number
        self._scheme = scheme_of(self.parameters)
        seal, context = self._scheme.seal, self._scheme.context
        secret_key = self._scheme.secret_key(key)
        self._encryptor, self._decryptor = (
            seal.Encryptor(context, secret_key),
            seal.Decryptor(context, secret_key),
        )
        self._spent = False

    def __reduce__(self) -> NoReturn:
        unshared(
            "A CohortMember", "each copy could encrypt. Make it where it runs, from Cohort.secret_bytes()."
        )

    def __repr__(self) -> str:
        return f"CohortMember({self.number} of {self.members}, {self.layout.size:,} numbers)"

    @checked
    def encrypt(
        self,
        update: Tensors,
        *,
        weight: float = 1.0,
        clip: float | None = None,
        noise_multiplier: float = 0.0,
        tick: Tick = no_tick,
    ) -> bytes:
        """Encrypt this member's update, once.

        Args:
            update: Arrays by name: what training changed, or the tensors themselves.
            weight: In (0, 1]: how much this member counts, as its rows over the most that a member may have. The
                server does not see it either.
            clip: C: an update whose L2 norm is larger is scaled down to it.
            noise_multiplier: σ. Each member adds N(0, σ²C²/K), so that the sum of K honest ones has noise of σC. It
                needs `clip`, and members that count alike.
            tick: Called as `tick(done, total)` between ciphertexts. If it raises, nothing was encrypted, and the member
                may do so again.

        Raises:
            ValidationError: The update, or another argument, does not fit.
        """
        if self._spent:
            raise ValidationError(
                "This member's update was encrypted already. A round has one of each member."
            )
        if not 0 < weight <= 1:
            raise ValidationError(
                f"weight= lies in (0, 1]: this member's rows over the most there may be. Not {weight!r}."
            )
        flat = self.layout.flat(update)
        if clip is not None:
            if not (isfinite(clip) and clip > 0):
                raise ValidationError(f"clip= is a positive norm, not {clip!r}.")
            flat = flat * min(1.0, clip / max(float(np.linalg.norm(flat)), 1e-300))
        if noise_multiplier:
            if clip is None or weight != 1 or not (isfinite(noise_multiplier) and noise_multiplier > 0):
                raise ValidationError(
                    "noise_multiplier= is positive, and needs clip=, which bounds what it hides, and weight=1, since "
                    "a weight would tell on its own."
                )
            flat = flat + _noise(len(flat), noise_multiplier * clip / self.members**0.5)
        if (largest := float(np.abs(flat).max())) * self.members >= MOST_TOTAL:
            raise ValidationError(
                f"A value of {largest:.3g} is too large: {self.members} such would leave the range of {MOST_TOTAL:g}."
            )
        row = np.zeros(_ciphertexts(len(flat), self.parameters) * self.parameters.degree)
        row[: len(flat)], row[len(flat)] = weight * flat, weight
        parts: list[bytes] = []
        rows = row.view(np.complex128).reshape(-1, self.parameters.slots)
        for slots in rows:
            tick(len(parts), len(rows))
            plain = self._scheme.encode(slots, 0, self.parameters.scale)
            parts.append(dump(self._encryptor.encrypt_symmetric(plain)))
        self._spent = True
        return self._connection.seal("update", self.number, {}, parts)

    def decrypt(
        self, total: bytes, *, tick: Tick = no_tick
    ) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
        """Return the mean of all members' updates, rounded to multiples of 2^-24, as float32 by name.

        Args:
            total: What `Aggregator.total` returned.
            tick: Called as `tick(done, total)` between ciphertexts.

        Raises:
            EncryptionContextError: It is not the total of this round, or was altered.
        """
        message = self._connection.open(total, "total")
        if message.sequence != self.members or len(message.parts) != _ciphertexts(
            self.layout.size, self.parameters
        ):
            raise EncryptionContextError("The total does not hold the updates of all members.")
        rows: list[Vector] = []
        for part in message.parts:
            tick(len(rows), len(message.parts))
            plain = self._scheme.seal.Plaintext()
            self._decryptor.decrypt(self._scheme.ciphertext(part, 0), plain)
            rows.append(self._scheme.decode_complex(plain).view(np.float64))
        row = np.concatenate(rows)
        weight = row[self.layout.size]
        if not 0 < weight <= self.members + 1e-3:
            raise EncryptionContextError("The total does not decrypt: it was made with other keys.")
        return self.layout.tensors(np.round(row[: self.layout.size] / weight / GRID) * GRID)


class Aggregator:
    """The server of a round: adds up what it cannot read. It holds no key of the scheme.

    Args:
        bundle: What `Cohort.public_bundle` returned.
        keys: Opens the key that authenticates messages, if the cohort wrapped it.

    Raises:
        EncryptionContextError: The bundle is not whole.
    """

    def __init__(self, bundle: bytes, *, keys: KeySource | None = None) -> None:
        self._connection, message = open_bundle(bundle, keys)
        self.parameters = parameters_named(message.fields.get("params"), "sum")
        self.members = message.number("members", 2, MOST_MEMBERS)
        self._count = _ciphertexts(message.number("size", 1, MOST_PARAMETERS), self.parameters)
        self._scheme = scheme_of(self.parameters)
        self._evaluator = self._scheme.seal.Evaluator(self._scheme.context)
        self._sum: list[Any] = []
        self._added: set[int] = set()

    def __reduce__(self) -> NoReturn:
        unshared(
            "An Aggregator", "two could give out sums of different members. Make one, from public_bundle()."
        )

    def __repr__(self) -> str:
        return f"Aggregator({len(self._added)} of {self.members} members, holds no key of the scheme)"

    def add(self, update: bytes, *, tick: Tick = no_tick) -> None:
        """Add one member's update.

        Args:
            update: What `CohortMember.encrypt` returned.
            tick: Called as `tick(done, total)` between ciphertexts. If it raises, the sum is as it was.

        Raises:
            EncryptionContextError: It was altered, is of another round or shape, or that member's is in already.
        """
        most = 2**16 + self._count * (self.parameters.ciphertext_bytes(self.parameters.levels) + 4)
        message = self._connection.open(update, "update", most=most)
        if message.sequence in self._added or not 0 <= message.sequence < self.members:
            raise EncryptionContextError(
                f"The update of member {message.sequence} is in already, or there is no such."
            )
        if len(message.parts) != self._count:
            raise EncryptionContextError(
                f"The update has {len(message.parts)} ciphertexts; this round's have {self._count}."
            )
        # all are looked at before any is added: a refused update leaves the sum as it was
        parts: list[Any] = []
        for part in message.parts:
            tick(len(parts), len(message.parts))
            parts.append(self._scheme.ciphertext(part, 0))
        for total, part in zip(self._sum, parts, strict=True) if self._sum else ():
            self._evaluator.add_inplace(total, part)
        self._sum = self._sum or parts
        self._added.add(message.sequence)

    def total(self) -> bytes:
        """Return the sum, when every member is in it: before that it would show a few of them.

        Raises:
            ValidationError: Members are missing.
        """
        if missing := sorted(set(range(self.members)) - self._added):
            raise ValidationError(
                f"Updates of members {missing[:10]} are missing; a part of a sum is not given out."
            )
        return self._connection.seal("total", self.members, {}, [dump(part) for part in self._sum])


def _ciphertexts(size: int, parameters: Parameters) -> int:
    return ceil(
        (size + 1) / parameters.degree
    )  # two numbers in a slot; one more than the numbers: the weight


def _arrays(tensors: Tensors) -> dict[str, Vector]:
    if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
        raise ValidationError(
            f"Updates are arrays by name, as of tc.read_adapter().tensors, not {as_given(tensors)}."
        )
    return {
        name: numbers(f"The tensor {as_given(name)} of an update has numbers", tensors[name])
        for name in tensors
    }


def _noise(count: int, standard_deviation: float) -> Vector:
    import torch

    from tensafe_nb.privacy.noise import gaussian

    (drawn,) = gaussian([torch.empty(count, dtype=torch.float64)], standard_deviation)
    return drawn.numpy()


def _digest(tensors: Tensors, marks: Sequence[str]) -> str:
    names = sorted(name for name in tensors if any(mark in name for mark in marks))
    if not names:
        return ""
    digest = hashlib.sha256()
    for name in names:
        values = np.ascontiguousarray(tensors[name], dtype="<f4")
        digest.update(json.dumps([name, values.shape]).encode() + values.tobytes())
    return digest.hexdigest()
