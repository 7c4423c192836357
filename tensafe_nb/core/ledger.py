"""Keeps the privacy ledger of a tenant in its audit log: the records of both are in one file."""

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from tensafe_nb.errors import AuditLogError, DecryptionError, LedgerError
from tensafe_nb.privacy.ledger.charges import LedgerRecord
from tensafe_nb.privacy.tickets import DrawRegister
from tensafe_nb.store.audit.chain import Tip
from tensafe_nb.store.audit.log import AuditLog
from tensafe_nb.store.sealed.tables import SealedTables

KINDS = {"charge": "dp_charge", "void": "dp_void", "join": "dp_join", "import": "import"}


class TenantLedger:
    """The ledger of one tenant, for all its accounts: one for every audit log, shared by the training clients.

    The first use reads and verifies the whole log; after that, only what was appended to it.

    Args:
        log: The tenant's audit log.
        tables: Where participation tables are kept.

    Attributes:
        draws: The Poisson draws that were made for its accounts.
    """

    def __init__(self, log: AuditLog, tables: SealedTables) -> None:
        self.draws = DrawRegister()
        self._log = log
        self._tables = tables
        self._lock = threading.Lock()
        self._records: list[LedgerRecord] = []
        self._tip: Tip | None = None
        self._broken: str | None = None

    def records(self) -> Sequence[LedgerRecord]:
        """Return all records that concern the ledger. A log once found altered stays so while this process runs.

        Raises:
            LedgerError: The log was altered or cut, or does not open.
            StorageError: The log cannot be read.
        """
        with self._lock:
            if self._broken is not None:
                raise LedgerError(self._broken)
            try:
                found, self._tip = self._log.follow(self._tip)
            except AuditLogError as error:
                self._broken = (
                    f"The privacy ledger is part of the audit log, and that is broken. {error.message}"
                )
                raise LedgerError(self._broken) from error
            except DecryptionError as error:
                raise LedgerError(f"The privacy ledger cannot be opened. {error.message}") from error
            self._records += [
                LedgerRecord(record["seq"], record["record_hash"], record["ts"], record["dp"])
                for record in found
                if "dp" in record
            ]
            return self._records

    def append(
        self,
        dp: Mapping[str, Any],
        *,
        training_client_id: str | None,
        dp_metrics: Mapping[str, Any] | None = None,
    ) -> LedgerRecord:
        """Write a record, and return when it is on the disk.

        Raises:
            LedgerError: The log was altered or cut, or does not open.
            StorageError: It could not be written; the log is as it was.
        """
        kind, now = KINDS[dp["what"]], time.time()
        with self._lock:
            if self._broken is not None:
                raise LedgerError(self._broken)
        try:
            end = self._log.append(
                kind=kind,
                operation=kind,
                training_client_id=training_client_id,
                started_at=now,
                completed_at=now,
                dp_metrics=dp_metrics,
                extra={"dp": dict(dp)},
                sync=True,
                to_the_day=kind == "dp_charge",
            )
        except (AuditLogError, DecryptionError) as error:
            raise LedgerError(f"The privacy ledger takes no record. {error.message}") from error
        return next(found for found in reversed(self.records()) if found.record_hash == end.head)

    def held(self) -> AbstractContextManager[None]:
        """Keep other threads and processes from charging."""
        return self._tables.held()

    def table(self, account: str) -> tuple[bytes, str] | None:
        """Return the participation table of an account and its content hash; None without one.

        Raises:
            LedgerError: It does not open.
        """
        try:
            return self._tables.read(account)
        except DecryptionError as error:
            raise LedgerError(f"The table of who took part does not open. {error.message}") from error

    def keep_table(self, account: str, data: bytes) -> str:
        """Seal the participation table of an account, and return its content hash when it is on the disk."""
        return self._tables.write(account, data)
