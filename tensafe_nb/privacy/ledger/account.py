"""The privacy ledger: every private step is written down before it is taken, and nothing is ever taken back.

An account is a data set by name (`dataset_id`), or one training client and everything forked from it. Its epsilon is
computed over all records of the account and of the accounts joined to it, whoever wrote them: going back to a
checkpoint, forking, or starting another process on the same data starts no new account.

The records are part of the audit log. The ledger sees it through `LedgerLog`.
"""

import base64
import copy
import functools
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Concatenate, ParamSpec, TypeVar

from tensafe_nb.display import as_given
from tensafe_nb.errors import (
    AuditLogError,
    DecryptionError,
    LedgerError,
    PrivacyUnitError,
    StorageError,
    ValidationError,
)
from tensafe_nb.privacy import accounting
from tensafe_nb.privacy.accounting import Adjacency, Epsilon
from tensafe_nb.privacy.ledger.book import (
    LedgerAccount,
    LedgerBook,
    groups_of,
    head_of,
    history_of,
    infinite,
    missing_of,
    mu_squared_of,
    participation_rate,
    plain_of,
    readable,
    units_of,
    voids_of,
)
from tensafe_nb.privacy.ledger.charges import (
    Charge,
    Charged,
    LedgerLog,
    LedgerRecord,
    Spent,
    entry_of,
    exceeded,
    finite,
    metrics_of,
)
from tensafe_nb.privacy.ledger.participation import Participation

SCHEMA = 1
P = ParamSpec("P")
R = TypeVar("R")


