"""One model in training: forward, backward, optimiser step, sampling. Synchronous; knows no queue and no widget."""

import base64
import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tensafe_nb.config import UNCHANGED, SamplingConfig, StepConfig, TrainingConfig
from tensafe_nb.data.labels import TurnEnd
from tensafe_nb.display import as_given
from tensafe_nb.engine.accumulation import Tally, Tick, Window, no_tick, place
from tensafe_nb.engine.estimate import estimate
from tensafe_nb.engine.forward import ForwardPass
from tensafe_nb.engine.models import adapters, inputs
from tensafe_nb.engine.models.load import LoadedModel, load
from tensafe_nb.engine.models.low_rank import Factors, factors_of
from tensafe_nb.engine.optimizers import Optimizer
from tensafe_nb.engine.plain_step import PlainStep
from tensafe_nb.engine.private_step import Account, AwaitingAccount, PrivateStep
from tensafe_nb.engine.reference import Reference
from tensafe_nb.engine.sampling import sampler
from tensafe_nb.engine.sampling.copies import KeptCopies, precision_of, prepare
from tensafe_nb.engine.sampling.prefixes import Prefixes
from tensafe_nb.engine.sampling.prompts import ReadPrompts, read_prompts
from tensafe_nb.engine.state import EngineState, check_tensors, fingerprint
from tensafe_nb.errors import ValidationError, nearest
from tensafe_nb.losses import Loss
from tensafe_nb.losses.views import logprobs_and_entropy
from tensafe_nb.protocol.batch import IGNORE, REFERENCE, Array, BatchData
from tensafe_nb.protocol.results import (
    ForwardBackwardResult,
    ForwardResult,
    FreezeReferenceResult,
    LoadAdapterResult,
    LogprobsResult,
    OptimStepResult,
    Prompt,
    ReadAdapterResult,
    SampleResult,
    StepEstimate,
)

if TYPE_CHECKING:
    from tensafe_nb.engine.sampling.llama_cpp import Policy


class TrainingStep(Protocol):
    """A kind of training step: with differential privacy, or without.

    Attributes:
        window: What has been accumulated since the last optimiser step.
        resumable: Whether a checkpoint takes the open window and the dropout streams along. Those of private training
            it leaves out: its gradients carry no noise yet, and nothing random of it may be repeated.
    """

    window: Window
    resumable: bool

    def forward_backward(
        self, batch: BatchData, loss: Loss, tick: Tick, return_logprobs: bool = False, /
    ) -> ForwardBackwardResult: ...
    def optim_step(self, apply_dp_noise: bool, step: StepConfig, /) -> OptimStepResult: ...
    def discard(self) -> None: ...

    def trial(self, batch: BatchData, loss: Loss, /) -> tuple[int, Callable[[Callable[[], None]], None]]:
        """Return how many rows are computed at once, and what computes a batch's gradient and drops it.

        The function calls back between its forward and its backward pass; it leaves the engine as it was.
        """

    def peak_bytes(self, forward: float, whole: float, gradients: int, pieces: int, /) -> float:
        """Return the most bytes that a step holds.

        Args:
            forward: That the forward pass of one of its pieces holds.
            whole: That a piece holds.
            gradients: Of the gradients.
            pieces: How many there are.
        """

    def rehearse(self, gradients: list[Tensor], /) -> None:
        """Do to tensors like the gradients what a step does to those, before the optimiser takes them."""


