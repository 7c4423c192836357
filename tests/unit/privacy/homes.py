"""A ledger in a folder, as a service of that home folder would have it."""

from pathlib import Path
from typing import Any

from tensafe_nb.core.ledger import TenantLedger
from tensafe_nb.privacy.ledger.account import Ledger
from tensafe_nb.privacy.ledger.charges import Charge
from tensafe_nb.store.audit.log import AuditLog
from tensafe_nb.store.keys.keyring import Keys
from tensafe_nb.store.sealed.tables import SealedTables

DELTA = 1e-5
ACCOUNT = "client:tc-1"


class Home:
    """One process's view of a home folder; two of the same folder are two processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys = Keys(folder / "keys", "file", announce=lambda _: None)
        self.log = AuditLog(folder / "audit", self.keys)
        self.tables = SealedTables(folder / "ledger", self.keys)
        self.tenant = TenantLedger(self.log, self.tables)

    def ledger(self, account: str = ACCOUNT, accountant_type: str = "rdp", delta: float = DELTA) -> Ledger:
        return Ledger(self.tenant, account, delta=delta, accountant_type=accountant_type)

    def again(self) -> "Home":
        return Home(self.folder)


def step(number: int = 1, **changes: Any) -> Charge:
    """A Poisson step at q = 0.01, noise 1."""
    return Charge(**_COMMON | {"mode": "poisson", "dataset_size": 1_000, "step": number} | changes)


def turn(number: int = 1, *ids: str, **changes: Any) -> Charge:
    """A worst-case step that holds the given units once."""
    taking_part = {"mode": "worst_case", "sampling": "example ids", "participants": dict.fromkeys(ids, 1)}
    return Charge(**_COMMON | {"step": number} | taking_part | changes)


_COMMON: dict[str, Any] = {
    "noise_multiplier": 1.0,
    "max_grad_norm": 0.5,
    "expected_batch_size": 10,
    "noise_source": "chacha20/1",
    "sampling": "toolkit sampler",
    "training_client_id": "tc-1",
}
