"""A ServiceClient, the way in: it makes training clients, and keeps their artifacts and their audit log."""

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload
from weakref import WeakValueDictionary

from tensafe_nb.checks import checked
from tensafe_nb.config import (
    DPConfig,
    LoRAConfig,
    LossConfig,
    OptimizerConfig,
    Precision,
    SamplingConfig,
    SamplingEngine,
    TrainingConfig,
    joins,
    spells,
)
from tensafe_nb.display import Facts, Listing, as_given, fields_of, shown
from tensafe_nb.errors import ClientClosedError, ValidationError, near_misses
from tensafe_nb.futures import FutureHandle
from tensafe_nb.lifetimes import before_loading
from tensafe_nb.protocol.results import (
    AuditLogEntry,
    AuditVerification,
    Prompt,
    SampleResult,
    SaveStateResult,
    StateSource,
    TrainingClientInfo,
)
from tensafe_nb.store.home import Home

if TYPE_CHECKING:  # loaded with the first training client, so that the names of a first cell are soon there
    from tensafe_nb.client import Clients, TrainingClient
    from tensafe_nb.transports.base import Channel, Transport

_DEFAULTS = TrainingConfig()


@shown
@near_misses(
    create_client="service.create_training_client(…)",
    create="service.create_training_client(…)",
    create_lora_training_client="service.create_training_client(lora_config=LoRAConfig(…))",
    load="service.restore(artifact_id)",
    load_state="service.restore(artifact_id), or tc.load_state(artifact_id)",
    training_clients="service.list_training_clients()",
    artifacts="service.list_artifacts()",
    checkpoints="service.list_artifacts()",
    audit_log="service.get_audit_logs()",
    list_runs="tensafe_nb.list_runs()",
    fit="tc.fit(…), of service.create_training_client(…)",
    train="tc.fit(…), of service.create_training_client(…)",
)
class ServiceClient:
    """The way in: makes training clients, and keeps what they save.

    It knows its training clients and keeps none of them: each lives as long as something of yours refers to it, or a
    run of it is under way.

    Args:
        base_url: A remote core; None (and no TENSAFE_BASE_URL) trains in this process.
        api_key: For a remote core; else TENSAFE_API_KEY.
        key_source: Where the key of the artifacts comes from: "file" (made on first use in the home folder), "env"
            (TENSAFE_KEK, 32 bytes in base64) or "passphrase" (TENSAFE_PASSPHRASE, else asked for). None takes
            TENSAFE_KEK where it is set, else the file.
        patience: Seconds for which a remote core may not answer, while it is restarted for instance, until what waits
            for it fails with ServerConnectionError.
        cluster: Where models are computed, if not in this process: LocalCluster(engines=2) in processes of this
            machine, RayCluster("auto", engines=4) on a cluster of Ray. Queue, events, checkpoints and keys stay here.

    Raises:
        ValidationError: An unknown key source, or one beside a base_url; a patience below 0.
        ServerConnectionError: Nothing answers at base_url.
        AuthenticationError: It takes no such api_key.

    Example:
        >>> service = ServiceClient()
        >>> tc = service.create_training_client(model_ref="builtin:tiny", lora_config=LoRAConfig(rank=8))
    """

    @checked
    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        key_source: str | None = None,
        patience: float = 60.0,
        cluster: Any = None,
    ) -> None:
        if not patience >= 0:
            raise ValidationError(f"patience={as_given(patience)}: give a number of seconds, 0 or more.")
        base_url = base_url or os.environ.get("TENSAFE_BASE_URL") or None
        home = Home.of_environment()
        self._transport: Transport = (
            embedded_transport(home, key_source, cluster)
            if base_url is None
            else http_transport(base_url, api_key, home, key_source, patience, cluster)
        )
        self._core = (base_url or "embedded").partition("?")[0]  # behind it may stand a proxy's token
        self._clients: Clients = WeakValueDictionary()
        self._closed = False

    @joins(TrainingConfig, "config")
    def create_training_client(
        self,
        config: TrainingConfig | None = None,
        *,
        model_ref: str = "builtin:tiny",
        lora_config: LoRAConfig | Mapping[str, Any] | None = None,
        optimizer: OptimizerConfig | Mapping[str, Any] = _DEFAULTS.optimizer,
        loss: LossConfig | Mapping[str, Any] = _DEFAULTS.loss,
        batch_size: int = 8,
        gradient_accumulation_steps: int = 1,
        micro_batch_tokens: int = 16_384,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
        value_head: bool = False,
        dp_config: DPConfig | Mapping[str, Any] | None = None,
        ignore_weights: str | Sequence[str] = (),
        resize_embeddings: bool = False,
    ) -> "TrainingClient":
        """Make a training client. Returns at once; its model loads in the background.

        Before you load a transformers model of your own, wait for it (`await tc.ready()`): transformers patches torch
        while it loads, and two loads at once corrupt each other.

        Args:
            config: What to train: a TrainingConfig, whose fields the keywords are. Those that you give come on top of
                it.
            model_ref: A built-in ("builtin:tiny", "builtin:sums"), a local folder, a .gguf file, or a hub id.
            lora_config: Adapters to train: LoRAConfig(…), or a dict of its fields; None trains all weights.
            optimizer: OptimizerConfig(…), or a dict of its fields: {"learning_rate": 1e-3}.
            loss: The loss, where an operation names no other.
            batch_size: Rows per batch, read by `tc.batches`.
            gradient_accumulation_steps: Batches per optimiser step, read by `fit`.
            micro_batch_tokens: The engine splits batches into micro-batches of at most this many tokens.
            gradient_checkpointing: Compute activations again in the backward pass: less memory, more time.
            seed: Fixes initialisation, dropout and sampling.
            dtype: "float32", "bfloat16" (bf16 compute, fp32 trained weights), or "auto".
            device: "cpu", "cuda", "mps", or "auto".
            value_head: Add a scalar head, for PPO with advantage="gae".
            dp_config: Train with differential privacy: DPConfig(…); None trains without.
            ignore_weights: Weights that the model's file may hold though the model has no place for them.
            resize_embeddings: Give the model rows for tokens that its tokenizer has and it lacks.

        Raises:
            ValidationError: A field that does not fit.
        """
        assert config is not None  # the keywords are in it
        self._refuse_if_closed()
        before_loading()
        return self._adopt(self._transport.create(config))

    @spells(TrainingConfig)
    @checked
    def restore(self, artifact_id: str, **changes: Any) -> "TrainingClient":
        """Make a training client of a checkpoint: its configuration, its weights, its optimiser, its random streams.

        Returns at once. A state that cannot be loaded puts the client in ERROR.

        Args:
            artifact_id: The checkpoint's id, or its name.
            changes: Fields of TrainingConfig that are to be different, such as `device` or
                `optimizer={"learning_rate": 1e-3}`.

        Raises:
            ArtifactNotFoundError: There is none.
            DecryptionError: It does not open.
            ValidationError: A field that does not fit.
        """
        self._refuse_if_closed()
        config = self._transport.config_of(artifact_id).change(**changes)
        before_loading()
        return self._adopt(self._transport.create(config, StateSource(artifact_id=artifact_id)))

    def _adopt(self, channel: "Channel") -> "TrainingClient":
        from tensafe_nb.client import TrainingClient

        try:
            return TrainingClient(channel, self._transport, self._clients)
        except BaseException:  # an interrupt of the cell: nobody else would let it go
            channel.detach()
            raise

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise ClientClosedError("This ServiceClient is closed. Create a new one: ServiceClient().")

    def list_training_clients(self) -> list[TrainingClientInfo]:
        """Return the training clients that are not closed, oldest first."""
        return Listing(self._transport.list_training_clients(), fields_of)

    @checked
    def get_training_client(self, training_client_id: str) -> "TrainingClient":
        """Return a training client by its id.

        Raises:
            TrainingClientNotFoundError: This service has none of that id.
        """
        client = self._clients.get(training_client_id)
        return self._adopt(self._transport.attach(training_client_id)) if client is None else client

    @joins(SamplingConfig, "sampling")
    def sample(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingConfig | None = None,
        *,
        artifact_id: str | None = None,
        model_ref: str | None = None,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        num_samples: int = 1,
        stop: str | Sequence[str] | None = (),
        stop_tokens: Sequence[int] | None = (),
        seed: int | None = None,
        ignore_end: bool = False,
        top_logprobs: int = 0,
        prompt_logprobs: bool = False,
        top_prompt_logprobs: int = 0,
        precision: Precision = "exact",
        alone: bool = False,
        engine: SamplingEngine = "torch",
    ) -> FutureHandle[SampleResult]:
        """Draw completions without a training client: from a checkpoint's weights, or from a model as it is.

        It waits for no training. Requests are served in the order they came; the weights stay in memory for the next.

        Args:
            prompts: As for `TrainingClient.sample`, like what is not named here.
            sampling: How to draw: a SamplingConfig, whose fields the keywords are.
            artifact_id: Of the checkpoint, or its name: then the newest of that name.
            model_ref: A model as it is, instead: as in TrainingConfig.
            max_new_tokens: Longest completion, in tokens.
            temperature: Divides the logits; 0 takes the most likely token.
            top_p: Keep the smallest set of tokens whose probability reaches this.
            top_k: Keep the k most likely tokens; 0 keeps all.
            num_samples: Completions per prompt.
            stop: Strings that end a completion; they are cut from its text.
            stop_tokens: Tokens that end a completion, as the model's end token does.
            seed: Fixes every row's random stream; None draws a new one.
            ignore_end: Go on past end tokens, so that every completion has `max_new_tokens`.
            top_logprobs: Also return the most likely tokens at the place of each one drawn, so many.
            prompt_logprobs: Also return the log-probability of each token of the prompts.
            top_prompt_logprobs: Also return the most likely tokens of each place in the prompts, so many.
            precision: Of the weights that tokens are drawn with: "exact", "bfloat16", "int8" or "auto".
            alone: Draw beside no other sample, so that logprobs, too, are the same to the last bit.
            engine: "torch", or "llama.cpp" where llama-cpp-python is installed: see SamplingConfig.

        Raises:
            ArtifactNotFoundError: There is no such checkpoint.
            ValidationError: No prompt, a field that does not fit, or not exactly one of `artifact_id` and `model_ref`.

        Example:
            >>> service.sample("2 + 2 =", artifact_id="best", max_new_tokens=4).texts
        """
        assert sampling is not None  # the keywords are in it
        self._refuse_if_closed()
        for name, given in (("artifact_id", artifact_id), ("model_ref", model_ref)):
            if given is not None and (not isinstance(given, str) or not given):
                raise ValidationError(f"sample(): {name}={as_given(given)} is no text that could name one.")
        from tensafe_nb.client import prompts_to_sample
        from tensafe_nb.protocol.operations import Sample, SampleFrom

        drawn = Sample(prompts_to_sample(prompts, sampling), sampling)
        before_loading()
        return self._transport.sample(SampleFrom(drawn, artifact_id, model_ref))

    # artifacts

    @checked
    def list_artifacts(self, training_client_id: str | None = None) -> list[SaveStateResult]:
        """Return the stored artifacts, newest first.

        Args:
            training_client_id: Only those that this client saved.
        """
        return Listing(self._transport.list_artifacts(training_client_id), row_of_artifact)

    @checked
    def get_artifact(self, artifact_id: str) -> SaveStateResult:
        """Return what is known of an artifact.

        Args:
            artifact_id: Its id, or its name: then the newest of that name.

        Raises:
            ArtifactNotFoundError: There is none.
        """
        return self._transport.get_artifact(artifact_id)

    @overload
    def pull_artifact(self, artifact_id: str, to: None = None) -> bytes: ...
    @overload
    def pull_artifact(self, artifact_id: str, to: str | Path) -> Path: ...
    @checked
    def pull_artifact(self, artifact_id: str, to: str | Path | None = None) -> bytes | Path:
        """Return an artifact as it lies on the disk: sealed.

        Args:
            artifact_id: Its id, or its name.
            to: Copy it to this file instead, whatever its size.

        Returns:
            The bytes, or the path.

        Raises:
            ArtifactNotFoundError: There is none.
            StorageError: The file cannot be written.
        """
        return self._transport.pull_artifact(artifact_id, None if to is None else Path(to))

    @checked
    def push_artifact(self, path: str | Path) -> SaveStateResult:
        """Take in a sealed file, from `pull_artifact` here or elsewhere.

        Raises:
            DecryptionError: It is no artifact, or was altered.
        """
        return self._transport.push_artifact(Path(path))

    @checked
    def delete_artifact(self, artifact_id: str) -> None:
        """Delete an artifact for good.

        Raises:
            ArtifactNotFoundError: There is none.
        """
        self._transport.delete_artifact(artifact_id)

    @checked
    def export_adapter(self, artifact_id: str, path: str | Path, merged: bool = False) -> Path:
        """Write a state in the clear, as a folder that plain PEFT (or, merged, plain transformers) loads.

        Args:
            artifact_id: Its id, or its name.
            path: A folder that does not exist yet, or is empty.
            merged: Write a whole model with the adapter added into its weights. States of clients that train all
                weights always are whole models.

        Returns:
            The folder.

        Raises:
            ArtifactNotFoundError: There is no such artifact.
            ModelLoadError: Its base model is not here.
            ValidationError: The folder holds something already.
        """
        return self._transport.export_adapter(artifact_id, Path(path), merged)

    def rotate_keys(self) -> int:
        """Wrap every artifact's own key with a new key; what is sealed is not written again.

        The local key file gets a new key, and keeps the old one, retired. With a key from the environment or a
        passphrase, the one that is set now takes over.

        Returns:
            How many artifacts were rewrapped.

        Raises:
            KeyUnavailableError: An artifact's present key is not here.
        """
        return self._transport.rotate_keys()

    # audit log

    @checked
    def get_audit_logs(
        self,
        training_client_id: str | None = None,
        operation: str | None = None,
        limit: int = 100,
        offset: int = 0,
    ) -> Sequence[AuditLogEntry]:
        """Return records of the audit log, newest first.

        Args:
            training_client_id: Only of this client.
            operation: Only of this verb.
            limit: At most so many.
            offset: Leave out so many of the newest.
        """
        for name, value in (("limit", limit), ("offset", offset)):
            if not isinstance(value, int) or value < 0:
                raise ValidationError(
                    f"get_audit_logs: {name}={as_given(value)} must be a whole number, 0 or more."
                )
        return Listing(
            self._transport.audit_logs(training_client_id, operation, limit, offset), row_of_record
        )

    @checked
    def verify_audit_log(self, anchors: Sequence[str] = ()) -> AuditVerification:
        """Check the audit log from its first record to its last.

        Args:
            anchors: Heads noted earlier (`verification.head`): they must still be in the log.
        """
        return self._transport.verify_audit_log((anchors,) if isinstance(anchors, str) else tuple(anchors))

    def close(self) -> None:
        """End the training clients of this process, and leave those of a server, which live on; idempotent."""
        self._closed = True
        for client in list(self._clients.values()):
            client.leave()
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await asyncio.to_thread(self.close)

    def _facts(self) -> Facts:
        clients = self._transport.list_training_clients()
        return {
            "core": self._core + (", closed" if self._closed else ""),
            "training clients": len(clients),
            **{
                info.training_client_id: f"{info.model_ref}, step {info.step}, {info.status}"
                for info in clients
            },
        }

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise ValidationError(
            "A ServiceClient belongs to this process and can be neither copied nor pickled: make one where you need it."
        )

    def __repr__(self) -> str:
        return (
            f"<ServiceClient {self._core}, {len(self._transport.list_training_clients())} training clients>"
        )


