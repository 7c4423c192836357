"""Checkpoints as the protocol names them: a `tinker://` path is the name of a sealed artifact of ours."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tensafe_nb.config import LoRAConfig, TrainingConfig
from tensafe_nb.display import as_given
from tensafe_nb.errors import ArtifactNotFoundError, ValidationError
from tensafe_nb.protocol.results import SaveStateResult
from tensafe_nb.server.service import Tenant

MARK = "tinker"  # in an artifact's metadata: what the protocol knows of it
KINDS = {"weights": "training", "sampler_weights": "sampler"}  # by the middle of a path
SNAPSHOT = "snapshot"  # of a sampling session alone: in no list, and deleted with the session


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An artifact that was saved over this protocol.

    Attributes:
        saved: The artifact.
        known: What its metadata say: the run, its base model, the user's own metadata, when it expires.
    """

    saved: SaveStateResult
    known: Mapping[str, Any]

    @property
    def is_expired(self) -> bool:
        """Whether its time is over."""
        return self.known["expires_at"] is not None and self.known["expires_at"] < time.time()

    def told(self) -> dict[str, Any]:
        """Return it as the protocol lists it."""
        _, kind, name = str(self.saved.name).removeprefix("tinker://").split("/")
        return {
            "checkpoint_id": f"{kind}/{name}",
            "checkpoint_type": KINDS[kind],
            "time": moment(self.saved.created_at),
            "tinker_path": self.saved.name,
            "size_bytes": self.saved.size_bytes,
            "public": False,
            "user_metadata": self.known["user_metadata"],
            "expires_at": None if self.known["expires_at"] is None else moment(self.known["expires_at"]),
        }


def moment(seconds: float) -> str:
    """Return a time as the protocol writes it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def path_of(run_id: str, kind: str, name: str) -> str:
    """Return the path of a checkpoint."""
    return f"tinker://{run_id}/{kind}/{name}"


def checkpoints_of(tenant: Tenant) -> Iterator[Checkpoint]:
    """Yield a tenant's checkpoints, newest first; snapshots too. Reads the disk: call it on a thread."""
    for saved in tenant.transport.list_artifacts(None):
        known = (saved.metadata or {}).get(MARK)
        if isinstance(known, Mapping):
            yield Checkpoint(saved, known)


def listed(tenant: Tenant, run_id: str | None = None) -> list[Checkpoint]:
    """Return the checkpoints that the protocol lists, newest first."""
    return [
        found
        for found in checkpoints_of(tenant)
        if found.known["kind"] != SNAPSHOT
        and not found.is_expired
        and run_id in (None, found.known["run_id"])
    ]


def find(tenant: Tenant, path: str) -> Checkpoint:
    """Return the checkpoint that a path names: the newest, where there are several.

    Raises:
        ArtifactNotFoundError: There is none, or its time is over.
        ValidationError: This is no such path.
    """
    parts = path.removeprefix("tinker://").split("/")
    if not path.startswith("tinker://") or len(parts) != 3 or parts[1] not in KINDS:
        raise ValidationError(
            f"{as_given(path)} is no path of a checkpoint: tinker://RUN/weights/NAME or "
            f"tinker://RUN/sampler_weights/NAME."
        )
    found = next((each for each in checkpoints_of(tenant) if each.saved.name == path), None)
    if found is None or found.is_expired:
        raise ArtifactNotFoundError(f"There is no checkpoint {as_given(path)}.")
    return found


def sweep(tenant: Tenant, snapshots: frozenset[str], older_than: float = 3600.0) -> None:
    """Delete what has expired, and snapshots whose sampling session is no more."""
    for each in list(checkpoints_of(tenant)):
        is_left = each.known["kind"] == SNAPSHOT and each.saved.artifact_id not in snapshots
        if each.is_expired or (is_left and each.saved.created_at < time.time() - older_than):
            tenant.transport.delete_artifact(each.saved.artifact_id)
            tenant.stored.forget()


def weights_info(config: TrainingConfig) -> dict[str, Any]:
    """Return what a checkpoint is of."""
    lora, private = config.lora_config, config.dp_config is not None and config.dp_config.enabled
    return {
        "base_model": config.model_ref,
        "is_lora": lora is not None,
        "lora_rank": None if lora is None else lora.rank,
        **({} if lora is None else trained_in(lora)),
        "optimizer_config": {"type": "dp_adamw" if private else "adamw"},
    }


ATTENTION, MLP, HEAD = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("gate_proj", "up_proj", "down_proj"),
    ("lm_head",),
)


def modules_of(*, attention: bool, mlp: bool, head: bool) -> tuple[str, ...] | str:
    """Return what to adapt. The head is adapted only where nothing else is: see the page of the docs.

    Raises:
        ValidationError: Nothing at all.
    """
    if attention and mlp:
        return "all-linear"
    chosen = (ATTENTION if attention else ()) + (MLP if mlp else ()) or (HEAD if head else ())
    if not chosen:
        raise ValidationError("lora_config trains nothing: train_attn, train_mlp or train_unembed.")
    return chosen


def trained_in(lora: LoRAConfig) -> dict[str, bool]:
    """Return the protocol's three switches of an adapter."""
    names = set(lora.target_modules) if isinstance(lora.target_modules, tuple) else {*ATTENTION, *MLP}
    return {
        "train_attn": not names.isdisjoint(ATTENTION),
        "train_mlp": not names.isdisjoint(MLP),
        "train_unembed": not names.isdisjoint(HEAD),
    }
