"""What a notebook holds: a ServiceClient, and the TrainingClients it makes."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tensafe_nb.batch import BatchData
from tensafe_nb.config import MIN_TEMPERATURE, SamplingConfig, TrainingConfig
from tensafe_nb.data import Batches, Row, batches, read_prompts
from tensafe_nb.errors import ClientClosedError, TrainingClientNotFoundError, ValidationError
from tensafe_nb.events import Event, RunHistory, StatusChanged
from tensafe_nb.futures import FutureHandle
from tensafe_nb.registry import load_dotted
from tensafe_nb.runs import Batch, Loop, SupervisedLoop, TrainingRun
from tensafe_nb.transports.base import Channel, Transport
from tensafe_nb.types import (
    ClientStatus,
    ComputeLogprobs,
    Forward,
    ForwardBackward,
    ForwardBackwardResult,
    ForwardResult,
    LogprobsResult,
    Operation,
    OptimStep,
    OptimStepResult,
    Prompt,
    Sample,
    SampleResult,
    TrainingClientInfo,
)

LossSpec = str | Callable[..., Any]
JOIN_SECONDS = 5.0  # how long close() waits for a run that is inside the user's own code
VERBS = frozenset({"forward_backward", "forward", "optim_step", "sample", "compute_logprobs"})


class ServiceClient:
    """The way in: makes training clients.

    Args:
        base_url: A remote core; None (and no TENSAFE_BASE_URL) trains in this process.
        api_key: For a remote core; else TENSAFE_API_KEY.

    Raises:
        ValidationError: A remote core was asked for, which this version does not have yet.

    Example:
        >>> service = ServiceClient()
        >>> tc = service.create_training_client(model_ref="builtin:tiny", lora_config=LoRAConfig(rank=8))
    """

    def __init__(self, base_url: str | None = None, api_key: str | None = None) -> None:
        base_url = base_url or os.environ.get("TENSAFE_BASE_URL")
        if base_url is not None:
            raise ValidationError(
                f"A remote core ({base_url}) cannot be reached by this version: it trains in this process only. "
                f"Call ServiceClient() without base_url, and unset TENSAFE_BASE_URL."
            )
        _let_waiting_threads_sleep()
        from tensafe_nb.transports.embedded import EmbeddedTransport

        self._transport: Transport = EmbeddedTransport()
        self._clients: dict[str, TrainingClient] = {}
        self._closed = False

    def create_training_client(self, config: TrainingConfig | None = None, **fields: Any) -> "TrainingClient":
        """Make a training client. Returns at once; its model loads in the background.

        Before you load a transformers model of your own, wait for it (`await tc.ready()`): transformers patches torch
        while it loads, and two loads at once corrupt each other.

        Args:
            config: What to train; None for the defaults.
            fields: Fields of TrainingConfig, instead of or on top of `config`.

        Raises:
            ValidationError: A field that does not fit.
        """
        if config is not None and not isinstance(config, TrainingConfig):
            raise ValidationError(
                f"create_training_client takes a TrainingConfig, or its fields as keywords, not {config!r}."
            )
        if self._closed:
            raise ClientClosedError("This ServiceClient is closed. Create a new one: ServiceClient().")
        config = TrainingConfig(**fields) if config is None else config.replace(**fields)
        client = TrainingClient(self._transport.create(config))
        self._clients[client.training_client_id] = client
        return client

    def list_training_clients(self) -> list[TrainingClientInfo]:
        """Return the training clients that are not closed, oldest first."""
        return [channel.info() for channel in self._transport.channels()]

    def get_training_client(self, training_client_id: str) -> "TrainingClient":
        """Return a training client by its id.

        Raises:
            TrainingClientNotFoundError: This service has none of that id.
        """
        if training_client_id not in self._clients:
            raise TrainingClientNotFoundError(
                f"There is no training client {training_client_id!r} in this process. Known: {sorted(self._clients)}. "
                f"The history of earlier ones is in list_runs()."
            )
        return self._clients[training_client_id]

    def close(self) -> None:
        """Close every training client of this service; idempotent."""
        self._closed = True
        for client in self._clients.values():
            client.close()
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await asyncio.to_thread(self.close)

    def __repr__(self) -> str:
        return f"<ServiceClient embedded, {len(self._transport.channels())} training clients>"


class TrainingClient:
    """One model in training. Every verb queues an operation and returns a FutureHandle at once.

    Operations run in the order they were submitted. Made by `ServiceClient.create_training_client`.

    Example:
        >>> loss = tc.forward_backward(batch)
        >>> step = tc.optim_step()          # queued behind it: no need to wait in between
        >>> print((await loss).loss, (await step).step)
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._runs: list[TrainingRun] = []

    # verbs

    def forward_backward(
        self, batch: Batch, loss_fn: LossSpec | None = None, loss_kwargs: Mapping[str, Any] | None = None
    ) -> FutureHandle[ForwardBackwardResult]:
        """Compute the loss of a batch and add its gradient to what is accumulated.

        Args:
            batch: A BatchData, or a dict of `input_ids`, `attention_mask`, `labels` (B, T) and what the loss needs.
            loss_fn: A registered name, "package.module:attribute" or a callable; token cross entropy when None.
            loss_kwargs: Keywords of the loss.

        Raises:
            ValidationError: A batch or loss that does not fit.
        """
        return self._submit(ForwardBackward(BatchData.of(batch), loss_fn, dict(loss_kwargs or {})))

    def forward(
        self,
        batch: Batch,
        loss_fn: LossSpec | None = None,
        loss_kwargs: Mapping[str, Any] | None = None,
        *,
        return_logprobs: bool = False,
    ) -> FutureHandle[ForwardResult]:
        """Compute the loss of a batch in evaluation mode, without gradients.

        Args:
            batch: As for `forward_backward`.
            loss_fn: As for `forward_backward`.
            loss_kwargs: Keywords of the loss.
            return_logprobs: Also return each label's log-probability, (B, T).
        """
        return self._submit(Forward(BatchData.of(batch), loss_fn, dict(loss_kwargs or {}), return_logprobs))

    def optim_step(self, apply_dp_noise: bool = True) -> FutureHandle[OptimStepResult]:
        """Apply the accumulated gradients with the optimiser.

        Args:
            apply_dp_noise: Has no effect on a client without differential privacy.
        """
        if not isinstance(apply_dp_noise, bool):
            raise ValidationError(f"optim_step(apply_dp_noise=…) is True or False, not {apply_dp_noise!r}.")
        return self._submit(OptimStep(apply_dp_noise))

    def sample(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingConfig | None = None,
        **fields: Any,
    ) -> FutureHandle[SampleResult]:
        """Draw completions.

        Args:
            prompts: A text, a list of chat messages or of token ids, or a list of any of these.
            sampling: How to draw.
            fields: Fields of SamplingConfig, instead of or on top of `sampling`.

        Raises:
            ValidationError: No prompt, or a field that does not fit.
        """
        if sampling is not None and not isinstance(sampling, SamplingConfig):
            raise ValidationError(
                f"sample() takes a SamplingConfig, or its fields as keywords, not {sampling!r}."
            )
        config = SamplingConfig(**fields) if sampling is None else sampling.replace(**fields)
        return self._submit(Sample(read_prompts(prompts), config))

    def compute_logprobs(
        self, batch: Batch, reference: bool = False, *, temperature: float = 1.0
    ) -> FutureHandle[LogprobsResult]:
        """Score a batch's labels: log-probabilities and exact entropies, (B, T).

        Args:
            batch: As for `forward_backward`.
            reference: Score under the frozen base weights (LoRA clients).
            temperature: Divides the logits.
        """
        if not temperature >= MIN_TEMPERATURE:
            raise ValidationError(
                f"compute_logprobs: temperature={temperature} must be at least {MIN_TEMPERATURE}."
            )
        return self._submit(ComputeLogprobs(BatchData.of(batch), temperature, reference))

    # data and runs

    def batches(
        self, source: str | Path | Iterable[Row], *, max_length: int | None = None, seed: int = 0
    ) -> Batches:
        """Tokenise rows for this model and batch them, `config.batch_size` rows each; see `tensafe_nb.data.batches`."""
        return batches(
            source, self.tokenizer, batch_size=self.config.batch_size, max_length=max_length, seed=seed
        )

    def fit(
        self,
        batches: Iterable[Batch],
        *,
        epochs: int | None = None,
        steps: int | None = None,
        eval_batches: Iterable[Batch] | None = None,
        eval_every: int | None = None,
        show: bool = True,
    ) -> TrainingRun:
        """Train on batches. Returns at once with a run that can be awaited, paused and stopped.

        Args:
            batches: Iterated anew for each epoch; `gradient_accumulation_steps` of them make one optimiser step.
            epochs: Passes over the batches; 1 when `steps` is not given either.
            steps: Optimiser steps after which to end.
            eval_batches: Held-out batches; their loss appears as "eval/loss" before the first and after the last step.
            eval_every: Evaluate every so many steps as well.
            show: Show the progress: a bar, or plain lines where the output is no terminal.

        Raises:
            ValidationError: A number that is not positive.
        """
        for name, value in (("epochs", epochs), ("steps", steps), ("eval_every", eval_every)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValidationError(f"fit: {name}={value!r} must be a whole number, at least 1.")
        if eval_every is not None and eval_batches is None:
            raise ValidationError(f"fit: eval_every={eval_every} needs eval_batches.")
        for name, given in (("batches", batches), ("eval_batches", eval_batches or ())):
            if isinstance(given, BatchData | Mapping | str) or not isinstance(given, Iterable):
                raise ValidationError(
                    f"fit: {name} is a list of batches (or another iterable), not {given!r}."
                )
        loop = SupervisedLoop(
            self, batches, epochs=epochs, steps=steps, eval_batches=eval_batches, eval_every=eval_every
        )
        return self.start_run(loop, planned_steps=loop.planned_steps, show=show)

    def start_run(self, loop: Loop, *, planned_steps: int | None = None, show: bool = True) -> TrainingRun:
        """Run a loop of your own on a thread of its own; `fit` and `RLVRTrainer` are made of this."""
        if self.status is ClientStatus.TERMINATED:
            raise ClientClosedError(
                f"The training client {self.training_client_id} is closed. Create a new one."
            )
        if self._runs and not self._runs[-1].done():
            raise ValidationError(
                f"The run {self._runs[-1].run_id} is still under way, and two would mix their steps. "
                f"Await it, or stop() it first; another model can train at the same time on a client of its own."
            )
        run = TrainingRun(self, loop, len(self._runs) + 1, planned_steps)
        self._runs.append(run)
        if show:
            load_dotted("tensafe_nb.widgets:show_run")(run)
        return run.start()

    @property
    def runs(self) -> tuple[TrainingRun, ...]:
        """The runs started on this client."""
        return tuple(self._runs)

    # state

    @property
    def training_client_id(self) -> str:
        """Names this client in logs, runs and handles."""
        return self._channel.training_client_id

    @property
    def config(self) -> TrainingConfig:
        """What it was made of."""
        return self._channel.config

    @property
    def status(self) -> ClientStatus:
        """INITIALIZING, READY, BUSY, ERROR or TERMINATED."""
        return ClientStatus(self._channel.info().status)

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return self._channel.step

    @property
    def policy_version(self) -> int:
        """Version of the weights; every change of them counts one up."""
        return self._channel.policy_version

    @property
    def dp_metrics(self) -> None:
        """None: this client trains without differential privacy."""
        return None

    @property
    def capabilities(self) -> frozenset[str]:
        """The verbs its core knows."""
        return VERBS

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; waits for the model to be loaded."""
        self._channel.loaded.wait()
        return self._channel.loaded.outcome()

    def refresh(self) -> TrainingClientInfo:
        """Read the core's state now."""
        return self._channel.info()

    async def ready(self) -> None:
        """Wait until the model is loaded.

        Raises:
            ModelLoadError: It could not be loaded.
        """
        await self._channel.loaded.wait_async()
        self._channel.loaded.outcome()

    # events

    @property
    def history(self) -> RunHistory:
        """Every metric as a curve, every event by number; outlives the process."""
        return self._channel.bus.history

    async def events(self, after: int = 0) -> AsyncIterator[Event]:
        """Iterate over what happened since event number `after`, then over what happens, until the client is closed."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event] = asyncio.Queue()
        unsubscribe = self.subscribe(lambda event: _put(loop, queue, event), after=after)
        try:
            while True:
                event = await queue.get()
                yield event
                if isinstance(event, StatusChanged) and event.status == ClientStatus.TERMINATED:
                    return
        finally:
            unsubscribe()

    def subscribe(self, subscriber: Callable[[Event], None], after: int | None = None) -> Callable[[], None]:
        """Call `subscriber(event)` on every event, at once and on whatever thread it happens; see `events()`.

        A subscriber must be quick, and must neither submit operations nor wait for them.

        Returns:
            A function that ends the subscription.
        """
        return self._channel.bus.subscribe(subscriber, after)

    def publish(self, event: Event) -> Event:
        """Record an event of your own in the history, for instance Metrics."""
        return self._channel.bus.publish(event)

    def sync_events(self) -> None:
        """Put every recorded event on the disk."""
        self._channel.bus.sync()

    # how it looks in a notebook

    def dashboard(self) -> Any:
        """Return the live panel of this client: a widget, to place or to show again."""
        return load_dotted("tensafe_nb.widgets:panel")(self)

    def _repr_mimebundle_(self, **_: Any) -> Any:
        return load_dotted("tensafe_nb.widgets:mimebundle")(self)

    # the end

    def close(self) -> None:
        """Stop the runs, cancel what waits, end the threads, free the memory; idempotent."""
        for run in self._runs:
            run.stop()
        self._channel.close()
        for run in self._runs:
            run.join(timeout=JOIN_SECONDS)
        self._channel.bus.close()
        if "tensafe_nb.widgets" in sys.modules:  # something may be showing this client: let it show the end
            load_dotted("tensafe_nb.widgets:settle")(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await asyncio.to_thread(self.close)

    def __repr__(self) -> str:
        adapter = f"LoRA r{self.config.lora_config.rank}" if self.config.lora_config else "all weights"
        return (
            f"<TrainingClient {self.training_client_id} {self.config.model_ref} {adapter}, "
            f"step {self.step}, {self.status}>"
        )

    def _submit(self, operation: Operation) -> FutureHandle[Any]:
        return self._channel.submit(operation)


def _let_waiting_threads_sleep() -> None:
    """Ask OpenMP, before torch is first imported, not to spin while its threads wait for each other.

    On a shared machine a spinning thread takes the core from the one it waits for: with two other busy processes
    on two cores, 30 small steps took 97 s spinning and 5 s sleeping. A value the user has set stays.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _put(loop: asyncio.AbstractEventLoop, queue: "asyncio.Queue[Event]", event: Event) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(queue.put_nowait, event)
