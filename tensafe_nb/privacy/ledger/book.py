"""The accounts that the ledger's records add up to: what each was charged, which belong together, which are void.

A record is counted once, by its `record_hash`, whichever log it was written to first. Nothing here is ever taken away.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tensafe_nb.errors import LedgerError
from tensafe_nb.privacy.accounting import Step
from tensafe_nb.privacy.ledger.charges import LedgerRecord, finite

NO_NOISE = "a step was taken without noise (sigma = 0)"
MIXED = "steps for different privacy units ({}) were charged to one account: epsilon is true of none of them"
_HASH = re.compile("[0-9a-f]{64}")
MECHANISM = (
    "mode", "sigma", "C", "L", "N", "q", "delta", "unit", "noise_source", "sampling", "accountant",
    "accountant_version",
)  # fmt: skip


@dataclass(slots=True)
class ChargedGroup:
    """Steps that were charged alike.

    Attributes:
        mechanism: What they have in common, by the names of MECHANISM.
        hashes: One `record_hash` for each step.
        opened_at: When the first was charged.
        epsilon: The largest epsilon that was claimed after one of them.
        mu_squared: The largest mu² after one of them; 0 for Poisson steps.
    """

    mechanism: Mapping[str, Any]
    hashes: list[str] = field(default_factory=list)
    opened_at: float = math.inf
    epsilon: float = 0.0
    mu_squared: float = 0.0

    @property
    def unit(self) -> str:
        """What a privacy unit is: "example", "user" or "prompt group"."""
        return str(self.mechanism["unit"])

    @property
    def step(self) -> Step:
        """Its Poisson steps, for the accountant."""
        return self.mechanism["sigma"], self.mechanism["q"], len(self.hashes)

    def plain(self, hashes: Sequence[str]) -> dict[str, Any]:
        """Return it as JSON, for some of its steps."""
        return {
            **self.mechanism,
            "hashes": list(hashes),
            "opened_at": self.opened_at,
            "epsilon": finite(self.epsilon),
            "mu_squared": finite(self.mu_squared),
        }


@dataclass(slots=True)
class LedgerAccount:
    """What the records say about one account.

    Attributes:
        groups: Its steps.
        voids: record_hash -> (reason, when).
        links: record_hash -> name of an account that was joined to it; "" for records that only import.
        table: {"hash", "steps"} of its participation table, as the newest record has it.
        head: {"account", "seq", "record_hash"} of its newest record in this log.
        opened_at: When its first record was written.
        mu_squared: The largest mu² of a unit over its worst-case steps.
    """

    groups: dict[tuple[Any, ...], ChargedGroup] = field(default_factory=dict)
    voids: dict[str, tuple[str, float]] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    table: Mapping[str, Any] | None = None
    head: Mapping[str, Any] | None = None
    opened_at: float = math.inf
    mu_squared: float = 0.0


class LedgerBook:
    """All accounts of one log, brought up to date record by record."""

    def __init__(self) -> None:
        self.known: set[str] = set()  # hashes of all records, those that a checkpoint brought along included
        self._accounts: dict[str, LedgerAccount] = {}
        self._seen = 0

    def read(self, records: Sequence[LedgerRecord]) -> None:
        """Take in what is new of a log's records.

        Raises:
            LedgerError: One of them is not what this version writes.
        """
        for record in records[self._seen :]:
            with readable(f"record {record.seq}"):
                self._take(record)
            self._seen += 1

    def account(self, name: str) -> LedgerAccount:
        """Return an account, opened if there is none."""
        return self._accounts.setdefault(name, LedgerAccount())

    def together(self, name: str) -> dict[str, LedgerAccount]:
        """Return an account and those that were ever joined to it, the account first."""
        found, ahead = {name: self.account(name)}, [name]
        joined = [
            (one, other)
            for one, account in self._accounts.items()
            for other in account.links.values()
            if other
        ]
        while ahead:  # a join counts both ways, and through others
            here = ahead.pop()
            for one, other in (*joined, *((other, one) for one, other in joined)):
                if one == here and other not in found:
                    found[other] = self.account(other)
                    ahead.append(other)
        return found

    def holds(self, name: str, carried: Mapping[str, Any]) -> bool:
        """Whether what a checkpoint carried of an account has every worst-case step that this book has of it."""
        theirs = {found for group in carried["groups"] for found in group["hashes"]}
        groups = self.account(name).groups.values()
        return all(
            theirs.issuperset(group.hashes) for group in groups if group.mechanism["mode"] == "worst_case"
        )

    def _take(self, record: LedgerRecord) -> None:
        dp, account = record.dp, self.account(record.dp["account"])
        account.head = {"account": dp["account"], "seq": record.seq, "record_hash": record.record_hash}
        account.opened_at = min(account.opened_at, record.at)
        kind = dp["what"]
        if kind == "charge":
            mu = 0.0 if dp["mode"] == "poisson" else infinite(dp["mu_max"])
            values = {"opened_at": record.at, "epsilon": dp["epsilon_after"], "mu_squared": finite(mu * mu)}
            self._add(account, {**dp, **values, "hashes": [record.record_hash]})
            if dp["mode"] != "poisson":
                account.table = dp["participation"]
        elif kind == "void":
            account.voids.setdefault(record.record_hash, (str(dp["reason"]), record.at))
        elif kind == "join":
            account.links[record.record_hash] = str(dp["joined"])
        elif kind == "import":
            account.links[record.record_hash] = ""
            self._import(dp)
        else:
            raise ValueError(f"there are no records of kind {kind!r}")
        self.known.add(record.record_hash)

    def _add(self, account: LedgerAccount, entry: Mapping[str, Any]) -> None:
        """Count the steps of an entry that are not known yet."""
        mechanism = {name: entry[name] for name in MECHANISM}
        check_mechanism(mechanism, entry["hashes"])
        group = account.groups.setdefault(tuple(mechanism.values()), ChargedGroup(mechanism))
        # a step that came home with a checkpoint has the hash of the record it was charged by
        fresh = [found for found in entry["hashes"] if found not in self.known]
        self.known.update(fresh)
        group.hashes.extend(fresh)
        group.opened_at = min(group.opened_at, float(entry["opened_at"]))
        # the largest that was claimed, whatever an accountant says later
        group.epsilon = max(group.epsilon, infinite(entry["epsilon"]))
        group.mu_squared = max(group.mu_squared, infinite(entry["mu_squared"]))
        account.opened_at = min(account.opened_at, group.opened_at)
        account.mu_squared = max(account.mu_squared, group.mu_squared)

    def _import(self, dp: Mapping[str, Any]) -> None:
        for name, entries in dp["accounts"].items():
            account = self.account(name)
            for entry in entries["groups"]:
                self._add(account, entry)
            for record_hash, (reason, at) in entries["voids"].items():
                account.voids.setdefault(record_hash, (str(reason), float(at)))
                account.opened_at = min(account.opened_at, float(at))
            account.links |= entries["links"]
            self.known |= entries["voids"].keys() | entries["links"].keys()
            if table := entries.get("table"):
                account.table = {"hash": table["hash"], "steps": table["steps"]}
                account.mu_squared = max(account.mu_squared, infinite(table["mu_squared"]))


def missing_of(accounts: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Return what `accounts`, as `plain_of` wrote them, hold that is not known yet."""
    known = set(known)
    found: dict[str, Any] = {}
    for name, entries in accounts.items():
        groups = [
            {**group, "hashes": fresh}
            for group in entries["groups"]
            if (fresh := [item for item in group["hashes"] if item not in known])
        ]
        rest = {
            part: {key: value for key, value in entries[part].items() if key not in known}
            for part in ("voids", "links")
        }
        if groups or any(rest.values()):
            found[name] = {"groups": groups, **rest}
    return found


