"""The privacy statement: the claims that may be made about an account, as Markdown and as JSON, from one object."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tensafe_nb.config import DPConfig
from tensafe_nb.display import as_markdown
from tensafe_nb.privacy.ledger.account import Ledger
from tensafe_nb.privacy.ledger.book import ChargedGroup, LedgerAccount
from tensafe_nb.privacy.ledger.charges import finite
from tensafe_nb.protocol.codec import tagged

ADJACENCY = {
    "poisson": "two data sets are neighbours if one has one {unit} more than the other",
    "worst_case": "two data sets are neighbours if the gradients of one {unit} are zero in the other; which batch "
    "holds what stays the same",
}
OUTSIDE = (
    "Losses, gradient norms, clip counts, rollouts and rewards that were shown while training: they are the operator's "
    "view, and epsilon does not cover them. So is what holds them in the home folder, for its owner alone: event log, "
    "rollouts, pictures, and whatever forwards or mirrors events.",
    "The ledger's own tables and the audit log, which stay in the home folder too. What is released is the model: "
    "checkpoints with their metadata and names, exports, pulled artifacts, and this statement.",
    "How long steps took, and with it the times at which checkpoints were saved.",
    "Other runs and other accounts on the same data; each adds to what is known about a unit.",
    "Stopping early, choosing a checkpoint, or choosing epsilon by a metric computed on the private data.",
    "Hyperparameter search on the same data outside this account.",
    "The machine or server that trained: it saw the raw batches.",
    "Floating-point arithmetic beyond the hardening of the noise, which is added in float64 and rounded once.",
)


@tagged("privacy_mechanism")
@dataclass(frozen=True, slots=True)
class Mechanism:
    """Steps that were charged alike.

    Attributes:
        account: Whose.
        mode: "poisson" or "worst_case".
        sampling: The evidence for it.
        unit: What a privacy unit is.
        dataset_size: N; None where it is not needed.
        expected_batch_size: L.
        sample_rate: q; None for worst-case steps.
        noise_multiplier: Sigma.
        max_grad_norm: C.
        steps: How many.
        mu: Largest mu of a unit over worst-case steps; None for Poisson steps and where it is infinite.
        noise_source: Which generator, with its version.
        accountant_version: Of the accountant when they were charged.
    """

    account: str
    mode: str
    sampling: str
    unit: str
    dataset_size: int | None
    expected_batch_size: int
    sample_rate: float | None
    noise_multiplier: float
    max_grad_norm: float
    steps: int
    mu: float | None
    noise_source: str
    accountant_version: str

    @classmethod
    def of(cls, account: str, group: ChargedGroup) -> "Mechanism":
        """Return how a group of steps of an account was charged."""
        found = group.mechanism
        return cls(
            account=account,
            mode=found["mode"],
            sampling=found["sampling"],
            unit=found["unit"],
            dataset_size=found["N"],
            expected_batch_size=found["L"],
            sample_rate=found["q"],
            noise_multiplier=found["sigma"],
            max_grad_norm=found["C"],
            steps=len(group.hashes),
            mu=finite(math.sqrt(group.mu_squared)) if found["mode"] == "worst_case" else None,
            noise_source=found["noise_source"],
            accountant_version=found["accountant_version"],
        )


@tagged("privacy_statement")
@dataclass(frozen=True, slots=True)
class PrivacyStatement:
    """What may be said about a privacy account at one moment.

    In JSON and here an infinite epsilon is None, and `void` says why.

    Attributes:
        account: The account.
        scope: What it covers, in words.
        joined: Accounts that were joined to it.
        opened_at: Unix seconds of the first record; None without one.
        made_at: Unix seconds of this statement.
        unit: What a privacy unit is.
        adjacency: What two neighbouring data sets differ by.
        steps: Steps charged.
        delta: Of every epsilon here.
        epsilon: The claimed one.
        claimed_by: The accountant whose bound is claimed.
        epsilon_rdp: By RDP.
        epsilon_prv: By PRV, where all steps are Poisson steps.
        epsilon_gaussian: Exact, where all steps are worst-case steps.
        epsilon_replace_one: When one unit is replaced by another.
        target_epsilon: The budget of the training client that asks.
        mechanisms: What was charged.
        ledger_head: {"account", "seq", "record_hash"} of the newest record.
        void: Every event that made it void: (reason, unix seconds).
        outside: What epsilon does not cover.
    """

    account: str
    scope: str
    joined: tuple[str, ...]
    opened_at: float | None
    made_at: float
    unit: str
    adjacency: tuple[str, ...]
    steps: int
    delta: float
    epsilon: float | None
    claimed_by: str
    epsilon_rdp: float | None
    epsilon_prv: float | None
    epsilon_gaussian: float | None
    epsilon_replace_one: float | None
    target_epsilon: float | None
    mechanisms: tuple[Mechanism, ...]
    ledger_head: Mapping[str, Any] | None
    void: tuple[tuple[str, float], ...]
    outside: tuple[str, ...] = OUTSIDE

    @classmethod
    def of(cls, ledger: Ledger, config: DPConfig) -> "PrivacyStatement":
        """Return the statement of a ledger's account, as it stands now.

        A ledger that cannot be read gives a statement that is void and says so.
        """
        spent, together = ledger.snapshot()
        mechanisms = tuple(
            Mechanism.of(name, group)
            for name, account in together.items()
            for group in account.groups.values()
            if group.hashes
        )
        modes = {found.mode for found in mechanisms} or {config.sampling}
        by = Epsilons() if spent.void else Epsilons.of(ledger, together, modes)
        units = sorted({found.unit for found in mechanisms}) or ["example"]
        return cls(
            account=spent.account,
            scope=spent.scope,
            joined=spent.joined,
            opened_at=spent.opened_at,
            made_at=time.time(),
            unit=", ".join(units),
            adjacency=tuple(
                text.format(unit=" or ".join(units)) for mode, text in ADJACENCY.items() if mode in modes
            ),
            steps=spent.steps,
            delta=spent.delta,
            epsilon=finite(spent.total_epsilon),
            claimed_by=spent.accountant,
            epsilon_rdp=by.rdp,
            epsilon_prv=by.prv,
            epsilon_gaussian=by.gaussian,
            epsilon_replace_one=by.replace_one,
            target_epsilon=config.target_epsilon,
            mechanisms=mechanisms,
            ledger_head=spent.head,
            void=spent.voids,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, for `json.dumps`."""
        return asdict(self) | {"ledger_head": None if self.ledger_head is None else dict(self.ledger_head)}

    def to_markdown(self) -> str:
        """Return it as Markdown."""
        return "\n".join(markdown_of(self))

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def __str__(self) -> str:
        return self.to_markdown()


