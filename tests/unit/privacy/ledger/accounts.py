"""Accounts of a ledger, as they are written and as checkpoints carry them."""

import json
from typing import Any

from tensafe_nb.privacy import accounting
from tensafe_nb.privacy.ledger.account import Ledger
from tests.unit.privacy.homes import DELTA, Home


def epsilon_of(steps: int) -> float:
    return accounting.epsilon_rdp(1.0, 0.01, steps, DELTA)


def as_saved(ledger: Ledger) -> dict[str, Any]:
    """What a checkpoint gives back of `carried`."""
    carried: dict[str, Any] = json.loads(json.dumps(ledger.carried(), allow_nan=False))
    return carried


def records_in(home: Home) -> list[dict[str, Any]]:
    if not home.log.path.exists():
        return []
    return [json.loads(line) for line in home.log.path.read_bytes().splitlines()]
