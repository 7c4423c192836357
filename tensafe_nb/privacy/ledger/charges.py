"""Charges to the privacy ledger, their receipts, the state of an account, and the records of the log behind it."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tensafe_nb.display import as_given
from tensafe_nb.errors import DPBudgetExceededError, ValidationError
from tensafe_nb.privacy import accounting
from tensafe_nb.privacy.tickets import DrawRegister


@dataclass(frozen=True, slots=True)
class LedgerRecord:
    """A record of the log that concerns the ledger.

    Attributes:
        seq: Its number in the log.
        record_hash: Its hash.
        at: Unix seconds.
        dp: What it says.
    """

    seq: int
    record_hash: str
    at: float
    dp: Mapping[str, Any]


class LedgerLog(Protocol):
    """Where the ledger's records are, in one order for all accounts of a tenant.

    Attributes:
        draws: The Poisson draws that were made for its accounts.
    """

    draws: DrawRegister

    def records(self) -> Sequence[LedgerRecord]:
        """Return all records, verified; what was appended meanwhile is read, what was read before is not again.

        Raises:
            LedgerError: The log was altered or cut, or cannot be read.
        """

    def append(
        self,
        dp: Mapping[str, Any],
        *,
        training_client_id: str | None,
        dp_metrics: Mapping[str, Any] | None = None,
    ) -> LedgerRecord:
        """Write a record, and return when it is on the disk."""

    def held(self) -> AbstractContextManager[None]:
        """Keep other threads and processes from charging."""

    def table(self, account: str) -> tuple[bytes, str] | None:
        """Return the participation table of an account and its content hash, opened; None without one."""

    def keep_table(self, account: str, data: bytes) -> str:
        """Seal the participation table of an account, and return its content hash when it is on the disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """What one step costs.

    Attributes:
        mode: "poisson" or "worst_case".
        noise_multiplier: Sigma.
        max_grad_norm: C.
        expected_batch_size: L.
        dataset_size: N; needed for "poisson".
        participants: For "worst_case": how often each unit, by its id, is in the step.
        unit: What a privacy unit is: "example", "user", "prompt group".
        noise_source: Which generator the noise comes from, with its version.
        sampling: The evidence for the mode: "toolkit sampler", "client-attested", "example ids".
        step: The number of the client's step that this pays for.
        training_client_id: Who takes it.
    """

    mode: Literal["poisson", "worst_case"]
    noise_multiplier: float
    max_grad_norm: float
    expected_batch_size: int
    dataset_size: int | None = None
    participants: Mapping[str, int] = field(default_factory=dict, repr=False)
    unit: str = "example"
    noise_source: str
    sampling: str
    step: int
    training_client_id: str

    def __post_init__(self) -> None:
        if self.mode not in ("poisson", "worst_case"):
            raise ValidationError(f'mode is "poisson" or "worst_case"; it is {as_given(self.mode)}.')
        if self.mode == "poisson" and self.dataset_size is None:
            raise ValidationError(
                'sampling="poisson" needs dataset_size, the declared number of privacy units. It is never taken from '
                "the data: declare it in DPConfig."
            )
        accounting.mu_squared_of(1, self.noise_multiplier)  # refuses what is no noise multiplier

    @property
    def sample_rate(self) -> float | None:
        """The probability q = min(1, L/N) with which a unit is in a draw; None for worst-case steps."""
        if self.mode == "worst_case" or self.dataset_size is None:
            return None
        return accounting.sample_rate(self.expected_batch_size, self.dataset_size)


@dataclass(frozen=True, slots=True)
class Charged:
    """A step that is paid for: it may be taken.

    Attributes:
        epsilon_before: Of the account.
        total_epsilon: Of the account, with this step.
        seq: Number of the record.
        record_hash: Hash of the record.
    """

    epsilon_before: float
    total_epsilon: float
    seq: int
    record_hash: str

    @property
    def epsilon_spent(self) -> float:
        """By this step."""
        return 0.0 if math.isinf(self.epsilon_before) else self.total_epsilon - self.epsilon_before


@dataclass(frozen=True, slots=True)
class Spent:
    """How an account stands.

    Attributes:
        account: Its name.
        joined: Names of the accounts that were joined to it.
        total_epsilon: Of all of them together; infinite when `void` says why.
        delta: At which epsilon is stated.
        accountant: Whose bound it is: "rdp", "prv" or "gaussian".
        steps: Steps charged.
        mu: Largest mu of a unit over the worst-case steps.
        void: Why there is no guarantee; None while there is one.
        voids: Every event that made it void: (reason, unix seconds).
        head: {"account", "seq", "record_hash"} of the newest record; None without one.
        opened_at: When the first record was written; None without one.
    """

    account: str
    joined: tuple[str, ...]
    total_epsilon: float
    delta: float
    accountant: str
    steps: int
    mu: float
    void: str | None
    voids: tuple[tuple[str, float], ...]
    head: Mapping[str, Any] | None
    opened_at: float | None

    @property
    def scope(self) -> str:
        """What the account covers, in words."""
        kind, _, name = self.account.partition(":")
        alone = (
            f"the training client {name} and everything forked from it"
            if kind == "client"
            else f"dataset_id {name!r}"
        )
        return alone + (f"; joined to it for good: {', '.join(self.joined)}" if self.joined else "")


def account_name(dataset_id: str | None, training_client_id: str) -> str:
    """Return the name of an account: a data set's, or that of a client and everything forked from it."""
    return f"client:{training_client_id}" if dataset_id is None else f"dataset:{dataset_id}"


def entry_of(
    charge: Charge, account: str, after: float, *, delta: float, accountant_type: str
) -> dict[str, Any]:
    """Return what the record of a charge says: everything that epsilon is computed from."""
    return {
        "what": "charge",
        "account": account,
        "mode": charge.mode,
        "sigma": float(charge.noise_multiplier),
        "C": float(charge.max_grad_norm),
        "L": charge.expected_batch_size,
        "N": charge.dataset_size,
        "q": charge.sample_rate,
        "delta": delta,
        "unit": charge.unit,
        "noise_source": charge.noise_source,
        "sampling": charge.sampling,
        "accountant": accountant_type,
        "accountant_version": accounting.accountant_version(),
        "epsilon_after": finite(after),
        "step": charge.step,
    }


def metrics_of(charge: Charge, before: float, after: float, delta: float) -> dict[str, Any]:
    """Return what the log's listing shows of a charge, by the names of `DPMetrics`: the operator's view stays empty."""
    spent = 0.0 if math.isinf(before) else after - before
    return {
        "noise_applied": charge.noise_multiplier > 0,
        "epsilon_spent": finite(spent),
        "total_epsilon": finite(after),
        "delta": delta,
        "grad_norm_before_clip": None,
        "grad_norm_after_clip": None,
        "num_clipped": None,
    }


def exceeded(
    charge: Charge, before: float, target: float, after: float, *, left_out: int
) -> DPBudgetExceededError:
    """Return the error for a step that does not fit into the budget."""
    others = f" (with {left_out} draws that were left out before it)" if left_out else ""
    return DPBudgetExceededError(
        f"Step {charge.step}{others} would bring epsilon to {after:.4g}; the budget is {target:g} and {before:.4g} is "
        f"spent. No weight has moved and nothing was charged. Save the state, or raise target_epsilon.",
        details={
            "current_epsilon": before,
            "max_epsilon": target,
            "next_epsilon": after,
            "step": charge.step,
        },
    )


def finite(value: float) -> float | None:
    """Return a number as JSON can hold it: infinity is null."""
    return None if math.isinf(value) else value