@dataclass(frozen=True, slots=True)
class Epsilons:
    """Epsilon of one account by every accountant that may be asked; None where one may not."""

    rdp: float | None = None
    prv: float | None = None
    gaussian: float | None = None
    replace_one: float | None = None

    @classmethod
    def of(cls, ledger: Ledger, together: Mapping[str, LedgerAccount], modes: set[str]) -> "Epsilons":
        """Ask RDP unless all steps are worst-case steps, the exact formula where they are, PRV where none is."""
        poisson, worst_case = modes == {"poisson"}, modes == {"worst_case"}
        return cls(
            rdp=None if worst_case else ledger.computed(together, "rdp").value,
            prv=ledger.computed(together, "prv").value if poisson else None,
            gaussian=ledger.computed(together).value if worst_case else None,
            replace_one=ledger.computed(together, adjacency="replace_one").value,
        )


# Markdown

NAMES = {"rdp": "RDP", "prv": "PRV", "gaussian": "the exact Gaussian formula"}


def markdown_of(statement: PrivacyStatement) -> Iterator[str]:
    """Yield the lines of a statement: claim, particulars, mechanisms, reasons for being void, limits."""
    yield "**Privacy statement**"
    yield ""
    if statement.void:
        yield "**Void: there is no guarantee, epsilon is infinite.** The reasons are below."
    elif not statement.steps:
        yield "Nothing was trained yet, and nothing is spent: **ε = 0**."
    else:
        yield f"**ε = {statement.epsilon:.4g} at δ = {statement.delta:g}**, by {claimed_by(statement)}."
    yield ""
    yield "| | |"
    yield "|---|---|"
    yield from (f"| {name} | {as_markdown(value)} |" for name, value in particulars_of(statement))
    yield ""
    yield from table_of(statement.mechanisms)
    yield from _list_of("Void", [f"{_when(at)}: {as_markdown(reason)}" for reason, at in statement.void])
    yield from _list_of("Not covered", statement.outside)


