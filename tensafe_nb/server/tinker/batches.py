"""A forward_backward of the protocol as an operation of ours, and its result as the protocol tells it.

The protocol's losses are sums over tokens. So are our policy losses, which are never divided: each of theirs is one of
them with other keywords.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.batch import IGNORE, Array, BatchData
from tensafe_nb.protocol.operations import Forward, ForwardBackward
from tensafe_nb.protocol.results import ForwardBackwardResult, ForwardResult
from tensafe_nb.server.tinker.messages import MESSAGES, array_of, batched, tokens_of

Config = Mapping[str, float | str]
UNITS = {"example_id": "example_ids", "unit_id": "unit_ids"}  # of privacy: their names here
CLIP = (0.8, 1.2)  # of the ratio itself, where the protocol's ppo clips it by default


@dataclass(frozen=True, slots=True)
class PolicyForm:
    """How a loss of the protocol is said here.

    Attributes:
        name: Of our loss.
        inputs: What it needs beside the targets: by the protocol's name, ours.
        keywords: Made from its settings.
        settings: Those that it has, with their defaults.
    """

    name: str
    inputs: Mapping[str, str]
    keywords: Callable[[dict[str, Any]], dict[str, Any]]
    settings: Mapping[str, float | None]


SAMPLED = {"logprobs": "old_logprobs", "advantages": "advantages"}
THRESHOLDS = dict(zip(("clip_low_threshold", "clip_high_threshold"), CLIP, strict=True))


def clipping(settings: dict[str, Any]) -> dict[str, Any]:
    """Return policy_clip's bounds, which are distances from 1, of bounds of the ratio."""
    low, high = settings["clip_low_threshold"], settings["clip_high_threshold"]
    return {"clip_low": 1 - low, "clip_high": high - 1, "dual_clip": None}


