"""One model in training: forward, backward, optimiser step, sampling. Synchronous; knows no queue and no widget.

Gradients are accumulated as weighted sums with the sum of weights beside them, and divided once, in `optim_step`:
so k micro-batches equal one big batch, ragged or not. A window is what lies between two optimiser steps.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from tensafe_nb.config import SamplingConfig, TrainingConfig
from tensafe_nb.data.labels import turn_ends
from tensafe_nb.engine import micro_batches as pieces
from tensafe_nb.engine import optimizers
from tensafe_nb.engine.accumulation import Tally, Tick, Window, no_tick
from tensafe_nb.engine.models import inputs, traits
from tensafe_nb.engine.models import load as models
from tensafe_nb.engine.private_step import Account, PrivateTraining
from tensafe_nb.engine.reference import Reference
from tensafe_nb.engine.sampling import sampler as sampling
from tensafe_nb.errors import NonFiniteLossError, ValidationError
from tensafe_nb.losses import Loss, LossOutputs
from tensafe_nb.losses.base import Declaration, LossValue
from tensafe_nb.losses.policy import exact_entropy
from tensafe_nb.losses.views import chunk_rows, label_logprobs
from tensafe_nb.protocol.batch import IGNORE, Array, BatchData
from tensafe_nb.protocol.results import (
    ForwardBackwardResult,
    ForwardResult,
    FreezeReferenceResult,
    LogprobsResult,
    OptimStepResult,
    Prompt,
    SampleResult,
)

WATCHED = 4_000_000  # weights whose change is measured; of more, every k-th


class Engine:
    """A model, its adapters, its optimiser and its random streams.

    Args:
        config: What to load and how to train it.
        model: The model, where it is there already: a copy that shares another's frozen weights.

    Raises:
        ModelLoadError: The model cannot be loaded.
        ValidationError: The adapter does not fit it.
    """

    def __init__(self, config: TrainingConfig, model: models.LoadedModel | None = None) -> None:
        self.model = models.load(config) if model is None else model
        brought = (
            self.model.lora
        )  # by a folder with an adapter, of which the configuration may say less, or nothing
        self.config = config if brought is None else config.replace(lora_config=brought)
        self.step = 0
        self.policy_version = 0
        self.parameters = [parameter for _, parameter in self.model.trainable]
        self.optimizer = optimizers.build(config.optimizer, self.parameters)
        self.reference = Reference(self.model, self.config.lora_config)
        if self.model.continued:
            self.reference.freeze(0)  # where training begins is the base with its adapter, not the bare base
        self.window = Window()
        self.samples_drawn = 0
        self.has_dropout = self.model.has_dropout
        head = self.model.causal.get_output_embeddings()
        self._head_is_frozen = not any(p.requires_grad for p in head.parameters())
        self.base_fingerprint: str | None = None  # computed when a checkpoint first asks
        self.private: PrivateTraining | None = None
        self._overhead = pieces.overhead_in_tokens(
            sum(p.numel() for p in self.model.causal.parameters()),
            accelerator=self.model.device.type != "cpu",
        )
        self._looks_ahead = traits.looks_ahead(self.model)
        self._positions_from_zero = False  # whether the model may be told them, row by row: for `private`
        self.whole_rows = False  # every layer sees (B, T, …), the head too: for `private`
        self.random = {"cpu": torch.Generator().manual_seed(config.seed).get_state()}  # the dropout streams
        if self.model.device.type == "cuda":
            self.random["cuda"] = torch.Generator(self.model.device).manual_seed(config.seed).get_state()

    def train_privately(self, account: Account, client_id: str) -> None:
        """Train with the differential privacy that the configuration asks for; until then, nothing is trained."""
        assert self.config.dp_config is not None
        self._positions_from_zero = traits.counts_positions_from_zero(self.model)
        self.private = PrivateTraining(self, self.config.dp_config, account, client_id)

    # training

    def forward_backward(self, batch: BatchData, loss: Loss, tick: Tick = no_tick) -> ForwardBackwardResult:
        """Add the gradient of a batch's loss to the window.

        On any failure, a cancelling `tick` included, what the window holds is dropped.

        Raises:
            ValidationError: Tokens outside the vocabulary, or a loss that does not fit.
            NonFiniteLossError: The loss or its gradient is NaN or infinite; says in which rows.
        """
        if self.is_private:
            return self._privately.forward_backward(batch, loss, tick)
        inputs.check_batch(batch, self.model, self.config.model_ref)
        loss.check(batch)
        try:
            self.window.join(loss)
            with self.training_mode():
                tally = self._accumulate(batch, loss, tick)
            self.window.weight += tally.weight
            self.window.batches += 1
            grad_norm = self._grad_norm()
        except BaseException:
            self.discard_gradients()
            raise
        if not math.isfinite(grad_norm):
            self.discard_gradients()
            raise NonFiniteLossError(
                f"The gradient of the loss {loss.name!r} is {grad_norm}, though the loss is finite. "
                f"No weight has moved. "
                f"Lower the learning rate, or look for a log or square root of 0 in the loss."
            )
        labelled = int((batch.labels != IGNORE).sum())
        return ForwardBackwardResult(tally.loss, grad_norm, labelled, tally.metrics, tally.weight)

    def optim_step(self, apply_dp_noise: bool = True) -> OptimStepResult:
        """Divide the window's gradients by its weight, clip, and take one optimiser step.

        Raises:
            ValidationError: The window is empty.
        """
        if self.is_private:
            return self._privately.optim_step(apply_dp_noise)
        if not self.window.batches:
            raise ValidationError(
                "optim_step() found no gradients: call forward_backward() before each optim_step()."
            )
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not gradients or self.window.divisor == 0:
            self.discard_gradients()
            raise ValidationError(
                "optim_step() found no mean gradient: the losses of this step have weight 0, or do not depend on the "
                "trained weights. No weight has moved; leave such batches out."
            )
        torch._foreach_div_(gradients, self.window.divisor)
        return self.apply_gradients()

    def apply_gradients(self) -> OptimStepResult:
        """Clip the mean gradient that the parameters hold, and take one optimiser step with it."""
        grad_norm = float(nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
        if not math.isfinite(grad_norm):
            self.discard_gradients()
            raise NonFiniteLossError(f"optim_step(): the gradient is {grad_norm}. No weight has moved.")
        if self.config.optimizer.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(
                self.parameters,
                self.config.optimizer.max_grad_norm,
                torch.tensor(grad_norm, device=self.model.device),
            )
        rate = optimizers.learning_rate(self.config.optimizer, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self._measured_change() as change:
            self.optimizer.step()
        self.discard_gradients()
        self.step += 1
        self.policy_version += 1
        return OptimStepResult(self.step, rate, grad_norm, self.policy_version, change[0])

    def discard_gradients(self) -> None:
        """Drop what has been accumulated; the next window starts clean."""
        self.optimizer.zero_grad(set_to_none=True)
        self.window = Window()
        if self.private is not None:
            self.private.discard()

    @property
    def is_private(self) -> bool:
        """Whether the configuration asks for differential privacy."""
        return self.config.dp_config is not None and self.config.dp_config.enabled

    @property
    def _privately(self) -> PrivateTraining:
        if self.private is None:
            raise ValidationError("This engine was given no privacy account: it cannot train privately.")
        return self.private

    # scoring and sampling

    @torch.no_grad()
    def forward(
        self, batch: BatchData, loss: Loss, return_logprobs: bool = False, tick: Tick = no_tick
    ) -> ForwardResult:
        """Evaluate a loss without dropout or gradients; with per-token logprobs (B, T) when asked for."""
        inputs.check_batch(batch, self.model, self.config.model_ref)
        loss.check(batch)
        tally = Tally(loss.declares.prenormalised)
        logprobs = np.zeros(batch.shape, dtype=np.float32) if return_logprobs else None
        for rows, part in self.micro_batches(batch, loss, tick):
            outputs, value = self._evaluate(part, batch, loss)
            tally.add(value, value.total.item())
            if logprobs is not None:
                _place(logprobs, batch, rows, outputs.logprobs)
            del outputs, value  # its logits can be large: let go of them before the next piece's are computed
        return ForwardResult(
            tally.loss, int((batch.labels != IGNORE).sum()), tally.metrics, logprobs, tally.weight
        )

    @torch.no_grad()
    def compute_logprobs(
        self, batch: BatchData, temperature: float = 1.0, reference: bool = False, tick: Tick = no_tick
    ) -> LogprobsResult:
        """Score a batch's labels: logprobs, exact entropy and the value head's estimates, (B, T), at a temperature.

        Args:
            batch: What to score.
            temperature: Divides the logits.
            reference: Score under the reference's weights: the base without adapter, or a frozen copy.
            tick: Called between micro-batches.
        """
        inputs.check_batch(batch, self.model, self.config.model_ref)
        logprobs, entropy = (np.zeros(batch.shape, dtype=np.float32) for _ in range(2))
        values = np.zeros(batch.shape, dtype=np.float32) if self.model.value_head and not reference else None
        with self.reference.in_place() if reference else contextlib.nullcontext():
            for rows, part in self.micro_batches(batch, None, tick):
                outputs = self.outputs(part, self.tensors(part, batch))
                picked = outputs.map_logits(partial(label_logprobs, temperature=temperature))
                _place(logprobs, batch, rows, picked)
                spread = outputs.map_logits(partial(exact_entropy, temperature=temperature))
                _place(entropy, batch, rows, spread)
                if values is not None:
                    _place(values, batch, rows, outputs.values)
                del outputs  # its logits can be large: let go of them before the next piece's are computed
        return LogprobsResult(logprobs, entropy, None if reference else self.policy_version, values)

    def freeze_reference(self) -> FreezeReferenceResult:
        """Keep a copy of the trained weights as the reference from now on."""
        self.reference.freeze(self.policy_version)
        return FreezeReferenceResult(self.policy_version)

    def sample(self, prompts: Sequence[Prompt], config: SamplingConfig, tick: Tick = no_tick) -> SampleResult:
        """Draw completions.

        Args:
            prompts: Each a text (tokenised as it is), chat messages (by the chat template), or token ids.
            config: How to draw. Without a seed, the client's next one is taken. An answer in a chat also stops at what
                the chat template ends a turn with, whatever the tokenizer's end token is.
            tick: Called before each token.

        Raises:
            ValidationError: An empty prompt, a token outside the vocabulary, or more tokens than fit the context.
        """
        ids = [
            inputs.encode(prompt, index, config.max_new_tokens, self.model)
            for index, prompt in enumerate(prompts)
        ]
        seed = config.seed
        if seed is None:
            self.samples_drawn += 1
            seed = _mix(self.config.seed, self.samples_drawn)
        turns = turn_ends(self.model.tokenizer, prompts)
        drawn = sampling.sample(self.model, ids, config, seed, tick, turns)
        return SampleResult(tuple(drawn), self.policy_version)

    # inside

    def _accumulate(self, batch: BatchData, loss: Loss, tick: Tick) -> Tally:
        tally = Tally(loss.declares.prenormalised)
        for rows, part in self.micro_batches(batch, loss, tick):
            self._learn_from(part, rows, batch, loss, tally)
        return tally

    def _learn_from(self, part: BatchData, rows: Array, batch: BatchData, loss: Loss, tally: Tally) -> None:
        """Add a piece's gradient. A method, so that nothing of the piece outlives it: its logits can be large."""
        _, value = self._evaluate(part, batch, loss)
        total = value.total.item()
        if not math.isfinite(total):
            raise NonFiniteLossError(_where_not_finite(loss.name, total, batch, rows))
        value.total.backward()  # type: ignore[no-untyped-call]
        tally.add(value, total)

    def _evaluate(self, part: BatchData, batch: BatchData, loss: Loss) -> tuple[LossOutputs, LossValue]:
        tensors = self.tensors(part, batch)
        outputs = self.outputs(part, tensors)
        return outputs, loss(outputs, tensors)

    def micro_batches(
        self, batch: BatchData, loss: Loss | None, tick: Tick
    ) -> Iterator[tuple[Array, BatchData]]:
        """Yield (row numbers, rows) in pieces of at most `micro_batch_tokens`, padding cut off.

        Where the loss sees each row by itself, rows of like length come together; others stay in their order.
        """
        declares = loss.declares if loss is not None else Declaration(per_row=True)
        count, columns = batch.shape
        most = self.config.micro_batch_tokens
        if declares.per_row:
            chosen = pieces.by_length(batch.attention_mask, most, self._overhead)
        else:
            size = declares.rows_at_a_time(count, fitting=most // columns)
            chosen = np.split(np.arange(count), range(size, count, size))
        done = 0
        for rows in chosen:
            tick(done, count)
            done += len(rows)
            part = batch.take(rows)
            if declares.per == "row" or (part.labels != IGNORE).any():
                yield rows, part

    def tensors(self, part: BatchData, batch: BatchData) -> dict[str, Tensor]:
        """Return what a loss may read: labels and per-token extras flattened to the N labelled positions."""
        device = self.model.device
        where = part.labels != IGNORE
        foreign = (part.attention_mask == 0) & (
            part.input_ids >= self.model.vocab_size
        )  # padding without a row
        tensors = {
            "input_ids": torch.from_numpy(np.where(foreign, 0, part.input_ids)).to(device),
            "attention_mask": torch.from_numpy(part.attention_mask).to(device),
            "labels": torch.from_numpy(part.labels[where]).to(device),
            "sequence_index": torch.from_numpy(where.nonzero()[0]).to(device),
        }
        for name, value in part.extras.items():
            if value.dtype.kind in "iufb":
                flat = value[where] if batch.per_token(name) else value
                flat = flat.astype(np.float32) if flat.dtype.kind == "f" else flat
                tensors[name] = torch.from_numpy(np.ascontiguousarray(flat)).to(device)
        return tensors

    def outputs(self, part: BatchData, tensors: Mapping[str, Tensor]) -> LossOutputs:
        inputs = {"input_ids": tensors["input_ids"], "use_cache": False}
        mask, given = tensors["attention_mask"], part.attention_mask
        padded_in_front = (given[:, 1:] > given[:, :-1]).any()  # a causal model sees only this padding
        if padded_in_front or self._looks_ahead:
            inputs["attention_mask"] = mask
        if padded_in_front:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        labels = torch.from_numpy(part.labels).to(self.model.device)
        with self.model.autocast():
            if self.whole_rows and self._positions_from_zero:
                inputs.setdefault(
                    "position_ids", torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
                )
            if self.model.split and not self.whole_rows:
                hidden, logits = self.model.body(**inputs).last_hidden_state, None
            else:
                answer = self.model.causal(**inputs, output_hidden_states=True)
                hidden, logits = answer.hidden_states[-1], answer.logits
        frozen = self._head_is_frozen
        rows = chunk_rows(self.model.vocab_size, hidden.shape[-1], frozen)
        return LossOutputs(
            hidden,
            self._head,
            labels,
            mask,
            logits,
            chunk_rows=rows,
            head_is_frozen=frozen,
            value_head=self._values if self.model.value_head is not None else None,
        )

    def _head(self, hidden: Tensor) -> Tensor:
        with self.model.autocast():
            return self.model.head(hidden)

    def _values(self, hidden: Tensor) -> Tensor:
        values: Tensor = self.model.value_head(hidden)  # type: ignore[misc]
        return values.squeeze(-1)

    @contextlib.contextmanager
    def training_mode(self, secret: int | None = None) -> Iterator[None]:
        """Dropout on, drawn from this engine's own stream; nothing to do for a model without dropout.

        Args:
            secret: Seeds a stream of which nothing is kept, in place of the engine's own.
        """
        if not self.has_dropout:
            yield
            return
        with models.GLOBAL_RANDOM, torch.random.fork_rng(devices=_cuda(self.model.device)):
            if secret is None:
                torch.random.set_rng_state(self.random["cpu"])
                if "cuda" in self.random:
                    torch.cuda.set_rng_state(self.random["cuda"], self.model.device)
            else:
                torch.manual_seed(secret)
            self.model.causal.train()
            try:
                yield
            finally:
                self.model.causal.eval()
                if secret is None:
                    self.random["cpu"] = torch.random.get_rng_state()
                    if "cuda" in self.random:
                        self.random["cuda"] = torch.cuda.get_rng_state(self.model.device)

    @contextlib.contextmanager
    def _measured_change(self) -> Iterator[list[float]]:
        """Give a list that holds, afterwards, the norm of what the weights changed by."""
        total = sum(p.numel() for p in self.parameters)
        stride = -(-total // WATCHED)
        watched = [p.detach().reshape(-1)[::stride] for p in self.parameters]
        before = [p.clone() for p in watched]
        change: list[float] = []
        yield change
        deltas = torch._foreach_sub(watched, before)
        share = sum(p.numel() for p in watched) / total
        change.append(float(nn.utils.get_total_norm(deltas)) / math.sqrt(share))

    def _grad_norm(self) -> float:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not gradients or self.window.divisor == 0:
            return 0.0
        return float(nn.utils.get_total_norm(gradients)) / self.window.divisor


def _place(target: Array, batch: BatchData, rows: Array, values: Tensor) -> None:
    """Write values of the labelled positions of some rows into a (B, T) array."""
    row, column = (batch.labels[rows] != IGNORE).nonzero()
    target[rows[row], column] = values.float().cpu().numpy()


def _where_not_finite(loss: str, total: float, batch: BatchData, rows: Array) -> str:
    first, last = int(rows[0]), int(rows[-1])
    where = f"{first} to {last}" if last - first == len(rows) - 1 else ", ".join(map(str, rows))
    ids = batch.extras.get("example_ids")
    named = f" (examples {', '.join(map(str, ids[rows][:8]))})" if ids is not None else ""
    return (
        f"The loss {loss!r} is {total} in rows {where} of the batch{named}. No weight has moved. "
        f"Look at these rows, lower the learning rate, or set max_grad_norm."
    )


def _mix(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=6).digest(), "big")


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