def claimed_by(statement: PrivacyStatement) -> str:
    """Say by what; a claim that was made once is not lowered when a tighter accountant is asked later."""
    computed = {
        "rdp": statement.epsilon_rdp,
        "prv": statement.epsilon_prv,
        "gaussian": statement.epsilon_gaussian,
    }[statement.claimed_by]
    higher = computed is not None and statement.epsilon is not None and statement.epsilon > computed
    return NAMES[statement.claimed_by] + (", not below what was claimed before" if higher else "")


def particulars_of(statement: PrivacyStatement) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of everything that a claim means nothing without."""
    yield "Privacy unit", f"one {statement.unit}"
    for text in statement.adjacency:
        yield "Adjacency", text
    yield "ε if one unit is replaced by another", _epsilon(statement.epsilon_replace_one, statement)
    if statement.epsilon_rdp is not None:
        yield "ε by RDP", _epsilon(statement.epsilon_rdp, statement)
    if statement.epsilon_prv is not None:
        yield "ε by PRV", _epsilon(statement.epsilon_prv, statement)
    if statement.epsilon_gaussian is not None:
        yield "ε by the exact Gaussian formula", _epsilon(statement.epsilon_gaussian, statement)
    yield "Claimed", "none" if statement.void else claimed_by(statement)
    budget = "none" if statement.target_epsilon is None else f"{statement.target_epsilon:g}"
    yield "δ; budget", f"{statement.delta:g}; {budget}"
    yield "Steps charged", f"{statement.steps:,}"
    yield "Account", statement.scope
    yield "Opened", "not yet" if statement.opened_at is None else _when(statement.opened_at)
    head = statement.ledger_head
    yield "Ledger head", "none" if head is None else f"record {head['seq']}, {head['record_hash']}"
    yield "Stated", _when(statement.made_at)


def table_of(mechanisms: Sequence[Mechanism]) -> Iterator[str]:
    """Yield the lines of a table, one row for each mechanism."""
    if not mechanisms:
        return
    yield "| Steps | Mode | Evidence | Unit | N | L | q | σ | C | μ | Noise | Accountant | Account |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    for one in mechanisms:
        cells = (
            f"{one.steps:,}", one.mode, one.sampling, one.unit, _number(one.dataset_size), one.expected_batch_size,
            _number(one.sample_rate), f"{one.noise_multiplier:g}", f"{one.max_grad_norm:g}", _number(one.mu),
            one.noise_source, one.accountant_version, one.account,
        )  # fmt: skip
        yield f"| {' | '.join(as_markdown(str(cell)) for cell in cells)} |"
    yield ""


def _list_of(title: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield f"{title}:"
        yield ""
        yield from (f"- {' '.join(line.split())}" for line in lines)
        yield ""


def _epsilon(value: float | None, statement: PrivacyStatement) -> str:
    return "infinite" if statement.void or value is None else f"{value:.4g}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.6g}"


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))