def plain_of(accounts: Mapping[str, LedgerAccount]) -> dict[str, Any]:
    """Return accounts as JSON."""
    return {
        name: {
            "groups": [group.plain(group.hashes) for group in account.groups.values() if group.hashes],
            "voids": {key: list(value) for key, value in account.voids.items()},
            "links": dict(account.links),
            "mu_squared": finite(account.mu_squared),
        }
        for name, account in accounts.items()
    }


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Turn what goes wrong in reading foreign data into one error.

    Raises:
        LedgerError: It is not what this version writes.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LedgerError(
            f"The privacy ledger cannot be read: {what} is not what this version of tensafe_nb writes "
            f"({type(error).__name__}: {error})."
        ) from error


def check_mechanism(mechanism: Mapping[str, Any], hashes: Sequence[Any]) -> None:
    """Refuse steps that no accountant could count.

    Raises:
        ValueError: No mode, sigma, q or hash as this version writes them.
    """
    mode, sigma, q = mechanism["mode"], mechanism["sigma"], mechanism["q"]
    if mode not in ("poisson", "worst_case") or not 0 <= sigma < math.inf:
        raise ValueError(f"mode {mode!r}, sigma {sigma!r}")
    if (not 0 < q <= 1) if mode == "poisson" else q is not None:
        raise ValueError(f"q {q!r}")
    if not all(isinstance(found, str) and _HASH.fullmatch(found) for found in hashes):
        raise ValueError("a hash is none")


