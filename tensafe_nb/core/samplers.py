"""Sampling without a training client: from the weights that a checkpoint holds, or from a model as it is.

Engines share the frozen weights of their base, and checkpoints of adapters of one shape share an engine: the weights
of whichever is asked for are put in. Each engine has a thread of its own. On it, requests of the same weights are drawn
together, and those of other weights have their turn in the order in which the first of them came: nobody waits for more
than what the others had asked for before.
"""

import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from tensafe_nb.config import LoRAConfig, OptimizerConfig, SamplingConfig, TrainingConfig
from tensafe_nb.core import checkpoints
from tensafe_nb.core.auditor import request_buffers
from tensafe_nb.core.engines import MakesEngines, Trains
from tensafe_nb.core.executor import told_to_its_end
from tensafe_nb.engine.accumulation import Tick
from tensafe_nb.engine.models import adapter_folders
from tensafe_nb.engine.models import load as models
from tensafe_nb.engine.models.memory import presentable
from tensafe_nb.engine.sampling import llama_cpp
from tensafe_nb.engine.sampling.sampler import SampleCall
from tensafe_nb.errors import ClientClosedError, FutureCancelledError, TGTinkerError
from tensafe_nb.futures import FutureHandle, Promise, handle_of
from tensafe_nb.protocol.operations import Sample, SampleFrom
from tensafe_nb.protocol.results import FutureStatus, SampledPiece, SampleResult
from tensafe_nb.store.audit.log import outcome_of
from tensafe_nb.store.vault import Vault

MOST_ENGINES = 4  # that a tenant has in memory
UNTRAINED = LoRAConfig(
    rank=1
)  # adds nothing to a base, whose weights are then shared with those who train it
NO_STEPS = OptimizerConfig(name="sgd")


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """The weights that a request samples from.

    Attributes:
        config: Of an engine that they fit.
        artifact_id: The checkpoint that holds them; None for a model as it is.
    """

    config: TrainingConfig
    artifact_id: str | None

    @property
    def key(self) -> str:
        """What is equal for those that share an engine."""
        return f"{self.artifact_id is None} {self.config.model_dump_json()}"


class Samplers:
    """Serves what is sampled from the stored weights of one tenant.

    Args:
        vault: Where they are kept.
        engines: Makes the engines.
        served: Their tokenizers are given to nobody in this process.
    """

    def __init__(self, vault: Vault, engines: MakesEngines, *, served: bool = False) -> None:
        self._vault, self._engines, self._served = vault, engines, served
        self._hosts: OrderedDict[str, SamplerHost] = OrderedDict()  # the one that was asked last stands last
        self._lock, self._closed = threading.Lock(), False

    def weights(self, artifact_id: str | None, model_ref: str | None) -> StoredWeights:
        """Return which weights are named: by a checkpoint's id or name, or by a model's.

        Raises:
            ArtifactNotFoundError: There is no such artifact.
            ValidationError: The artifact holds no training state.
        """
        if model_ref is not None:
            lora = adapter_folders.announced(model_ref, None) or UNTRAINED
            return StoredWeights(TrainingConfig(model_ref=model_ref, lora_config=lora), None)
        found = self._vault.artifacts.resolve(str(artifact_id))
        saved = checkpoints.config_of(self._vault.artifacts, found)
        of_model = ("model_ref", "lora_config", "dtype", "device", "value_head", "resize_embeddings")
        kept = {name: getattr(saved, name) for name in (*of_model, "ignore_weights", "micro_batch_tokens")}
        return StoredWeights(TrainingConfig(optimizer=NO_STEPS, **kept), found)

    def submit(self, request: SampleFrom, weights: StoredWeights | None = None) -> FutureHandle[SampleResult]:
        """Queue a request, and return its handle at once; what is streamed comes as pieces of it.

        Args:
            request: What to draw, and from what.
            weights: Which those are, where that is known already.

        Raises:
            ClientClosedError: This was closed.
            ArtifactNotFoundError: There is no such artifact.
            ValidationError: The engine that is to sample is not there, or cannot sample those weights.
        """
        weights = weights or self.weights(request.artifact_id, request.model_ref)
        llama_cpp.check(request.sample.sampling, weights.config)
        promise: Promise[SampleResult] = Promise(streams=request.sample.stream)

        def cancel() -> bool:
            promise.cancel_requested = True
            if not promise.cancel_pending():
                promise.wait()
            return promise.state is FutureStatus.CANCELLED

        with self._lock:
            self._host(weights).submit(request.sample, weights.artifact_id, promise)
        return handle_of(
            promise, "sample", weights.artifact_id or weights.config.model_ref, SampleResult, cancel
        )

    def introduction(self, weights: StoredWeights) -> tuple[Any, int | None]:
        """Return the tokenizer of a model, and how many tokens it reads; waits until it is loaded.

        Raises:
            ModelLoadError: It cannot be.
        """
        with self._lock:
            coming = self._host(weights).introduction()
        return coming.result()

    def _host(self, weights: StoredWeights) -> "SamplerHost":
        """Return what serves some weights, made if need be; under the lock."""
        if self._closed:
            raise ClientClosedError("This ServiceClient is closed. Create a new one: ServiceClient().")
        host = self._hosts.pop(weights.key, None) or SamplerHost(weights.config, self)
        self._hosts[weights.key] = host
        while len(self._hosts) > MOST_ENGINES:
            self._hosts.popitem(last=False)[1].end()
        return host

    def make(self, config: TrainingConfig, tick: Tick) -> Trains:
        """Load a model, and return an engine of it."""
        try:
            return self._engines.make(
                config, self._vault.home, None, lambda _: None, tick, served=self._served
            )
        except Exception as error:
            raise models.refuse(error, config.model_ref) from error

    def put(self, engine: Trains, artifact_id: str) -> int:
        """Put the weights of a checkpoint into an engine; return their version."""
        return checkpoints.put_weights(engine, self._vault.artifacts, artifact_id)

    def record(self, request: Sample, artifact_id: str | None, began: float, outcome: object) -> None:
        """Put a request that has ended on record in the audit log."""
        self._vault.audit.append(
            operation=request.verb,
            request=tuple(request_buffers(request)),
            consumed=() if artifact_id is None else (artifact_id,),
            started_at=began,
            completed_at=time.time(),
            **outcome_of(outcome if isinstance(outcome, BaseException) else None),
        )

    def put_away(self, seconds: float) -> None:
        """Let go of the engines that nobody has used for so long."""
        with self._lock:
            for key, host in list(self._hosts.items()):
                if host.is_idle(seconds):
                    self._hosts.pop(key).end()

    def close(self) -> None:
        """Cancel what waits and what runs, and let go of all engines; idempotent."""
        with self._lock:
            self._closed = True
            hosts, self._hosts = list(self._hosts.values()), OrderedDict()
        for host in hosts:
            host.close()


