"""Rules over the plan of a run, and over what each of its steps has measured."""

import math
from collections import deque
from collections.abc import Mapping
from statistics import median

from tensafe_nb.config import OptimizerConfig
from tensafe_nb.errors import ValidationError
from tensafe_nb.events import Alarm
from tensafe_nb.runs.alarm_log import AlarmLog, Finding

REMEMBERED = 50  # steps whose gradient norms the median is taken of
AT_LEAST = 10  # of them, before anything is called unusual
FACTOR = 10.0
QUIET = 20  # steps without a sign after which a trouble is over, and would be announced again


class StepAlarms:
    """The rules over what a step has measured: numbers that are none, a gradient out of proportion, no movement.

    The gradient rule compares with a running median, which single spikes do not move.

    Args:
        optimizer: With what it trains: what an alarm advises has to be true of it.
        private: Whether it trains with differential privacy.
    """

    def __init__(self, optimizer: OptimizerConfig | None = None, *, private: bool = False) -> None:
        self._optimizer, self._private = optimizer or OptimizerConfig(), private
        self._norms: deque[float] = deque(maxlen=REMEMBERED)
        self._log = AlarmLog(QUIET)

    def observe(self, run_id: str, step: int, values: Mapping[str, float]) -> list[Alarm]:
        """Return the alarms that begin with this step.

        Args:
            run_id: The run.
            step: The client's optimiser step.
            values: `loss`, `grad_norm`, `param_delta_norm` and `learning_rate` of it, as far as they are known.
        """
        norm = values.get("grad_norm", math.nan)
        found = [self.broken(values), self.large_gradient(norm), self.nothing_moved(values)]
        if math.isfinite(norm):
            self._norms.append(norm)
        return self._log.announce(run_id, step, [finding for finding in found if finding is not None])

    def broken(self, values: Mapping[str, float]) -> Finding | None:
        """A loss, a norm or a rate that is infinite or NaN."""
        names = [name for name, value in values.items() if not math.isfinite(value)]
        return not_finite(f"{' and '.join(names)} of this step: no number.") if names else None

    def large_gradient(self, norm: float) -> Finding | None:
        """A gradient ten times the median of the last fifty."""
        usual = median(self._norms) if len(self._norms) >= AT_LEAST else math.inf
        if not norm > FACTOR * usual:  # NaN has an alarm of its own
            return None
        if self._private:
            remedy = (
                "Rows are clipped before they are added up, so no single row does this: lower the learning rate, or "
                "raise the batch size."
            )
        elif self._optimizer.max_grad_norm is not None:
            remedy = (
                f"max_grad_norm={self._optimizer.max_grad_norm:g} has scaled it down. Look at the batch of this step; "
                f"if it happens often, lower the learning rate."
            )
        else:
            remedy = "Look at the batch of this step. Set max_grad_norm in OptimizerConfig, or lower the learning rate."
        message = f"The gradient norm is {norm:.3g}, {norm / usual:.0f} times the usual {usual:.3g}."
        return Finding("grad_norm", "amber", message, remedy)

    def nothing_moved(self, values: Mapping[str, float]) -> Finding | None:
        """A step that changed no weight, though its learning rate was not 0 (`Rates` speaks of that)."""
        if values.get("param_delta_norm") != 0 or values.get("learning_rate") == 0:
            return None
        why, remedy = "", "Look at which weights are trained (lora_config) and at the learning rate."
        if values.get("grad_norm") == 0:
            why = ": the gradient is 0"
            remedy = "Look at the labels of this batch (all -100?), and at which weights are trained (lora_config)."
        return Finding("no_learning", "red", f"The step has moved no weight{why}.", remedy)


def not_finite(what: str) -> Finding:
    """Return the finding of a loss or gradient that is no number."""
    remedy = "Go back to the last checkpoint with a lower learning rate; look at the batch of this step."
    return Finding("nan", "red", what, remedy)


class Rates:
    """The rules over a run's learning rates: at its first step over those to come, then over steps at rate 0.

    Args:
        optimizer: With what it trains.
    """

    def __init__(self, optimizer: OptimizerConfig) -> None:
        self._optimizer = optimizer
        self._begun, self._idle = False, 0

    def observe(self, rate: float, last_step: int | None) -> list[Finding]:
        """Return what a step gives rise to.

        Args:
            rate: The learning rate of that step.
            last_step: The client's step at the planned end; None where that is not known.
        """
        begun, self._begun = self._begun, True
        self._idle += rate == 0
        if rate == 0 and self._idle == 1:
            return [self.over()]
        if begun or last_step is None:
            return []
        return [found for found in (self.long_warmup(last_step), self.ends_early(last_step)) if found]

    @property
    def remark(self) -> str | None:
        """What a run's result has to say of steps that moved nothing."""
        if not self._idle:
            return None
        steps = "1 step was" if self._idle == 1 else f"{self._idle} steps were"
        return (
            f"{steps} taken at learning rate 0 and moved nothing: the {self._optimizer.schedule} schedule ended at "
            f"total_steps={self._optimizer.total_steps}."
        )

    def long_warmup(self, last_step: int) -> Finding | None:
        """A run that ends before its warm-up does."""
        optimizer = self._optimizer
        if last_step >= optimizer.warmup_steps:
            return None
        return Finding(
            "warmup",
            "amber",
            f"This run ends at step {last_step}, within its warm-up of {optimizer.warmup_steps} steps: the learning "
            f"rate never reaches more than {last_step / optimizer.warmup_steps:.0%} of {optimizer.learning_rate:g}.",
            f"Lower warmup_steps in OptimizerConfig (a twentieth of the run, {max(1, last_step // 20)}, is usual), or "
            f"train for longer.",
        )

    def ends_early(self, last_step: int) -> Finding | None:
        """A schedule that ends before the run does."""
        total, schedule = self._optimizer.total_steps, self._optimizer.schedule
        if schedule == "constant" or total is None or last_step <= total:
            return None
        return Finding(
            "schedule_short",
            "amber",
            f"The {schedule} schedule ends at total_steps={total}, and at this pace the run at step {last_step}: "
            f"{last_step - total} optimiser steps will move nothing.",
            f"Set OptimizerConfig(total_steps={last_step}), or stop the run where the schedule ends.",
        )

    def over(self) -> Finding:
        """The first step at rate 0."""
        return Finding(
            "schedule_over",
            "red",
            f"The learning rate is 0 from here on: the {self._optimizer.schedule} schedule ended with step "
            f"{self._optimizer.total_steps}. Further steps move nothing.",
            "Stop the run. To train on: service.restore(checkpoint, optimizer={'total_steps': …}), where total_steps "
            "counts from the client's first step; or schedule='constant'.",
        )


def check_schedule(optimizer: OptimizerConfig, last_step: int, planned: int) -> None:
    """Refuse a run whose last steps would train at learning rate 0.

    Args:
        optimizer: With what it trains.
        last_step: The client's optimiser step at the run's end.
        planned: Steps of the run.

    Raises:
        ValidationError: The schedule ends before.
    """
    total = optimizer.total_steps
    if optimizer.schedule == "constant" or total is None or last_step <= total:
        return
    idle = min(last_step - total, planned)
    raise ValidationError(
        f"{idle} of the {planned} steps of this run would train at learning rate 0 and move nothing: the "
        f"{optimizer.schedule} schedule ends at total_steps={total}, and the run at the client's step {last_step}. Set "
        f"OptimizerConfig(total_steps={last_step}), or ask for {max(planned - idle, 0)} steps. A client that has begun "
        f"goes on with service.restore(checkpoint, optimizer={{'total_steps': {last_step}}})."
    )
