"""An engine's state as a sealed artifact, and back: trainer.json, then tensors as safetensors. Never pickle."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tensafe_nb.config import TrainingConfig
from tensafe_nb.core.engines import Trains
from tensafe_nb.engine import state as states
from tensafe_nb.engine.state import EngineState, Tensors
from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.operations import SaveState
from tensafe_nb.protocol.results import LoadStateResult, SaveStateResult
from tensafe_nb.store.artifacts.artifacts import ArtifactStore, StoredArtifact
from tensafe_nb.store.sealed.tensors import TensorPart

SCHEMA = 1
FACTS, LEDGER = "trainer.json", "ledger.json"


def save(
    engine: Trains,
    store: ArtifactStore,
    operation: SaveState,
    *,
    training_client_id: str,
    ledger_head: Mapping[str, Any] | None,
    facts: Mapping[str, Any],
    ledger: Mapping[str, Any] | None = None,
    artifact_id: str | None = None,
) -> SaveStateResult:
    """Seal an engine's state.

    Args:
        engine: Whose state.
        store: Where to keep it.
        operation: What the user asked for.
        training_client_id: Who saves.
        ledger_head: Of the audit log, for the header: the artifact is an anchor of the log.
        facts: What else is to come back, as plain data.
        ledger: The privacy account of the weights.
        artifact_id: Its id; a new one by default.

    Raises:
        StorageError: It could not be written; earlier artifacts are intact.
    """
    state = engine.capture(operation.include_optimizer)
    known = {
        "schema": SCHEMA,
        "loss": engine.config.loss.type,
        "has_moments": operation.include_optimizer,
        "position": operation.position,
    }
    # The facts come first, so that a state of another model is refused before a tensor of it is read.
    parts: dict[str, bytes | TensorPart] = {FACTS: json.dumps(state.facts | known | dict(facts)).encode()}
    if ledger is not None:
        parts[LEDGER] = json.dumps(ledger).encode()
    parts |= state.parts()
    header = {
        "training_client": training_client_id,
        "step": engine.step,
        "base_model": engine.config.model_ref,
        "revision": state.facts["base"],
        "ledger_head": ledger_head,
        "schema": SCHEMA,
    }
    return store.save(
        parts, header=header, metadata=operation.metadata, name=operation.name, artifact_id=artifact_id
    )


def load(
    engine: Trains,
    store: ArtifactStore,
    artifact_id: str,
    *,
    lenient_optimizer: bool = False,
    include_optimizer: bool = True,
    for_run: str | None = None,
    take_over: Callable[[Mapping[str, Any] | None], None] = lambda ledger: None,
) -> tuple[LoadStateResult, Mapping[str, Any]]:
    """Give an engine the state of an artifact; on any failure the engine stays as it was.

    Args:
        engine: Whose state to replace.
        store: Where it is kept.
        artifact_id: Its id, or its name.
        lenient_optimizer: Moments of another optimiser are left out instead of refused.
        include_optimizer: False leaves out all moments, which then start at zero.
        for_run: The state must say where a run with a loop of this name stood in its data.
        take_over: Called with the privacy account that the state carries, before anything is loaded.

    Returns:
        The result, and the facts that were saved.

    Raises:
        ArtifactNotFoundError: There is none.
        DecryptionError: It does not open.
        ValidationError: It belongs to another model, adapter or optimiser.
    """
    with store.open(store.resolve(artifact_id)) as artifact:
        with_moments = include_optimizer and not lenient_optimizer
        facts, tensors = read_parts(engine, artifact, artifact_id, with_moments=with_moments)
        if for_run is not None and (facts["position"] or {}).get("kind") != for_run:
            raise ValidationError(
                f"The checkpoint {artifact_id!r} was not saved by a run of this kind, so it does not say where in the "
                f"data to go on. Nothing was loaded. load_state() it, and start a new run from there."
            )
        found = artifact.info.artifact_id
    take_over(
        facts.get("ledger")
    )  # before the weights: an account that cannot be joined leaves everything as it was
    state = EngineState.of_parts(facts, tensors)
    # Moments mean something only to the optimiser that made them.
    same = include_optimizer and facts["config"]["optimizer"]["name"] == engine.config.optimizer.name
    engine.restore(state, keep_moments=same)
    restored = state.optimizer is not None and same
    return LoadStateResult(found, engine.step, "READY", restored, facts["position"]), facts


def put_weights(engine: Trains, store: ArtifactStore, artifact_id: str) -> int:
    """Give an engine that only samples the weights of an artifact; return their version.

    Raises:
        ArtifactNotFoundError: There is none of this id.
        DecryptionError: It does not open.
        ValidationError: It belongs to another model or adapter.
    """
    with store.open(artifact_id) as artifact:
        facts, tensors = read_parts(
            engine, artifact, artifact_id, with_moments=False, parts=(states.WEIGHTS,)
        )
    engine.restore(EngineState.of_parts(facts, tensors), keep_moments=False)
    return int(facts["policy_version"])


def config_of(store: ArtifactStore, artifact_id: str) -> TrainingConfig:
    """Return the configuration of the client that saved an artifact."""
    with store.open(store.resolve(artifact_id)) as artifact:
        for name, size, stream in artifact.parts():
            if name == FACTS:
                return TrainingConfig(**parse_facts(stream.read(size), artifact_id)["config"])
    raise ValidationError(f"The artifact {artifact_id!r} holds no training state.")


def read_parts(
    engine: Trains,
    artifact: StoredArtifact,
    artifact_id: str,
    *,
    with_moments: bool,
    parts: Sequence[str] = states.PARTS,
) -> tuple[dict[str, Any], dict[str, Tensors]]:
    """Return the facts and the tensors of a state; one that does not fit the engine is refused before its tensors."""
    facts: dict[str, Any] = {}
    tensors: dict[str, Tensors] = {}
    for name, size, stream in artifact.parts():
        if name == FACTS:
            facts = parse_facts(stream.read(size), artifact_id)
            moments = with_moments and facts["has_moments"]
            states.check(facts, engine.config, engine.fingerprint, artifact_id, with_moments=moments)
        elif name == LEDGER:
            facts["ledger"] = json.loads(stream.read(size))
        elif name in parts:
            tensors[name] = states.read_part(stream, size)
    return facts, tensors


def parse_facts(text: bytes, artifact_id: str) -> dict[str, Any]:
    """Return the facts of a state: plain data, in the format of this version."""
    facts: dict[str, Any] = json.loads(text)
    if facts["schema"] != SCHEMA:
        raise ValidationError(
            f"The artifact {artifact_id!r} was written in format {facts['schema']}, this version reads {SCHEMA}. "
            f"Install a newer tensafe_nb."
        )
    return facts
