"""A training step without differential privacy: weighted sums of gradients, divided once, in `optim_step`.

The window holds Σ_k w_k ∇ℓ_k with Σ_k w_k beside it, so that k micro-batches equal one big batch, ragged or not.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tensafe_nb.config import StepConfig
from tensafe_nb.engine.accumulation import Tally, Tick, Window, no_tick
from tensafe_nb.engine.forward import ForwardPass
from tensafe_nb.engine.models.reading import listed
from tensafe_nb.engine.optimizers import Optimizer
from tensafe_nb.errors import NonFiniteLossError, ValidationError
from tensafe_nb.losses import Loss
from tensafe_nb.protocol.batch import IGNORE, Array, BatchData
from tensafe_nb.protocol.results import ForwardBackwardResult, OptimStepResult


class PlainStep:
    """Steps on the mean gradient of what lies between two of them.

    Args:
        forward: The model's forward pass.
        optimizer: Takes the step.
    """

    resumable = True

    def __init__(self, forward: ForwardPass, optimizer: Optimizer) -> None:
        self._forward, self._optimizer = forward, optimizer
        self.window = Window()

    def forward_backward(
        self, batch: BatchData, loss: Loss, tick: Tick, return_logprobs: bool = False
    ) -> ForwardBackwardResult:
        """Add the gradient of a batch's loss to the window; on any failure, what it holds is dropped."""
        self._forward.check(batch)
        loss.check(batch)
        try:
            self.window.join(loss)
            tally = self._accumulate(batch, loss, tick, return_logprobs)
            grad_norm = self._count(tally, loss)
        except BaseException:
            self.discard()
            raise
        labelled = int((batch.labels != IGNORE).sum())
        return ForwardBackwardResult(
            tally.loss, grad_norm, labelled, tally.metrics, tally.weight, tally.logprobs
        )

    def _accumulate(
        self,
        batch: BatchData,
        loss: Loss,
        tick: Tick,
        return_logprobs: bool,
        pieces: Sequence[Array] | None = None,
        secret: int | None = None,
    ) -> Tally:
        """Add the gradients of a batch's pieces to those that the parameters hold."""
        tally = Tally.of(loss, batch, logprobs=return_logprobs)
        with self._forward.training_mode(secret):
            for rows, part in self._forward.micro_batches(batch, loss, tick, pieces):
                self._learn_from(part, rows, batch, loss, tally)
        return tally

    def _count(self, tally: Tally, loss: Loss) -> float:
        """Count what was accumulated; return the norm of the mean gradient: ‖Σ_k w_k ∇ℓ_k‖ / Σ_k w_k."""
        self.window.add(tally)
        gradients, divisor = self._optimizer.gradients(), self.window.divisor
        norm = float(nn.utils.get_total_norm(gradients)) if gradients else 0.0
        grad_norm = norm / divisor if divisor else 0.0
        if not math.isfinite(grad_norm):
            weights = self._forward.model.causal.named_parameters()
            bad = [name for name, weight in weights if not bool(weight.isfinite().all())]
            advice = "Lower the learning rate, or look for a log or square root of 0 in the loss."
            if bad:  # attention may have hidden it: a query of NaN comes to 0
                advice = f"These weights hold NaN or infinity: {listed(bad)}. Is the model's file damaged?"
            raise NonFiniteLossError(
                f"The gradient of the loss {loss.name!r} is {grad_norm}, though the loss is finite. No weight has "
                f"moved. {advice}"
            )
        return grad_norm

    # a replica's part of a step

    def contribute(
        self,
        batch: BatchData,
        loss: Loss,
        pieces: Sequence[Array],
        secret: int,
        return_logprobs: bool,
        tick: Tick,
    ) -> tuple[list[Array | None], Tally]:
        """Return the gradient of some pieces of a batch, and what they add up to; the window stays as it is.

        Args:
            batch: All of it.
            loss: What is differentiated.
            pieces: The row numbers of each piece.
            secret: Seeds the dropout of these pieces.
            return_logprobs: Collect those of their labels.
            tick: Called between them.

        Returns:
            An array for each parameter, in float32, None where it has no part in the loss; and the tally.
        """
        self._forward.check(batch)
        loss.check(batch)
        parameters = self._optimizer.parameters
        held = [parameter.grad for parameter in parameters]
        self._optimizer.clear()
        try:
            tally = self._accumulate(batch, loss, tick, return_logprobs, pieces, secret)
            return [None if p.grad is None else p.grad.float().cpu().numpy() for p in parameters], tally
        finally:
            for parameter, gradient in zip(parameters, held, strict=True):
                parameter.grad = gradient

    def absorb(self, gradients: Sequence[Array | None], tally: Tally, loss: Loss) -> float:
        """Add a gradient that others have computed to the window; return the norm of the mean gradient.

        Raises:
            NonFiniteLossError: It is NaN or infinite. What the window held is dropped.
            ValidationError: The loss cannot share a step with those before it.
        """
        try:
            self.window.join(loss)
            for parameter, gradient in zip(self._optimizer.parameters, gradients, strict=True):
                if gradient is not None:
                    added = torch.tensor(gradient, dtype=parameter.dtype, device=parameter.device)
                    parameter.grad = added if parameter.grad is None else parameter.grad.add_(added)
            return self._count(tally, loss)
        except BaseException:
            self.discard()
            raise

    def optim_step(self, apply_dp_noise: bool, step: StepConfig) -> OptimStepResult:
        """Divide the window's gradients by its weight, and take one optimiser step."""
        if not self.window.batches:
            raise ValidationError(
                "optim_step() found no gradients: call forward_backward() before each optim_step()."
            )
        try:
            gradients = self._optimizer.gradients()
            if not gradients or self.window.divisor == 0:
                raise ValidationError(
                    "optim_step() found no mean gradient: the losses of this step have weight 0, or do not depend on "
                    "the trained weights. No weight has moved; leave such batches out."
                )
            torch._foreach_div_(gradients, self.window.divisor)
            return self._optimizer.apply(step)
        finally:
            self.discard()

    def discard(self) -> None:
        """Drop what has been accumulated; the next window starts clean."""
        self._optimizer.clear()
        self.window = Window()

    def _learn_from(self, part: BatchData, rows: Array, batch: BatchData, loss: Loss, tally: Tally) -> None:
        """Add a piece's gradient. A method, so that nothing of the piece outlives it: its logits can be large."""
        outputs, value = self._forward.evaluate(part, batch, loss)
        total = value.total.item()  # a sum, weight times mean: what is added up over pieces
        if not math.isfinite(total):
            raise NonFiniteLossError(where_not_finite(loss.name, total, batch, rows))
        tally.collect(outputs, batch, rows)
        value.total.backward()  # type: ignore[no-untyped-call]
        tally.add(value, total)

    # for the estimate

    def trial(self, batch: BatchData, loss: Loss) -> tuple[int, Callable[[Callable[[], None]], None]]:
        """Return how many rows are computed at once, and what computes them; see `TrainingStep.trial`."""
        # `autograd.grad` writes to no `.grad`: an open window stays as it is
        trained = [parameter for parameter in self._optimizer.parameters if parameter.requires_grad]

        def compute(between: Callable[[], None]) -> None:
            for _, part in self._forward.micro_batches(batch, None, no_tick):
                value = self._forward.evaluate(part, batch, loss)[1]
                between()
                gradients = torch.autograd.grad(value.total, trained, allow_unused=True)
                nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])

        return len(batch), compute

    def peak_bytes(self, forward: float, whole: float, gradients: int, pieces: int) -> float:
        """Return the most bytes that a step holds: its later pieces find the gradients of the first."""
        return max(whole, gradients + forward) if pieces > 1 else whole

    def rehearse(self, gradients: list[Tensor]) -> None:
        """Do to tensors like the gradients what a step does to those."""
        torch._foreach_div_(gradients, 1.0)


def where_not_finite(loss: str, total: float, batch: BatchData, rows: Array) -> str:
    """Say in which rows of a batch a loss is NaN or infinite."""
    first, last = int(rows[0]), int(rows[-1])
    where = f"{first} to {last}" if last - first == len(rows) - 1 else ", ".join(map(str, rows))
    ids = batch.extras.get("example_ids")
    named = f" (examples {', '.join(map(str, ids[rows][:8]))})" if ids is not None else ""
    return (
        f"The loss {loss!r} is {total} in rows {where} of the batch{named}. No weight has moved. "
        f"Look at these rows, lower the learning rate, or set max_grad_norm."
    )
