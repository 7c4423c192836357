"""What speaks up when supervised training goes wrong: three rules over what each optimiser step has measured."""

import math
from collections import deque
from collections.abc import Mapping
from statistics import median

from tensafe_nb.events import Alarm

WINDOW = 50  # steps whose gradient norms the median is taken of
AT_LEAST = 10  # of them, before anything is called unusual
FACTOR = 10.0
QUIET = 20  # steps without a sign after which a trouble is over, and would be announced again


class StepAlarms:
    """Looks at every step and speaks up when a trouble begins, not at every step of it.

    The gradient rule compares with a running median, which single spikes do not move.
    """

    def __init__(self) -> None:
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._last_seen: dict[str, int] = {}  # name → how many steps ago
        self._count = 0

    def observe(self, run_id: str, step: int, values: Mapping[str, float]) -> list[Alarm]:
        """Return the alarms that begin with this step.

        Args:
            run_id: The run.
            step: The client's optimiser step.
            values: `loss`, `grad_norm` and `param_delta_norm` of it, as far as they are known.
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
                    remedy="Look at the batch of this step. Set max_grad_norm in OptimizerConfig, or lower the "
                    "learning rate.",
                )
            )
        if values.get("param_delta_norm") == 0:
            found.append(
                Alarm(
                    run_id=run_id,
                    step=step,
                    name="no_learning",
                    level="red",
                    message="The step has moved no weight.",
                    remedy="Look at the learning rate, whose schedule may have come to its end, and at which weights "
                    "are trained (lora_config).",
                )
            )
        return found

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