def groups_of(together: Mapping[str, LedgerAccount]) -> Iterator[ChargedGroup]:
    """Yield all steps of accounts, those charged alike together."""
    for account in together.values():
        yield from account.groups.values()


def history_of(together: Mapping[str, LedgerAccount]) -> Iterator[Step]:
    """Yield the Poisson steps of accounts, for the accountant."""
    return (group.step for group in groups_of(together) if group.mechanism["mode"] == "poisson")


def voids_of(together: Mapping[str, LedgerAccount]) -> tuple[tuple[str, float], ...]:
    """Return every event that made an account void: (reason, when), in their order; of steps only the day is known."""
    events = [event for account in together.values() for event in account.voids.values()]
    found = [
        (NO_NOISE, group.opened_at)
        for group in groups_of(together)
        if group.mechanism["sigma"] == 0 and group.hashes
    ]
    if len(units := units_of(together.values())) > 1:  # as version 0.1 allowed
        begun = {
            unit: min(g.opened_at for g in groups_of(together) if g.hashes and g.unit == unit)
            for unit in units
        }
        found.append((MIXED.format(", ".join(sorted(units))), max(begun.values())))
    return (*sorted(events, key=lambda event: event[1]), *found)


def units_of(accounts: Iterable[LedgerAccount]) -> set[str]:
    """Return what a privacy unit is in the steps of accounts: one kind, unless an earlier version mixed them."""
    return {group.unit for account in accounts for group in account.groups.values() if group.hashes}


def mu_squared_of(together: Mapping[str, LedgerAccount]) -> float:
    """Return a bound on mu² of a unit over all worst-case steps: ids of two accounts cannot be compared."""
    return math.fsum(account.mu_squared for account in together.values())


def participation_rate(together: Mapping[str, LedgerAccount]) -> float | None:
    """Return what a worst-case step has added to the largest mu², on average."""
    steps = sum(len(group.hashes) for group in groups_of(together) if group.mechanism["mode"] == "worst_case")
    return mu_squared_of(together) / steps if steps else None


def head_of(together: Mapping[str, LedgerAccount]) -> Mapping[str, Any] | None:
    """Return the newest record of the accounts in this log: {"account", "seq", "record_hash"}."""
    heads = [account.head for account in together.values() if account.head]
    return max(heads, key=lambda head: int(head["seq"]), default=None)


def infinite(value: float | None) -> float:
    """Return what `finite` wrote."""
    return math.inf if value is None else float(value)