FORMS = {
    # −Σ w · log π, which is REINFORCE with the weights for advantages
    "cross_entropy": PolicyForm("policy_reinforce", {"weights": "advantages"}, lambda _: {}, {}),
    "importance_sampling": PolicyForm("policy_is", SAMPLED, lambda _: {}, {}),
    "ppo": PolicyForm("policy_clip", SAMPLED, clipping, THRESHOLDS),
    "gspo": PolicyForm(
        "policy_clip",
        SAMPLED | {"sequence_ratio_mask": "weights"},
        lambda settings: clipping(settings) | {"ratio": "sequence"},
        THRESHOLDS,
    ),
    "cispo": PolicyForm(
        "policy_cispo",
        SAMPLED,
        lambda s: {"ratio_min": s["clip_low_threshold"], "ratio_max": s["clip_high_threshold"]},
        {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
    ),
    # −Σ (A · log π − β/2 · (log π − q)²): the penalty k2 towards q
    "dro": PolicyForm(
        "policy_reinforce",
        {"logprobs": "ref_logprobs", "advantages": "advantages"},
        lambda settings: {"kl": {"coef": settings["beta"], "estimator": "k2"}},
        {"beta": None},
    ),
}


@dataclass(frozen=True, slots=True)
class DatumRows:
    """Where the values of the data lie in a batch: of each, its first row, how many there are, and their length."""

    places: tuple[tuple[int, int, int], ...]
    has_columns: tuple[bool, ...]  # its targets are (N, K): a row for each of K

    def of(self, values: Array) -> list[Array]:
        """Return each datum's part, (N,) or (N, K), of values (B, T)."""
        return [
            values[first : first + count, :length].T if wide else values[first, :length]
            for (first, count, length), wide in zip(self.places, self.has_columns, strict=True)
        ]


def operation_of(request: Any) -> tuple[ForwardBackward | Forward, DatumRows]:
    """Return the operation that a ForwardBackwardRequest asks for, and where in its batch each datum lies.

    Raises:
        ValidationError: Something in it does not fit; says in which datum.
    """
    if request.loss_fn not in FORMS:
        raise ValidationError(
            f"There is no loss {as_given(request.loss_fn)} on this server. It has {', '.join(FORMS)}; any other is a "
            f"function of the log-probabilities: forward_backward_custom."
        )
    form = FORMS[request.loss_fn]
    keywords = form.keywords(settings_of(request, form))
    if not request.data:
        raise ValidationError("forward_backward() was given no data.")
    batch, rows = batch_of(request.data, form)
    if request.forward_only:
        return Forward(batch, form.name, keywords, return_logprobs=True), rows
    return ForwardBackward(batch, form.name, keywords, return_logprobs=True), rows


def settings_of(request: Any, form: PolicyForm) -> dict[str, Any]:
    """Return a loss's settings, its own where nothing was given."""
    given: dict[str, float | str] = dict(request.loss_fn_config)
    for name, value in request.loss_fn_config_v2.items():
        given[name] = value.number if value.WhichOneof("value") == "number" else value.text
    unknown = sorted(given.keys() - form.settings.keys())
    if unknown:
        raise ValidationError(
            f"The loss {request.loss_fn!r} has no setting {as_given(unknown[0])}; it has "
            f"{sorted(form.settings) or 'none'}."
        )
    settings = {**form.settings, **given}
    for name, value in settings.items():
        if not isinstance(value, float | int):
            raise ValidationError(f"loss_fn_config[{name!r}] of {request.loss_fn!r} is a number to be given.")
    return settings


def batch_of(data: Any, form: PolicyForm) -> tuple[BatchData, DatumRows]:
    """Return the data as one padded batch, in which every target is labelled."""
    read = [datum_of(datum, number, form) for number, datum in enumerate(data)]
    length, count = max(len(tokens) for tokens, _, _ in read), sum(len(t["labels"]) for _, t, _ in read)
    ids, mask = np.zeros((count, length), np.int64), np.zeros((count, length), np.int64)
    extras: dict[str, Array] = {"weights": np.zeros((count, length), np.float32)}
    extras |= {name: np.zeros((count, length), np.float32) for name in form.inputs.values()}
    labels, units = np.full((count, length), IGNORE), {name: [] for name in UNITS.values()}  # type: ignore[var-annotated]
    places, wide, row = [], [], 0
    for tokens, entries, unit in read:
        here, size = slice(row, row + len(entries["labels"])), len(tokens)
        ids[here, :size], mask[here, :size], labels[here, :size] = tokens, 1, entries["labels"]
        extras["weights"][here, :size] = 1.0
        for name in form.inputs.values():
            extras[name][here, :size] = entries[name]
        for name, value in unit.items():
            units[name] += [value] * len(entries["labels"])
        places.append((row, here.stop - row, size))
        wide.append(bool(entries["wide"]))
        row = here.stop
    for name, values in units.items():
        if values and len(values) != count:
            raise ValidationError("Some data say whose they are, and others do not: give all an example_id.")
        if values:
            extras[name] = np.array(values, np.int64)
    batch = BatchData(ids, mask, labels, extras, labels_are_shifted=True)
    return batch, DatumRows(tuple(places), tuple(wide))


def datum_of(datum: Any, number: int, form: PolicyForm) -> tuple[list[int], dict[str, Any], dict[str, int]]:
    """Return a datum's tokens, its entries (K, N) by our names, and whose it is."""
    tokens = tokens_of(datum.model_input)
    found = {name: array_of(tensor, name) for name, tensor in datum.loss_fn_inputs.items()}
    if not tokens:
        raise ValidationError(f"Datum {number} has an empty model_input.")
    if "target_tokens" not in found:
        raise ValidationError(f"Datum {number} has no target_tokens among its loss_fn_inputs.")
    targets = found["target_tokens"]
    if targets.shape[:1] != (len(tokens),) or targets.ndim > 2 or targets.dtype.kind != "i":
        raise ValidationError(
            f"Datum {number}: target_tokens are whole numbers, one for each of the {len(tokens)} tokens of "
            f"model_input, not {targets.dtype} of shape {targets.shape}."
        )
    if (targets < 0).any():
        raise ValidationError(f"Datum {number}: target_tokens holds a number below 0.")
    entries: dict[str, Any] = {"wide": targets.ndim == 2}
    entries["labels"] = np.atleast_2d(targets.T)  # (K, N)
    for name, ours in form.inputs.items():
        if name not in found and name != "weights":
            raise ValidationError(
                f"Datum {number} has no {name} among its loss_fn_inputs, which this loss needs."
            )
        values = found.get(name, np.ones(targets.shape, np.float32))
        if values.shape != targets.shape:
            raise ValidationError(
                f"Datum {number}: {name} has shape {values.shape}, and target_tokens {targets.shape}."
            )
        entries[ours] = np.atleast_2d(values.T)
    left = found.keys() - form.inputs.keys() - UNITS.keys() - {"target_tokens", "weights"}
    if left:
        raise ValidationError(
            f"Datum {number}: nothing here reads loss_fn_inputs {sorted(left)}. This loss takes "
            f"{sorted({'target_tokens', *form.inputs})}, and private training example_id or unit_id."
        )
    if "weights" in found and "weights" not in form.inputs and not (found["weights"] == 1).all():
        raise ValidationError(f"Datum {number}: this loss takes no weights; mask by advantages of 0.")
    return tokens, entries, {UNITS[n]: int(found[n].reshape(-1)[0]) for n in UNITS if n in found}


def output_of(result: ForwardBackwardResult | ForwardResult, rows: DatumRows) -> bytes:
    """Return the ForwardBackwardOutput of a result: the loss as a sum, and each target's log-probability."""
    assert result.logprobs is not None
    records, each = [], rows.of(result.logprobs)
    start = 0
    for end in [*ends_of([array.shape[1:] for array in each]), len(each)]:
        if end > start:  # what lies together agrees in all but its length
            records.append(
                MESSAGES["ArrayRecord"](
                    type_tag="ArrayRecord",
                    fields={"logprobs": batched(each[start:end])},
                    num_datums=end - start,
                )
            )
        start = end
    output = MESSAGES["ForwardBackwardOutput"](
        loss_fn_output_type="ArrayRecord", loss_fn_outputs=records, metrics={"loss:sum": result.loss}
    )
    return bytes(output.SerializeToString())


def ends_of(kinds: list[tuple[int, ...]]) -> list[int]:
    """Return where in a list something of another kind begins."""
    return [index for index in range(1, len(kinds)) if kinds[index] != kinds[index - 1]]
