"""What a core says of an adapter that it is going to apply to ciphertexts: shapes, and which weights they are of."""

from dataclasses import dataclass

from tensafe_nb.errors import EncryptionContextError
from tensafe_nb.protocol.codec import tagged


@tagged("encrypted_part")
@dataclass(frozen=True, slots=True)
class EncryptedPart:
    """Modules of one layer that read the same input: one upload serves them all, and their adapters are one stack.

    Attributes:
        name: Names it in requests: "29:q_proj,v_proj".
        layer: Of the model, from 0.
        modules: Their names in that layer, in the order of the stack.
        shape: (d_in, d_out, rank) of the stack.
        widths: Of each module's output.
        exponents: Of the power of two that each module's output is to be multiplied with.
    """

    name: str
    layer: int
    modules: tuple[str, ...]
    shape: tuple[int, int, int]
    widths: tuple[int, ...]
    exponents: tuple[int, ...]


@tagged("encrypted_offer")
@dataclass(frozen=True, slots=True)
class EncryptedOffer:
    """What is going to be applied, once there is a connection.

    Attributes:
        parts: By layer.
        policy_version: Of the weights.
        base: Hash of the frozen weights that the adapter is for.
        elsewhere: What the training client has trained besides, which these parts leave out.
        depth: How many layers the model has.
    """

    parts: tuple[EncryptedPart, ...]
    policy_version: int
    base: str
    elsewhere: tuple[str, ...]
    depth: int


@tagged("encrypted_connection")
@dataclass(frozen=True, slots=True)
class EncryptedConnection:
    """A connection that was opened, or now serves other weights: its id, and what it serves."""

    connection_id: str
    parts: tuple[EncryptedPart, ...]
    policy_version: int


def stale(served: int, current: int) -> EncryptionContextError:
    """Say that the weights have moved on."""
    return EncryptionContextError(
        f"The adapter was trained on: policy_version {served} was opened, and the client is at {current}. "
        f"Nothing was computed. he.refresh() goes on with the new weights, under the same keys.",
        details={"served": served, "policy_version": current},
    )