def row_of_artifact(artifact: SaveStateResult) -> Facts:
    """Return the columns of an artifact in a table of artifacts."""
    return {
        "artifact_id": artifact.artifact_id,
        "name": artifact.name,
        "step": artifact.step,
        "created_at": artifact.created_at,
        "size_bytes": artifact.size_bytes,
        "model_ref": artifact.model_ref,
        "saved_by": artifact.saved_by,
        "metadata": artifact.metadata,
    }


def row_of_record(record: AuditLogEntry) -> Facts:
    """Return the columns of an audit record in a table of them."""
    return {
        "seq": record.seq,
        "started_at": record.started_at,
        "training_client_id": record.training_client_id,
        "operation": record.operation,
        "success": record.success,
        "error_code": record.error_code,
        "duration_ms": record.duration_ms,
        "artifacts": (*record.artifact_ids_produced, *record.artifact_ids_consumed),
    }


def embedded_transport(home: Home, key_source: str | None, cluster: Any = None) -> "Transport":
    """Return the line to a core in this process.

    Raises:
        ValidationError: A cluster that is none.
    """
    if "torch" not in sys.modules:
        # OpenMP, asked before torch starts it, shall not spin while its threads wait for each other: on a shared
        # machine a spinning thread takes the core from the one it waits for. With two other busy processes on two
        # cores, 30 small steps took 97 s spinning and 5 s sleeping. A value the user has set stays.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from tensafe_nb.core.engines import MakesEngines
    from tensafe_nb.transports.embedded import EmbeddedTransport

    if cluster is not None and (isinstance(cluster, type) or not isinstance(cluster, MakesEngines)):
        raise ValidationError(
            f'cluster={as_given(cluster)}: give LocalCluster(engines=2), or RayCluster("auto", engines=4).'
        )
    return EmbeddedTransport(home, key_source, engines=cluster)


def http_transport(
    base_url: str,
    api_key: str | None,
    home: Home,
    key_source: str | None,
    patience: float,
    cluster: Any = None,
) -> "Transport":
    """Return the line to a server.

    Raises:
        ValidationError: No such address, or a key source or a cluster, which a server has of its own.
    """
    if cluster is not None:
        raise ValidationError(
            f"cluster={as_given(cluster)}: a server computes where it was told to: tensafe-nb serve --cluster "
            f"processes --engines 4 (or auto, on Ray). Leave it out here, or leave out base_url (and TENSAFE_BASE_URL)."
        )
    if key_source is not None:
        raise ValidationError(
            f"key_source={as_given(key_source)}: the keys of a remote core are the server's; leave it out."
        )
    if not base_url.startswith(("http://", "https://")):
        raise ValidationError(f"base_url={as_given(base_url)} must begin with http:// or https://.")
    from tensafe_nb.transports.http import HttpTransport

    return HttpTransport(base_url, api_key or os.environ.get("TENSAFE_API_KEY") or None, home, patience)