def _alone(method: "Callable[Concatenate[Ledger, P], R]") -> "Callable[Concatenate[Ledger, P], R]":
    """Let one thread at a time into a ledger."""

    @functools.wraps(method)
    def entered(self: "Ledger", /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock:
            return method(self, *args, **kwargs)

    return entered


class Ledger:
    """One account of the ledger, as one training client sees it.

    Nothing is read before the first use. No call lowers epsilon. Threads may share it.

    Args:
        log: Where the records are.
        account: From `charges.account_name`; a fork has its parent's.
        delta: At which epsilon is stated.
        accountant_type: "rdp", or "prv" for the lesser of both.

    Example:
        if ledger.quote(charge) <= target:
            ledger.charge(charge, target_epsilon=target)  # on the disk: now the noise may be drawn
    """

    def __init__(self, log: LedgerLog, account: str, *, delta: float, accountant_type: str = "rdp") -> None:
        accounting.check_accountant(accountant_type)
        self.account = account
        self.delta = delta
        self.accountant_type = accountant_type
        self._log = log
        self._lock = threading.RLock()
        self._book = LedgerBook()
        self._table: tuple[Participation, str] | None = None

    # what was spent

    @_alone
    def state(self) -> Spent:
        """Return how the account stands; with a ledger that cannot be read, epsilon is infinite and says why."""
        unreadable: list[tuple[str, float]] = []
        try:
            self._read()
        except (AuditLogError, DecryptionError, StorageError) as error:
            unreadable = [(error.message, time.time())]
        together = self._book.together(self.account)
        voids = (*voids_of(together), *unreadable)
        claimed = Epsilon(math.inf, self.accountant_type) if voids else self.computed(together)
        opened = min(account.opened_at for account in together.values())
        return Spent(
            account=self.account,
            joined=tuple(name for name in together if name != self.account),
            total_epsilon=math.inf if voids else self._claimed(together),
            delta=self.delta,
            accountant=claimed.by,
            steps=sum(len(group.hashes) for group in groups_of(together)),
            mu=math.sqrt(mu_squared_of(together)),
            void=voids[0][0] if voids else None,
            voids=voids,
            head=head_of(together),
            opened_at=None if math.isinf(opened) else opened,
        )

    @_alone
    def snapshot(self) -> tuple[Spent, Mapping[str, LedgerAccount]]:
        """Return `state`, and a copy of the records of the account and of those joined to it, of one moment."""
        return self.state(), copy.deepcopy(self._book.together(self.account))

    def computed(
        self,
        together: Mapping[str, LedgerAccount],
        accountant_type: str | None = None,
        adjacency: Adjacency = "add_remove",
    ) -> Epsilon:
        """Return epsilon of what was charged, whatever was claimed before; by the ledger's accountant or another."""
        return accounting.epsilon_of_account(
            history_of(together),
            mu_squared_of(together),
            self.delta,
            accountant_type or self.accountant_type,
            adjacency,
        )

    @_alone
    def quote(self, charge: Charge) -> float:
        """Return the account's epsilon after a step. Nothing is written, unless the account turns out to be void.

        Raises:
            LedgerError: The ledger cannot be read, or no longer says who took part before.
        """
        together = self._read()
        return self._after(together, [charge], self._mu_squared_after(together, charge))

    @_alone
    def projected_step(self, charge: Charge, target_epsilon: float | None) -> int | None:
        """Return the last step that the target pays for, if all steps from the next on cost what `charge` does.

        Poisson steps are projected by RDP: with accountant_type="prv" the budget lasts at least so long. Worst-case
        steps are projected at the rate at which the largest mu² has grown so far.

        Args:
            charge: Of the next step.
            target_epsilon: The budget; None has no end.
        """
        together = self._read()
        if target_epsilon is None or voids_of(together):
            return None
        further = self._further(together, charge, target_epsilon)
        return None if further is None else charge.step - 1 + further

    # charges

    @_alone
    def charge(
        self, charge: Charge, *, target_epsilon: float | None = None, draw: int | None = None
    ) -> Charged:
        """Pay for a step: when this returns, its record is on the disk and the step may be taken.

        Args:
            charge: What it costs.
            target_epsilon: Refuse what would spend more, unless the account is void.
            draw: The number of the Poisson draw that the step uses. Draws of the account that were made before it and
                left out are paid for with it; one that was paid for as left out is not paid for again.

        Raises:
            DPBudgetExceededError: It would spend more; nothing was written.
            PrivacyUnitError: The account's steps so far protect another kind of unit; nothing was written.
            LedgerError: The ledger cannot be read, and takes no charge.
            StorageError: The record could not be written: the step must not be taken.
        """
        # from the reading to the last record: two processes cannot both spend what is left
        with self._log.held():
            together = self._read()
            self._refuse_other_units(together, {charge.unit})
            due = {draw: charge} if draw is None else self._due(together, charge, draw)
            before = self._claimed(together)
            mu_squared = self._mu_squared_after(together, charge)
            after = self._after(together, list(due.values()), mu_squared)
            if target_epsilon is not None and after > target_epsilon and not voids_of(together):
                if draw is not None:  # no weight moves: nothing of the draw is released
                    self._log.draws.waive(draw)
                raise exceeded(charge, before, target_epsilon, after, left_out=len(due) - (draw in due))
            head: Mapping[str, Any] = head_of(together) or {"seq": 0, "record_hash": ""}
            for (
                number,
                one,
            ) in due.items():
                record = self._pay(together, one, mu_squared)
                head = {"seq": record.seq, "record_hash": record.record_hash}
                if number is not None:
                    self._log.draws.pay(number)
        return Charged(before, after, head["seq"], head["record_hash"])

    def _due(
        self, together: Mapping[str, LedgerAccount], charge: Charge, draw: int
    ) -> dict[int | None, Charge]:
        """Return what is to be paid with a draw, in the order of the draws: those that were left out, and itself."""
        return {
            number: charge
            if number == draw
            else replace(
                owed, unit=charge.unit, step=charge.step, sampling=f"{owed.sampling}, not used by then"
            )
            for number, owed in self._log.draws.owed(together, draw).items()
        }

    def _pay(self, together: Mapping[str, LedgerAccount], charge: Charge, mu_squared: float) -> LedgerRecord:
        before, after = self._claimed(together), self._after(together, [charge], mu_squared)
        entry = entry_of(charge, self.account, after, delta=self.delta, accountant_type=self.accountant_type)
        if charge.mode == "worst_case":
            entry |= self._take_part(charge)
        return self._append(entry, charge.training_client_id, metrics_of(charge, before, after, self.delta))

    def _refuse_other_units(self, together: Mapping[str, LedgerAccount], units: set[str]) -> None:
        """Refuse to add up what cannot be: a person's epsilon says nothing of steps that clip each of their rows."""
        held = units_of(together.values())
        if len(held | units) > 1 and held and not voids_of(together):
            raise PrivacyUnitError(
                f"The privacy account {as_given(self.account)} protects one {' or '.join(sorted(held))}, and this "
                f"is for one "
                f"{' or '.join(sorted(units - held))}: one epsilon cannot be true of both. Nothing was charged. Give "
                f"all rows the same kind of unit; or train the others in an account of their own (another client, "
                f"another DPConfig(dataset_id=…)); or give the guarantee up with tc.void_privacy(reason)."
            )

    @_alone
    def void(self, reason: str, *, training_client_id: str | None = None) -> None:
        """Write down that there is no guarantee any more: from then on epsilon is infinite, for good.

        Args:
            reason: Why; shown in the privacy statement, and readable by whoever reads the audit log.
            training_client_id: Who says so.

        Raises:
            StorageError: It could not be written: what it was to allow must not be done.
        """
        if not reason.strip():
            raise ValidationError(
                "Say why the guarantee is given up: the reason is shown in the privacy statement."
            )
        self._append({"what": "void", "account": self.account, "reason": reason}, training_client_id)

    @_alone
    def join(self, account: str, *, training_client_id: str | None = None) -> None:
        """Join another account to this one, for good: what was spent on either counts for both."""
        with self._log.held():
            if account not in self._read():
                self._append({"what": "join", "account": self.account, "joined": account}, training_client_id)

    # checkpoints

    @_alone
    def carried(self) -> dict[str, Any]:
        """Return the account's records, for a checkpoint: plain data.

        Who took part stays in this ledger: a checkpoint holds of it only how often the unit did that did most often.

        Raises:
            LedgerError: The ledger cannot be read.
        """
        with self._log.held():
            together = self._read()
        return {
            "schema": SCHEMA,
            "account": self.account,
            "head": head_of(together),
            "accounts": plain_of(together),
        }

    @_alone
    def adopt(
        self,
        carried: Mapping[str, Any] | None,
        head: Mapping[str, Any] | None,
        *,
        training_client_id: str | None = None,
    ) -> None:
        """Take over the account of a checkpoint whose weights are being loaded.

        Another account is joined to this one. Records that are not in this log are imported. Where that cannot be
        done, the account becomes void. Nothing is ever removed.

        Args:
            carried: What `carried` returned when the checkpoint was saved; None if the checkpoint has none.
            head: The ledger head that its header names.
            training_client_id: Who loads.

        Raises:
            LedgerError: This ledger cannot be read.
            StorageError: It could not be written: the checkpoint must not be loaded.
        """
        with self._log.held():
            self._read()
            try:
                self._import(carried, training_client_id)
            except LedgerError as error:
                self.void(
                    f"the privacy records of a loaded checkpoint could not be imported: {error.message}",
                    training_client_id=training_client_id,
                )
            else:
                if head is not None and head.get("record_hash") not in self._book.known:
                    self.void(
                        "a loaded checkpoint names a ledger head that is neither in this ledger nor among its records",
                        training_client_id=training_client_id,
                    )

    def _import(self, carried: Mapping[str, Any] | None, training_client_id: str | None) -> None:
        if carried is None:
            raise LedgerError("it carries none")
        with readable("the checkpoint's ledger"):
            if carried["schema"] != SCHEMA:
                raise LedgerError(
                    f"they are of format {as_given(carried['schema'])}, this version reads {SCHEMA}"
                )
            fresh = missing_of(carried["accounts"], self._book.known)
            # a book apart refuses foreign records before any of them is written to this log
            book = LedgerBook()
            book.read([LedgerRecord(0, "", 0.0, _import_entry(self.account, dict(carried["accounts"])))])
            account = str(carried["account"])
        if units := units_of(map(book.account, carried["accounts"])):
            self._refuse_other_units(self._book.together(self.account), units)
        with readable("the checkpoint's ledger"):
            for name in fresh:
                table = carried.get("tables", {}).get(name)  # as version 0.1 wrote it
                self._import_table(name, fresh[name], carried["accounts"][name], table)
        if fresh:
            self._append(_import_entry(self.account, fresh), training_client_id)
        self.join(account, training_client_id=training_client_id)

    def _import_table(
        self, name: str, fresh: dict[str, Any], carried: Mapping[str, Any], table: str | None
    ) -> None:
        """Take in who took part. Where a checkpoint does not say, every unit counts as the one that did most often."""
        if not any(group["mode"] == "worst_case" for group in fresh["groups"]):
            return
        if table is None:
            taken = [len(group["hashes"]) for group in carried["groups"] if group["mode"] == "worst_case"]
            theirs = Participation(steps=sum(taken), offset=infinite(carried["mu_squared"]))
        else:
            theirs = Participation.parse(base64.b64decode(table, validate=True))
        # a checkpoint that has every step of this ledger has this table's counts, too: adding would count them twice
        here = self._log.table(name)
        merged = theirs
        if here is not None and not self._book.holds(name, carried):
            merged = Participation.parse(here[0])
            merged.merge(theirs)
        content_hash = self._log.keep_table(name, bytes(merged))
        fresh["table"] = {
            "hash": content_hash,
            "steps": merged.steps,
            "mu_squared": finite(merged.mu_squared),
        }

    # reading and adding up

    def _read(self) -> dict[str, LedgerAccount]:
        self._book.read(self._log.records())
        return self._book.together(self.account)

    def _append(
        self, dp: Mapping[str, Any], training_client_id: str | None, metrics: Mapping[str, Any] | None = None
    ) -> LedgerRecord:
        record = self._log.append(dp, training_client_id=training_client_id, dp_metrics=metrics)
        self._read()
        return record

    def _claimed(self, together: Mapping[str, LedgerAccount]) -> float:
        """Return the account's epsilon: what is computed, and never less than was claimed before."""
        if voids_of(together):
            return math.inf
        return max(self.computed(together).value, self._floor(together))

    def _after(
        self, together: Mapping[str, LedgerAccount], charges: Sequence[Charge], mu_squared: float
    ) -> float:
        if voids_of(together):
            return math.inf
        steps = [(one.noise_multiplier, one.sample_rate, 1) for one in charges if one.sample_rate is not None]
        computed = accounting.epsilon_of_account(
            [*history_of(together), *steps], mu_squared, self.delta, self.accountant_type
        )
        return max(computed.value, self._floor(together))

    def _floor(self, together: Mapping[str, LedgerAccount]) -> float:
        """Return the largest epsilon that was claimed at this delta or a larger one."""
        # epsilon falls as delta grows: a claim at a smaller delta says nothing about this one
        groups = groups_of(together)
        return max((group.epsilon for group in groups if group.mechanism["delta"] >= self.delta), default=0.0)

    def _further(
        self, together: Mapping[str, LedgerAccount], charge: Charge, target_epsilon: float
    ) -> int | None:
        past = accounting.rdp_of_history(history_of(together))
        mu_squared = mu_squared_of(together)
        if charge.sample_rate is not None:
            past = past + accounting.rdp_of_mu_squared(mu_squared)
            step = accounting.rdp_of_step(charge.noise_multiplier, charge.sample_rate)
            return accounting.projected_steps(target_epsilon, self.delta, past, step)
        rate = participation_rate(together)
        if rate is None:  # of the first worst-case step: as if each later one held the same units
            multiplicity = max(charge.participants.values(), default=0)
            rate = accounting.mu_squared_of(multiplicity, charge.noise_multiplier)
        return accounting.projected_participations(target_epsilon, self.delta, mu_squared, rate, past)

    # who took part

    def _mu_squared_after(self, together: Mapping[str, LedgerAccount], charge: Charge) -> float:
        now = mu_squared_of(together)
        if charge.mode == "poisson":
            return now
        own = self._participation().quote(charge.participants, charge.noise_multiplier)
        # the other accounts' part stays; of this one counts whichever says more, its records or its table
        return now - together[self.account].mu_squared + max(own, together[self.account].mu_squared)

    def _take_part(self, charge: Charge) -> dict[str, Any]:
        """Write the table of who took part, and return what the record says of it.

        It is on the disk before the record: it may come to be ahead of the records, never behind.
        """
        table = self._participation()
        self._table = None  # if writing fails, what is on the disk counts
        table.take(charge.participants, charge.noise_multiplier)
        content_hash = self._log.keep_table(self.account, bytes(table))
        self._table = table, content_hash
        participation = {"hash": content_hash, "steps": table.steps}
        return {"mu_max": finite(math.sqrt(table.mu_squared)), "participation": participation}

    def _participation(self) -> Participation:
        """Return the account's table, as it is on the disk.

        Raises:
            LedgerError: It is missing or older than the records say. The account becomes void.
        """
        stored, wanted = self._log.table(self.account), self._book.account(self.account).table
        if stored is None:
            if wanted is not None:
                raise self._lost("is missing")
            return Participation()
        if self._table is None or self._table[1] != stored[1]:
            self._table = Participation.parse(stored[0]), stored[1]
        table = self._table[0]
        if wanted is not None and (
            table.steps < wanted["steps"] or (table.steps == wanted["steps"] and stored[1] != wanted["hash"])
        ):
            raise self._lost("is older than the ledger, or another")
        return table

    def _lost(self, how: str) -> LedgerError:
        reason = f"the table of who took part in the worst-case steps of {self.account} {how}"
        self.void(reason)
        return LedgerError(f"The privacy ledger takes no charge: {reason}. The account is void from now on.")


def without_tables(carried: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint carried as this version writes it: of the tables of version 0.1 the largest counts.

    Raises:
        LedgerError: A table is none.
    """
    with readable("the checkpoint's ledger"):
        rest = {name: value for name, value in carried.items() if name != "tables"}
        accounts = {name: dict(account) for name, account in carried["accounts"].items()}
        for name, table in carried.get("tables", {}).items():
            taken = Participation.parse(base64.b64decode(table, validate=True))
            accounts[name].setdefault("mu_squared", finite(taken.mu_squared))
        for account in accounts.values():
            if not any(group["mode"] == "worst_case" for group in account["groups"]):
                account.setdefault("mu_squared", 0.0)
    return rest | {"accounts": accounts}


def _import_entry(account: str, accounts: Mapping[str, Any]) -> dict[str, Any]:
    return {"what": "import", "account": account, "accounts": accounts}
