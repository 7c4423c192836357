"""What speaks up when training goes wrong: rules over the plan of a run, and over what each step has measured."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from statistics import median

from tensafe_nb.config import OptimizerConfig
from tensafe_nb.errors import ValidationError
from tensafe_nb.events import Alarm

WINDOW = 50  # steps whose gradient norms the median is taken of
AT_LEAST = 10  # of them, before anything is called unusual
FACTOR = 10.0
QUIET = 20  # steps without a sign after which a trouble is over, and would be announced again


class StepAlarms:
    """Looks at every step and speaks up when a trouble begins, not at every step of it.

    The gradient rule compares with a running median, which single spikes do not move.

    Args:
        optimizer: With what it trains: what an alarm advises has to be true of it.
        private: Whether it trains with differential privacy.
    """

    def __init__(self, optimizer: OptimizerConfig | None = None, *, private: bool = False) -> None:
        self._optimizer, self._private = optimizer or OptimizerConfig(), private
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._last_seen: dict[str, int] = {}  # name → how many steps ago
        self._count = 0

    def observe(self, run_id: str, step: int, values: Mapping[str, float]) -> list[Alarm]:
        """Return the alarms that begin with this step.

        Args:
            run_id: The run.
            step: The client's optimiser step.
            values: `loss`, `grad_norm`, `param_delta_norm` and `learning_rate` of it, as far as they are known.
        """
        self._count += 1
        found = [alarm for alarm in self._findings(run_id, step, values) if self._begins(alarm.name)]
        norm = values.get("grad_norm", math.nan)
        if math.isfinite(norm):
            self._norms.append(norm)
        return found

    def _findings(self, run_id: str, step: int, values: Mapping[str, float]) -> list[Alarm]:
        found = []
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            found.append(not_finite(run_id, step, f"{' and '.join(broken)} of this step: no number."))
        norm = values.get("grad_norm", math.nan)
        usual = median(self._norms) if len(self._norms) >= AT_LEAST else math.inf
        if norm > FACTOR * usual:
            found.append(
                Alarm(
                    run_id=run_id,
                    step=step,
                    name="grad_norm",
                    level="amber",
                    message=f"The gradient norm is {norm:.3g}, {norm / usual:.0f} times the usual {usual:.3g}.",
                    remedy=self._against_large_gradients(),
                )
            )
        if (
            values.get("param_delta_norm") == 0 and values.get("learning_rate") != 0
        ):  # that has an alarm of its own
            found.append(self._nothing_moved(run_id, step, norm))
        return found

    def _against_large_gradients(self) -> str:
        if self._private:
            return (
                "Rows are clipped before they are added up, so no single row does this: lower the learning rate, or "
                "raise the batch size."
            )
        if self._optimizer.max_grad_norm is not None:
            return (
                f"max_grad_norm={self._optimizer.max_grad_norm:g} has scaled it down. Look at the batch of this step; "
                f"if it happens often, lower the learning rate."
            )
        return "Look at the batch of this step. Set max_grad_norm in OptimizerConfig, or lower the learning rate."

    def _nothing_moved(self, run_id: str, step: int, norm: float) -> Alarm:
        why, remedy = "", "Look at which weights are trained (lora_config) and at the learning rate."
        if norm == 0:
            why = ": the gradient is 0"
            remedy = "Look at the labels of this batch (all -100?), and at which weights are trained (lora_config)."
        return Alarm(
            run_id=run_id,
            step=step,
            name="no_learning",
            level="red",
            message=f"The step has moved no weight{why}.",
            remedy=remedy,
        )

    def _begins(self, name: str) -> bool:
        before = self._last_seen.get(name)
        self._last_seen[name] = self._count
        return before is None or self._count - before > QUIET


def not_finite(run_id: str, step: int, what: str) -> Alarm:
    """Return the alarm for a loss or gradient that is no number."""
    return Alarm(
        run_id=run_id,
        step=step,
        name="nan",
        level="red",
        message=what,
        remedy="Go back to the last checkpoint with a lower learning rate; look at the batch of this step.",
    )


class Rates:
    """Watches what a schedule makes of a run: at its first step for what is to come, then for steps at rate 0.

    Args:
        optimizer: With what it trains.
    """

    def __init__(self, optimizer: OptimizerConfig) -> None:
        self._optimizer = optimizer
        self._begun, self._idle = False, 0

    def observe(
        self, run_id: str, step: int, rate: float, last_step: int | None, *, number: int | None = None
    ) -> list[Alarm]:
        """Return the alarms that a step gives rise to.

        Args:
            run_id: The run.
            step: The client's optimiser step.
            rate: The learning rate of that step.
            last_step: The client's step at the planned end; None where that is not known.
            number: Under which number the alarm stands; `step` when None.
        """
        found = []
        if not self._begun and last_step is not None:
            found = [
                alarm
                for alarm in (self._long_warmup(run_id, last_step), self._ends_early(run_id, last_step))
                if alarm
            ]
        self._begun = True
        if rate == 0:
            self._idle += 1
            if self._idle == 1:
                found = [self._over(run_id, step)]
        return [replace(alarm, step=step if number is None else number) for alarm in found]

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

    def _long_warmup(self, run_id: str, last_step: int) -> Alarm | None:
        optimizer = self._optimizer
        if last_step >= optimizer.warmup_steps:
            return None
        return Alarm(
            run_id=run_id,
            step=last_step,
            name="warmup",
            level="amber",
            message=f"This run ends at step {last_step}, within its warm-up of {optimizer.warmup_steps} steps: the "
            f"learning rate never reaches more than {last_step / optimizer.warmup_steps:.0%} of "
            f"{optimizer.learning_rate:g}.",
            remedy=f"Lower warmup_steps in OptimizerConfig (a twentieth of the run, {max(1, last_step // 20)}, is "
            f"usual), or train for longer.",
        )

    def _ends_early(self, run_id: str, last_step: int) -> Alarm | None:
        optimizer = self._optimizer
        if (
            optimizer.schedule == "constant"
            or optimizer.total_steps is None
            or last_step <= optimizer.total_steps
        ):
            return None
        return Alarm(
            run_id=run_id,
            step=last_step,
            name="schedule_short",
            level="amber",
            message=f"The {optimizer.schedule} schedule ends at total_steps={optimizer.total_steps}, and at this pace "
            f"the run at step {last_step}: {last_step - optimizer.total_steps} optimiser steps will move nothing.",
            remedy=f"Set OptimizerConfig(total_steps={last_step}), or stop the run where the schedule ends.",
        )

    def _over(self, run_id: str, step: int) -> Alarm:
        return Alarm(
            run_id=run_id,
            step=step,
            name="schedule_over",
            level="red",
            message=f"The learning rate is 0 from here on: the {self._optimizer.schedule} schedule ended with step "
            f"{self._optimizer.total_steps}. Further steps move nothing.",
            remedy="Stop the run. To train on: service.restore(checkpoint, optimizer={'total_steps': …}), where "
            "total_steps counts from the client's first step; or schedule='constant'.",
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