class Engine:
    """A model, its adapters, its optimiser and its random streams.

    Args:
        config: What to load and how to train it.
        model: The model, where it is there already: a copy that shares another's frozen weights.

    Attributes:
        forward_pass: What computes with the model.
        optimizer: What moves its weights.
        training_step: How it learns: a plain step, or a private one.
        reference: The policy that a KL penalty pulls towards.
        samples_drawn: How many calls have taken their seed from the client's.
        prefixes: What was read, and may be the beginning of prompts to come, until anything else is computed.
        turns: What was read of conversations that are drawn by themselves, likewise.
        copied: Copies of the weights that sample, until anything else is computed.
        llama_cpp: The model as llama.cpp has it, once that has sampled.

    Raises:
        ModelLoadError: The model cannot be loaded.
        ValidationError: The adapter does not fit it.
    """

    def __init__(self, config: TrainingConfig, model: LoadedModel | None = None) -> None:
        self.model = load(config) if model is None else model
        prepare(self.model)
        # a folder brings its adapter, of which the configuration may say less, or nothing
        brought = self.model.lora
        self.config = config if brought is None else config.replace(lora_config=brought)
        self.parameters = [parameter for _, parameter in self.model.trainable]
        self.forward_pass = ForwardPass(self.model, self.config)
        self.optimizer = Optimizer(config.optimizer, self.parameters)
        self.reference = Reference(self.model, self.config.lora_config)
        if self.model.continued:
            self.reference.freeze(0)  # where training begins is the base with its adapter, not the bare base
        self.samples_drawn = 0
        self.prefixes: Prefixes | None = None
        self.turns: Prefixes | None = None
        self.copied: KeptCopies | None = None
        self.llama_cpp: Policy | None = None
        private = config.dp_config is not None and config.dp_config.enabled
        self.training_step: TrainingStep = (
            AwaitingAccount() if private else PlainStep(self.forward_pass, self.optimizer)
        )

    def train_privately(self, account: Account, client_id: str) -> None:
        """Train with the differential privacy that the configuration asks for; until then, nothing is trained."""
        self.training_step = PrivateStep(self.forward_pass, self.optimizer, self.config, account, client_id)

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return self.optimizer.step

    @property
    def policy_version(self) -> int:
        """Version of the weights."""
        return self.optimizer.policy_version

    @property
    def window(self) -> Window:
        """What has been accumulated since the last optimiser step."""
        return self.training_step.window

    @property
    def resumable(self) -> bool:
        """Whether a checkpoint takes the open window and the dropout streams along; see `TrainingStep`."""
        return self.training_step.resumable

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.model.tokenizer

    @property
    def holder(self) -> object:
        """Whose end sets the weights' memory free."""
        return self.model.causal

    @property
    def about(self) -> dict[str, Any]:
        """What there is to tell of the model, as plain data."""
        return {
            "device": self.model.device.type,
            "precision": self.model.precision,
            "context": self.model.context,
            "trained_parameters": sum(parameter.numel() for parameter in self.parameters),
        }

    def factors(self, layers: Sequence[int], modules: Sequence[str] | None) -> Factors:
        """Return the adapters of some layers as matrices; see `factors_of`."""
        return factors_of(self.model, layers, modules)

    # training

    def forward_backward(
        self, batch: BatchData, loss: Loss, tick: Tick = no_tick, return_logprobs: bool = False
    ) -> ForwardBackwardResult:
        """Add the gradient of a batch's loss to the window; return per-token logprobs (B, T) as well if asked.

        On any failure, a cancelling `tick` included, what the window holds is dropped.

        Raises:
            ValidationError: Tokens outside the vocabulary, or a loss that does not fit.
            NonFiniteLossError: The loss or its gradient is NaN or infinite; says in which rows.
            PrivacyUnitError: Privately, rows that do not say whose they are, or a loss that mixes them.
        """
        self.prefixes = self.turns = self.copied = None
        try:
            batch = self.with_reference(batch, loss, tick)
        except BaseException:
            self.discard_gradients()
            raise
        return self.training_step.forward_backward(batch, loss, tick, return_logprobs)

    def optim_step(self, apply_dp_noise: bool = True, step: StepConfig = UNCHANGED) -> OptimStepResult:
        """Clip the mean gradient of the window, and take one optimiser step with it.

        Args:
            apply_dp_noise: See `TrainingClient.optim_step`.
            step: What this step does otherwise than the client's OptimizerConfig says.

        Raises:
            ValidationError: The window is empty, or the optimiser has no such setting.
            DPBudgetExceededError: Privately, a step beyond the budget. No weight has moved.
        """
        return self.training_step.optim_step(apply_dp_noise, step)

    def discard_gradients(self) -> None:
        """Drop what has been accumulated; the next window starts clean."""
        self.training_step.discard()

    def estimate(self, batch_size: int | None = None, length: int | None = None) -> StepEstimate:
        """Return what a training step takes; see `estimate`."""
        return estimate(self, batch_size, length)

    def close(self) -> None:
        """Nothing of it works by itself: it ends with whoever holds it."""

    # scoring and sampling

    @torch.no_grad()
    def forward(
        self, batch: BatchData, loss: Loss, return_logprobs: bool = False, tick: Tick = no_tick
    ) -> ForwardResult:
        """Evaluate a loss without dropout or gradients; with per-token logprobs (B, T) when asked for."""
        tally = self.evaluate(batch, loss, return_logprobs, tick)
        labelled = int((batch.labels != IGNORE).sum())
        return ForwardResult(tally.loss, labelled, tally.metrics, tally.logprobs, tally.weight)

    @torch.no_grad()
    def evaluate(
        self,
        batch: BatchData,
        loss: Loss,
        return_logprobs: bool,
        tick: Tick,
        pieces: Sequence[Array] | None = None,
    ) -> Tally:
        """Return what a loss adds up to over a batch, or over some pieces of it, with the logprobs (B, T) if asked."""
        self.prefixes = self.turns = self.copied = None
        self.forward_pass.check(batch)
        batch = self.with_reference(batch, loss, tick, pieces)
        loss.check(batch)
        tally = Tally.of(loss, batch, logprobs=return_logprobs)
        for rows, part in self.forward_pass.micro_batches(batch, loss, tick, pieces):
            outputs, value = self.forward_pass.evaluate(part, batch, loss)
            tally.add(value, value.total.item())
            tally.collect(outputs, batch, rows)
            del outputs, value  # its logits can be large: let go of them before the next piece's are computed
        return tally

    @torch.no_grad()
    def compute_logprobs(
        self,
        batch: BatchData,
        temperature: float = 1.0,
        reference: bool = False,
        tick: Tick = no_tick,
        pieces: Sequence[Array] | None = None,
    ) -> LogprobsResult:
        """Score a batch's labels: logprobs, exact entropy and the value head's estimates, (B, T), at a temperature.

        Args:
            batch: What to score.
            temperature: Divides the logits.
            reference: Score under the reference's weights: the base without adapter, or a frozen copy.
            tick: Called between micro-batches.
            pieces: The row numbers of the micro-batches, where not the whole batch is meant: the rest stays 0.
        """
        self.prefixes = self.turns = self.copied = None
        self.forward_pass.check(batch)
        logprobs, entropy = (np.zeros(batch.shape, dtype=np.float32) for _ in range(2))
        values = np.zeros(batch.shape, dtype=np.float32) if self.model.value_head and not reference else None
        with self.reference.in_place() if reference else contextlib.nullcontext():
            for rows, part in self.forward_pass.micro_batches(batch, None, tick, pieces):
                outputs = self.forward_pass.outputs(part, self.forward_pass.tensors(part, batch))
                picked, spread = logprobs_and_entropy(outputs, temperature)
                place(logprobs, batch, rows, picked)
                place(entropy, batch, rows, spread)
                if values is not None:
                    place(values, batch, rows, outputs.values)
                del outputs  # its logits can be large: let go of them before the next piece's are computed
        return LogprobsResult(logprobs, entropy, None if reference else self.policy_version, values)

    @torch.no_grad()
    def with_reference(
        self, batch: BatchData, loss: Loss, tick: Tick, pieces: Sequence[Array] | None = None
    ) -> BatchData:
        """Return a batch with what the reference says of its rows, where the loss compares with that; see `Reference`.

        Computed in the same pieces as the loss, without dropout: an adapter at zero differs from its base by nothing.
        """
        if not loss.declares.reference or REFERENCE in batch.extras or not len(batch):
            return batch
        self.forward_pass.check(batch)
        loss.check(batch)
        found = np.zeros(len(batch), dtype=np.float32)  # (B,)
        with self.reference.in_place(f"the loss {loss.name!r}"):
            for rows, part in self.forward_pass.micro_batches(
                batch, loss, lambda _, count: tick(0, count), pieces
            ):
                outputs = self.forward_pass.outputs(part, self.forward_pass.tensors(part, batch))
                found[rows] = outputs.sequence_logprobs.float().cpu().numpy()
                del outputs
        return batch.labelled_with(**{REFERENCE: found})

    def freeze_reference(self) -> FreezeReferenceResult:
        """Keep a copy of the trained weights as the reference from now on."""
        self.reference.freeze(self.policy_version)
        return FreezeReferenceResult(self.policy_version)

    def sample(
        self,
        prompts: Sequence[Prompt],
        config: SamplingConfig,
        tick: Tick = no_tick,
        tell: sampler.Tell | None = None,
    ) -> SampleResult:
        """Draw completions, beside nobody else's; see `together`.

        Args:
            prompts: Each a text (tokenised as it is), chat messages (by the chat template), or token ids.
            config: How to draw. Without a seed, the client's next one is taken. An answer in a chat also stops at what
                the chat template ends a turn with, whatever the tokenizer's end token is.
            tick: Called before each token.
            tell: Called with each piece of a sequence as it is drawn.

        Raises:
            ValidationError: An empty prompt, a token outside the vocabulary, more tokens than fit the context, or a
                precision that cannot be had here.
        """
        call = self.call(prompts, config, tick, tell)
        version = self._read_by(call.precision)
        known = turns = None
        if call.goes_on:
            known = self.turns if self.turns is not None and self.turns.version == version else None
            self.turns = turns = Prefixes(version, self.model.device, whole=True)
        kept = Prefixes(version, self.model.device)
        elsewhere = self.elsewhere(call.precision)
        with sampler.Together(
            self.model, call.precision, kept, self._copied(), known, turns, elsewhere
        ) as together:
            together.add(call)
            together.run()
        return call.result()

    def kind_of(self, config: SamplingConfig, prompts: int) -> str | None:
        """Return what is equal for calls that can be drawn together; None of one that is drawn by itself."""
        if config.alone:
            return None
        if config.engine != "torch":
            return config.engine
        if config.precision == "auto":
            return precision_of(self.model, config.precision, prompts * config.num_samples)
        return config.precision

    def together(self, kind: str) -> sampler.Together:
        """Return what draws for several calls together, from the weights as they are; nothing else runs meanwhile."""
        if self.prefixes is None or self.prefixes.version != self._read_by(kind):
            self.prefixes = Prefixes(self._read_by(kind), self.model.device)
        return sampler.Together(
            self.model, kind, self.prefixes, self._copied(), elsewhere=self.elsewhere(kind)
        )

    def _copied(self) -> KeptCopies:
        if self.copied is None or self.copied.version != self.policy_version:
            self.copied = KeptCopies(self.policy_version)
        return self.copied

    def _read_by(self, precision: str) -> tuple[int, str]:
        return self.policy_version, precision

    def call(
        self,
        prompts: Sequence[Prompt],
        config: SamplingConfig,
        tick: Tick = no_tick,
        tell: sampler.Tell | None = None,
    ) -> sampler.SampleCall:
        """Return what takes part in drawing together; without a seed, it takes the client's next one. See `sample`."""
        ids, turns, streams = self.encode(prompts, config)
        if config.engine == "torch":
            precision = precision_of(self.model, config.precision, len(ids) * config.num_samples)
        else:
            precision = config.engine
            self._in_llama_cpp()  # what cannot be handed over is refused here
        seed = config.seed
        if seed is None:
            self.samples_drawn += 1
            seed = seed_of_call(self.config.seed, self.samples_drawn)
        call = sampler.call_of(self.model, ids, config, seed, tick, turns, tell, streams)
        call.version, call.precision, call.read = self.policy_version, precision, self.read(ids, config)
        return call

    def elsewhere(self, kind: str) -> Callable[[], sampler.DecodesElsewhere] | None:
        """Return what brings those who decode in place of the model; None where it does so itself."""
        return self._in_llama_cpp if kind == "llama.cpp" else None

    def _in_llama_cpp(self) -> "Policy":
        """Return the model in llama.cpp, with its present weights.

        Raises:
            ValidationError: It cannot be handed over.
            ModelLoadError: llama.cpp does not read it.
        """
        from tensafe_nb.engine.sampling.llama_cpp import Policy

        if self.llama_cpp is None:
            self.llama_cpp = Policy(self.model)
        self.llama_cpp.push(self.policy_version)
        return self.llama_cpp

    def read(self, ids: Sequence[Sequence[int]], config: SamplingConfig) -> ReadPrompts:
        """Return what the model says of prompts' own tokens, as far as `config` asks for it."""
        return read_prompts(self.forward_pass, ids, config)

    def encode(
        self, prompts: Sequence[Prompt], config: SamplingConfig
    ) -> tuple[list[list[int]], list[TurnEnd], list[int | None]]:
        """Return of prompts the token ids, checked, what ends an answer to each, and its own stream; see `sample`."""
        return inputs.to_draw(prompts, config, self.model)

    # adapter

    def read_adapter(self) -> ReadAdapterResult:
        """Return a copy of the adapter.

        Raises:
            ValidationError: All weights are trained.
        """
        tensors = {
            name: tensor.detach().float().cpu().numpy().copy()
            for name, tensor in self._adapter("read_adapter").items()
        }
        return ReadAdapterResult(tensors, self.policy_version)

    def load_adapter(
        self, tensors: Mapping[str, Array], take_over: Callable[[], None] = lambda: None
    ) -> LoadAdapterResult:
        """Take tensors in place of the adapter's own, and start the optimiser's moments and the window anew.

        Args:
            tensors: By PEFT's names; those that are not named stay as they are.
            take_over: Called when they are known to fit, before anything is loaded.

        Raises:
            ValidationError: One has no place here, or another shape. Nothing has changed.
        """
        own = self._adapter("load_adapter")
        for name, array in tensors.items():
            if name not in own:
                raise ValidationError(
                    f"load_adapter: the adapter has no tensor {as_given(name)}.{nearest(name, own)} Nothing was loaded."
                )
            if array.shape != tuple(own[name].shape):
                raise ValidationError(
                    f"load_adapter: {name!r} is {array.shape}, and {tuple(own[name].shape)} here. Nothing was loaded."
                )
        take_over()
        with torch.no_grad():
            for name, array in tensors.items():
                own[name].copy_(torch.from_numpy(array))
        self.discard_gradients()
        self.optimizer.restore_moments({})  # they belong to the steps that led to other weights
        self.optimizer.policy_version += 1
        return LoadAdapterResult(len(tensors), self.policy_version)

    def _adapter(self, verb: str) -> dict[str, Tensor]:
        if self.model.peft is None:
            raise ValidationError(
                f"{verb}: this client trains all weights, and has no adapter. Create it with lora_config=, or take its "
                f"state as a whole: save_state, load_state, export_adapter."
            )
        return adapters.tensors_of(self.model.peft)

    # state

    @cached_property
    def fingerprint(self) -> str:
        """Of the frozen weights; computed when a checkpoint first asks."""
        return fingerprint(self.model)

    def capture(self, include_optimizer: bool) -> EngineState:
        """Return the state. The tensors are the live ones: use them before the engine goes on.

        Of private training, the open window is left out: its gradients carry no noise yet. So are the random streams:
        a private client draws from none that could be repeated.
        """
        window = self.window if self.resumable else Window()
        facts = {
            "step": self.step,
            "policy_version": self.policy_version,
            "config": self.config.model_dump(mode="json"),
            "base": self.fingerprint,
            "reference_version": self.reference.version,
            "window": {
                "weight": window.weight,
                "batches": window.batches,
                "prenormalised": window.prenormalised,
            },
        } | self.streams()
        gradients = {name: p.grad for name, p in self.model.trainable if p.grad is not None}
        moments = self.optimizer.moments() if include_optimizer else None
        weights = {name: p.detach() for name, p in self.model.own}
        return EngineState(facts, weights, moments, gradients, self.reference.weights)

    def restore(self, state: EngineState, *, keep_moments: bool = True) -> None:
        """Take over a state that `state.check` has found to fit.

        Args:
            state: What to go on from.
            keep_moments: False starts the optimiser's moments at zero.

        Raises:
            ValidationError: Tensors are missing, or have other shapes. Nothing has changed.
        """
        self.prefixes = self.turns = self.copied = None
        parameters: dict[str, Tensor] = dict(self.model.own)
        check_tensors(parameters, state)
        facts = state.facts
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state.weights[name])
        self.discard_gradients()
        for name, gradient in state.gradients.items():
            parameters[name].grad = gradient.to(parameters[name].device)  # sums of the open window
        self.training_step.window = Window(**facts["window"])
        self.optimizer.restore_moments((state.optimizer or {}) if keep_moments else {})
        if facts["config"]["seed"] == self.config.seed:  # the streams belong to the seed
            self.restore_streams(facts)
        self.reference.restore(state.reference, facts["reference_version"])
        self.optimizer.step = facts["step"]
        # A client that has trained gives the loaded weights a number of their own: a version never names two.
        here, saved = self.policy_version, facts["policy_version"]
        self.optimizer.policy_version = saved if here == 0 else max(here, saved) + 1

    def streams(self) -> dict[str, Any]:
        """Return where the random streams stand, as plain data."""
        random = self.forward_pass.random if self.resumable else {}
        return {
            "samples_drawn": self.samples_drawn,
            "random": {name: base64.b64encode(bytes(s.tolist())).decode() for name, s in random.items()},
        }

    def restore_streams(self, facts: Mapping[str, Any]) -> None:
        """Let the random streams go on from where `streams` found them."""
        self.samples_drawn = facts["samples_drawn"]
        random = self.forward_pass.random
        for name in random.keys() & facts["random"].keys():
            random[name] = torch.tensor(list(base64.b64decode(facts["random"][name])), dtype=torch.uint8)


def seed_of_call(seed: int, number: int) -> int:
    """Return the seed of a training client's n-th call of `sample` that names none."""
    own = f"{seed}/{number}".encode()
    return int.from_bytes(hashlib.blake2b(own, digest_size=6).digest(), "big")
