"""The one file that knows where things are kept: TENSAFE_HOME, else the platform's user data folder."""

import os
from pathlib import Path

import platformdirs


def home() -> Path:
    """Return the folder under which the toolkit keeps everything."""
    chosen = os.environ.get("TENSAFE_HOME")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_data_dir("tensafe_nb"))


def runs() -> Path:
    """Return the folder that holds one folder per training client."""
    return home() / "runs"


def event_log(training_client_id: str) -> Path:
    """Return the path of a training client's event log."""
    return runs() / training_client_id / "events.jsonl"


def rollouts(training_client_id: str) -> Path:
    """Return the folder of a training client's rollout texts."""
    return runs() / training_client_id / "rollouts"


def keys() -> Path:
    """Return the folder of the local key file and of the salts of passphrases."""
    return home() / "keys"


def artifacts(tenant: str) -> Path:
    """Return the folder of a tenant's sealed artifacts."""
    return home() / "artifacts" / tenant


def audit(tenant: str) -> Path:
    """Return the folder of a tenant's audit log."""
    return home() / "audit" / tenant


def ledger(tenant: str) -> Path:
    """Return the folder of the sealed tables that a tenant's privacy ledger keeps beside the audit log."""
    return home() / "ledger" / tenant


def models() -> Path:
    """Return the folder of models that were converted from GGUF files."""
    return home() / "models"
