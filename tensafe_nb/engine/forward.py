"""The forward pass of the model in training: both kinds of step, scoring and the step estimate compute with it."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tensafe_nb.config import TrainingConfig
from tensafe_nb.engine import micro_batches
from tensafe_nb.engine.accumulation import Tick
from tensafe_nb.engine.models import inputs, llama_layers
from tensafe_nb.engine.models.load import GLOBAL_RANDOM, LoadedModel
from tensafe_nb.engine.recomputation import layers_of, recomputed
from tensafe_nb.engine.sampling import copies, native
from tensafe_nb.losses import Loss, LossOutputs
from tensafe_nb.losses.base import Declaration, LossValue
from tensafe_nb.losses.views import chunk_rows
from tensafe_nb.privacy.row_dropout import RowDropout
from tensafe_nb.protocol.batch import IGNORE, Array, BatchData

SCORING = Declaration(per_row=True)  # each row by itself: what a pass without a loss computes


class Packed(NamedTuple):
    """Rows that stand behind each other: where their tokens come from."""

    blocks: list[tuple[int, int]]
    rows: Tensor  # (tokens,)
    columns: Tensor
    shape: tuple[int, ...]  # (B, T)

    def unpacked(self, hidden: Tensor) -> Tensor:
        """Return (1, tokens, D) as (B, T, D), 0 where padding is."""
        return hidden.new_zeros(*self.shape, hidden.shape[-1]).index_put((self.rows, self.columns), hidden[0])


class ForwardPass:
    """From a batch to what a loss sees: micro-batches, tensors on the device, hidden states, logits where labelled.

    Args:
        model: The model.
        config: Of the training client.

    Attributes:
        micro_batch_tokens: What is computed at once, padding included.
        has_dropout: Whether training draws random numbers.
        random: The states of the dropout streams, by kind of device.
        forgets: The layers that are computed again in the backward pass, with gradient checkpointing.
        overhead: What a further micro-batch costs, in tokens.
        fused: Whether the layers are those of `llama_layers`.
        block: What a further length in a packed micro-batch costs, in tokens; None where rows are not packed.
    """

    def __init__(self, model: LoadedModel, config: TrainingConfig) -> None:
        self.model, self.micro_batch_tokens = model, config.micro_batch_tokens
        self._model_ref = config.model_ref
        self.has_dropout = model.has_dropout
        self.random = {"cpu": torch.Generator().manual_seed(config.seed).get_state()}
        if model.device.type == "cuda":
            self.random["cuda"] = torch.Generator(model.device).manual_seed(config.seed).get_state()
        self.forgets = layers_of(model, config.model_ref) if config.gradient_checkpointing else []
        on_cpu, size = model.device.type == "cpu", sum(p.numel() for p in model.causal.parameters())
        self.overhead = micro_batches.overhead_in_tokens(size, accelerator=not on_cpu)
        self.fused = on_cpu and not model.looks_ahead and llama_layers.fits(model)
        private = config.dp_config is not None and config.dp_config.enabled  # whose rows have to stay apart
        self.block = micro_batches.block_in_tokens(size) if self.fused and not private else None
        head = model.causal.get_output_embeddings()
        self._head_is_frozen = not any(p.requires_grad for p in head.parameters())
        self._compiled = self._by_compiled_products()

    def check(self, batch: BatchData) -> None:
        """Refuse tokens outside the vocabulary and rows longer than the context."""
        inputs.check_batch(batch, self.model, self._model_ref)

    def micro_batches(
        self, batch: BatchData, loss: Loss | None, tick: Tick, pieces: Sequence[Array] | None = None
    ) -> Iterator[tuple[Array, BatchData]]:
        """Yield (row numbers, rows) in pieces of at most `micro_batch_tokens`, padding cut off.

        Args:
            batch: What to divide.
            loss: Says which rows belong together.
            tick: Called between pieces.
            pieces: The row numbers of each, where somebody has divided the batch already.
        """
        declares = SCORING if loss is None else loss.declares
        if pieces is None:
            pieces = micro_batches.divided(
                batch, declares, self.micro_batch_tokens, self.overhead, self.block
            )
        done, count = 0, sum(map(len, pieces))
        for rows in pieces:
            tick(done, count)
            done += len(rows)
            part = batch.take(rows)
            if declares.per == "row" or (part.labels != IGNORE).any():
                yield rows, part

    def tensors(self, part: BatchData, batch: BatchData) -> dict[str, Tensor]:
        """Return what a loss may read: labels and per-token extras flattened to the N labelled positions."""
        device = self.model.device
        labelled = part.labels != IGNORE  # (B, T)
        # padding may be a token of no model: its embedding is never attended to, and must only exist
        foreign = (part.attention_mask == 0) & (part.input_ids >= self.model.vocab_size)
        tensors = {
            "input_ids": torch.from_numpy(np.where(foreign, 0, part.input_ids)).to(device),
            "attention_mask": torch.from_numpy(part.attention_mask).to(device),
            "labels": torch.from_numpy(part.labels[labelled]).to(device),  # (N,)
            "sequence_index": torch.from_numpy(labelled.nonzero()[0]).to(device),  # (N,)
        }
        for name, value in part.extras.items():
            if value.dtype.kind in "iufb":
                flat = value[labelled] if batch.per_token(name) else value
                flat = flat.astype(np.float32) if flat.dtype.kind == "f" else flat
                tensors[name] = torch.from_numpy(np.ascontiguousarray(flat)).to(device)
        return tensors

    def outputs(
        self,
        part: BatchData,
        tensors: Mapping[str, Tensor],
        *,
        whole_rows: bool = False,
        position_ids: Tensor | None = None,
        dropout: RowDropout | None = None,
    ) -> LossOutputs:
        """Let the model read some rows; what a loss reads of its answer is computed when it is read.

        Args:
            part: The rows.
            tensors: Theirs.
            whole_rows: Let every layer see (B, T, …), the head too: not the N labelled positions of all rows.
            position_ids: (B, T) to tell the model, unless padding in front of the rows decides them.
            dropout: The rows' own; None takes what the random stream gives.
        """
        mask, given = tensors["attention_mask"], part.attention_mask  # (B, T) each
        asked = {"input_ids": tensors["input_ids"], "use_cache": False}
        packed = None if self.block is None or whole_rows else self._packed(asked, given)
        # a causal model sees only this padding
        padded_in_front = packed is None and (given[:, 1:] > given[:, :-1]).any()
        if padded_in_front or self.model.looks_ahead:
            asked["attention_mask"] = mask
        if padded_in_front:
            asked["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        elif position_ids is not None:
            asked["position_ids"] = position_ids
        layers: AbstractContextManager[None] = contextlib.nullcontext()
        if self.fused and not padded_in_front:
            layers = llama_layers.in_place(self.model, packed and packed.blocks)
        with self.model.autocast(), dropout or contextlib.nullcontext(), layers, self._forgetting(dropout):
            if self.model.split:
                hidden = self.model.body(**asked).last_hidden_state  # (B, T, D)
                hidden = hidden if packed is None else packed.unpacked(hidden)
                logits = self.model.head(hidden) if whole_rows else None  # (B, T, V)
            else:
                answer = self.model.causal(**asked, output_hidden_states=True)
                hidden, logits = answer.hidden_states[-1], answer.logits  # (B, T, D), (B, T, V)
        return LossOutputs(
            hidden,
            self._head,
            torch.from_numpy(part.labels).to(self.model.device),
            mask,
            logits,
            chunk_rows=chunk_rows(self.model.vocab_size, hidden.shape[-1], self._head_is_frozen),
            head_is_frozen=self._head_is_frozen,
            value_head=None if self.model.value_head is None else self._values,
        )

    def evaluate(self, part: BatchData, batch: BatchData, loss: Loss) -> tuple[LossOutputs, LossValue]:
        """Return what the model says of some rows of a batch, and what the loss says of that."""
        tensors = self.tensors(part, batch)
        outputs = self.outputs(part, tensors)
        return outputs, loss(outputs, tensors)

    def _packed(self, asked: dict[str, Any], given: Array) -> "Packed | None":
        """Put rows behind each other in what the model is asked, where that is less work."""
        assert self.block is not None
        found = micro_batches.blocks_of(given, self.block)
        if found is None:
            return None
        order, blocks = found
        places = [(row, column) for row in order for column in given[row].nonzero()[0]]
        rows, columns = torch.tensor(places, device=self.model.device).T
        asked["input_ids"] = asked["input_ids"][rows, columns].unsqueeze(0)  # (1, tokens)
        positions = [torch.arange(length).repeat(count) for count, length in blocks]
        asked["position_ids"] = torch.cat(positions).to(rows.device).unsqueeze(0)
        return Packed(blocks, rows, columns, given.shape)

    def _forgetting(self, dropout: RowDropout | None) -> AbstractContextManager[None]:
        if not self.forgets or not torch.is_grad_enabled():
            return contextlib.nullcontext()
        again = None if dropout is None else lambda: (contextlib.nullcontext(), dropout.again())
        return recomputed(self.forgets, draws=self.has_dropout, again=again)

    def _by_compiled_products(self) -> bool:
        """Let adapted layers multiply by the quicker products of `native`; return whether the head may, too."""
        model = self.model
        if not self.fused or not copies.is_likely(model):
            return False
        from tensafe_nb.engine.models.fused_lora import FusedLinear

        for module in model.causal.modules():
            if isinstance(module, FusedLinear):
                module.compiled = True
        return self._head_is_frozen and type(model.head) is nn.Linear

    def _head(self, hidden: Tensor) -> Tensor:
        if self._compiled and native.trains(hidden.numel() // hidden.shape[-1]):
            from tensafe_nb.engine.models.fused_lora import FrozenLinear

            head: Any = self.model.head
            return FrozenLinear.apply(hidden, head.weight, head.bias)  # type: ignore[no-any-return, no-untyped-call]
        with self.model.autocast():
            return self.model.head(hidden)

    def _values(self, hidden: Tensor) -> Tensor:
        values: Tensor = self.model.value_head(hidden)  # type: ignore[misc]  # (…, 1)
        return values.squeeze(-1)

    @contextlib.contextmanager
    def training_mode(self, secret: int | None = None) -> Iterator[None]:
        """Dropout on, drawn from a stream of its own; nothing to do for a model without dropout.

        Args:
            secret: Seeds a stream of which nothing is kept, in place of the one in `random`.
        """
        if not self.has_dropout:
            yield
            return
        device = self.model.device
        with GLOBAL_RANDOM, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if secret is None:
                torch.random.set_rng_state(self.random["cpu"])
                if "cuda" in self.random:
                    torch.cuda.set_rng_state(self.random["cuda"], device)
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
                        self.random["cuda"] = torch.cuda.get_rng_state(device)
