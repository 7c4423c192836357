"""What privacy costs beside the training itself."""

import tempfile
from pathlib import Path
from typing import Any

from bench.harness import Row, Taken, Target, stopwatch


def accounting_step() -> Row:
    """Issue 8: at most 1 ms."""
    from tensafe_nb.privacy.ledger import Ledger

    with tempfile.TemporaryDirectory(prefix="tensafe-bench-privacy-") as folder:
        ledger, charge = Ledger(_log(Path(folder)), "client:tc-1", delta=1e-5), _charge()
        for _ in range(20):
            ledger.charge(charge)
        ledger.projected_step(charge, 8.0)

        def account() -> None:
            ledger.quote(charge)
            ledger.projected_step(charge, 8.0)

        taken = Taken([stopwatch(account)[0] for _ in range(2_000)][100:])
    return Row(
        what="RDP accounting of a step: the ledger looked at, epsilon after it, the last step of the budget",
        peer="",
        sizes="the vector of (σ, q) at hand; 158 orders",
        taken=taken,
        target=Target("≤", 1e-3, "ours"),
    )


def _log(folder: Path) -> Any:
    from tensafe_nb.engine.ledger_binding import TenantLedger
    from tensafe_nb.store.audit_log import AuditLog
    from tensafe_nb.store.keys import Keys
    from tensafe_nb.store.sealed_tables import SealedTables

    keys = Keys(folder / "keys", "file", announce=lambda _: None)
    return TenantLedger(AuditLog(folder / "audit", keys), SealedTables(folder / "ledger", keys))


def _charge() -> Any:
    from tensafe_nb.privacy.charges import Charge

    return Charge(
        mode="poisson",
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=100,
        dataset_size=10_000,
        noise_source="bench",
        sampling="bench",
        step=1,
        training_client_id="tc-1",
    )