@dataclass(slots=True, eq=False)
class Request:
    """What somebody has asked, and waits for.

    Attributes:
        sample: What to draw.
        artifact_id: From whose weights.
        promise: Of the result.
        number: How many came before.
        began: When it had its turn.
    """

    sample: Sample
    artifact_id: str | None
    promise: Promise[SampleResult]
    number: int
    began: float = 0.0

    @property
    def sampling(self) -> SamplingConfig:
        """How to draw; the engine's own streams begin anew with each checkpoint, so that it gets a seed here."""
        config = self.sample.sampling
        return config if config.seed is not None else config.replace(seed=secrets.randbits(48))

    @property
    def tell(self) -> Callable[[SampledPiece], None] | None:
        return self.promise.add_piece if self.sample.stream else None


class SamplerHost:
    """An engine into which stored weights are put, and the thread on which it samples.

    Args:
        config: What to load.
        samplers: Loads it, finds weights, keeps the record.
    """

    def __init__(self, config: TrainingConfig, samplers: Samplers) -> None:
        self._config, self._samplers = config, samplers
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tsnb-sampler")
        self._engine: Trains | None = None
        self._holds: tuple[str | None, int] = (None, 0)  # whose weights, and their version
        self._introduction: Future[tuple[Any, int | None]] | None = None
        self._lock, self._waiting = threading.Lock(), deque[Request]()
        self._arrived = self._ended = 0
        self._introducing = self._closing = False
        self._used = time.monotonic()

    def submit(self, request: Sample, artifact_id: str | None, promise: Promise[SampleResult]) -> None:
        """Serve a request in its turn."""
        with self._lock:
            self._arrived += 1
            self._waiting.append(Request(request, artifact_id, promise, self._arrived))
        self._thread.submit(self._serve)

    def introduction(self) -> "Future[tuple[Any, int | None]]":
        """Return what comes to be the tokenizer and the context of its model: after the first time, at once."""
        known = self._introduction
        if known is None or (known.done() and known.exception() is not None):
            self._introducing = True
            self._introduction = known = self._thread.submit(self._introduce)
        return known

    def is_idle(self, seconds: float) -> bool:
        """Whether nobody has used it for so long."""
        return self._arrived == self._ended and time.monotonic() - self._used > seconds

    def end(self) -> None:
        """Let go of the engine, behind what it was asked for."""
        self._thread.submit(self._let_go)
        self._thread.shutdown(wait=False)

    def close(self) -> None:
        """Cancel what it was asked for, and let go of the engine."""
        self._closing = True
        self._thread.submit(self._let_go)
        self._thread.shutdown()

    # on its thread

    def _introduce(self) -> tuple[Any, int | None]:
        def tick(done: int, total: int) -> None:
            if self._closing:
                raise FutureCancelledError("closed while the model was being loaded")

        self._introducing = False
        tick(0, 1)
        self._used = time.monotonic()
        engine = self._loaded(tick)
        return engine.tokenizer, engine.about["context"]

    def _loaded(self, tick: Tick) -> Trains:
        if self._engine is None:
            self._engine, self._holds = self._samplers.make(self._config, tick), (None, 0)
        return self._engine

    def _let_go(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _serve(self) -> None:
        """Serve who has waited longest, and together with it those who ask for the same weights."""
        first = self._next(lambda _: True)
        if first is None or not self._begin(first):
            return  # it was served together with others, or cancelled
        try:
            engine = self._loaded(self._tick(first))
            if first.artifact_id is not None and self._holds[0] != first.artifact_id:
                self._holds = first.artifact_id, self._samplers.put(engine, first.artifact_id)
            kind = engine.kind_of(first.sample.sampling, len(first.sample.prompts))
            if kind is not None:
                self._serve_together(engine, first, kind)
                return
            asked = first.sample
            result = engine.sample(asked.prompts, first.sampling, self._tick(first), first.tell)
        except Exception as error:  # noqa: BLE001  # any failure is the future's, never the thread's
            self._end(first, presentable(error))
        else:
            self._end(first, result)

    def _serve_together(self, engine: Trains, first: Request, kind: str) -> None:
        """Draw for a request and for those that may join it; each ends by itself."""
        until, drawing = self._arrived, dict[SampleCall, Request]()

        def fits(other: Request) -> bool:
            same = other.artifact_id == first.artifact_id
            return same and engine.kind_of(other.sample.sampling, len(other.sample.prompts)) == kind

        def call_of(request: Request) -> SampleCall | None:
            try:
                call = engine.call(
                    request.sample.prompts, request.sampling, self._tick(request), request.tell
                )
            except Exception as error:  # noqa: BLE001  # any failure is the future's, never the thread's
                self._end(request, presentable(error))
                return None
            drawing[call] = request
            return call

        def newcomer() -> SampleCall | None:
            while (request := self._next(fits, until)) is not None:
                if self._begin(request) and (call := call_of(request)) is not None:
                    return call
            return None

        def ended(call: SampleCall) -> None:
            request = drawing.pop(call)
            try:
                result = call.result()
            except Exception as error:  # noqa: BLE001  # any failure is the future's, never the thread's
                self._end(request, presentable(error))
            else:
                self._end(request, result)

        with engine.together(kind) as together:
            if (call := call_of(first)) is not None:
                together.add(call)
            together.run(newcomer, ended)

    def _next(self, fits: Callable[[Request], bool], until: int = 0) -> Request | None:
        """Take the first who waits and fits: before all others, or one of those who had come until some time."""
        with self._lock:
            if self._introducing and until:
                return None
            for place, request in enumerate(self._waiting):
                if (place == 0 or request.number <= until) and fits(request):
                    del self._waiting[place]
                    return request
        return None

    def _begin(self, request: Request) -> bool:
        request.began = time.time()
        if (self._closing and request.promise.cancel()) or not request.promise.start():
            self._note_end()
            return False
        return True

    def _tick(self, request: Request) -> Tick:
        def tick(done: int, total: int) -> None:
            if request.promise.cancel_requested or self._closing:
                raise FutureCancelledError("cancelled while running")
            request.promise.progress = done, total

        return tick

    def _end(self, request: Request, outcome: SampleResult | BaseException) -> None:
        promise = request.promise
        try:
            if isinstance(outcome, SampleResult):
                told = told_to_its_end(promise, outcome, stream=request.sample.stream)
                outcome = replace(told, policy_version=self._holds[1])
            self._samplers.record(request.sample, request.artifact_id, request.began, outcome)
        except TGTinkerError as error:  # what cannot be put on record is not handed out
            outcome = error
        finally:
            self._note_end()
        if isinstance(outcome, SampleResult):
            promise.succeed(outcome)
        elif isinstance(outcome, FutureCancelledError):
            promise.cancel()
        else:
            promise.fail(outcome)

    def _note_end(self) -> None:
        self._ended, self._used = self._ended + 1, time.monotonic()
