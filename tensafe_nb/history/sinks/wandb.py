"""Weights & Biases: runs of a project; offline where WANDB_MODE says so."""

from collections.abc import Mapping
from typing import Any

from tensafe_nb.history.sinks.sink import SinkRun, installed


class WeightsAndBiases:
    """Logs to a project of Weights & Biases.

    Its own step only grows. So ours, which a rollback sets back, is the metric "step", over which all others are drawn.

    Args:
        where: The project.
        options: Further arguments of `wandb.init`, such as `entity`, `mode` and `dir`.
    """

    def __init__(self, where: str = "tensafe_nb", **options: Any) -> None:
        self._wandb = installed("wandb", "wandb")
        self._where, self._options = where, options
        self._runs: dict[str, Any] = {}

    def begin(self, run: SinkRun) -> None:
        given = {"name": run.name, "tags": run.tags, "notes": run.notes or None, **self._options}
        config = dict(run.config) | {"run_id": run.run_id}
        made = self._wandb.init(project=str(self._where), config=config, reinit="create_new", **given)
        made.define_metric("*", step_metric="step")
        self._runs[run.run_id] = made

    def describe(self, run: SinkRun) -> None:
        for field in ("name", "tags", "notes"):
            if field not in self._options:
                setattr(self._runs[run.run_id], field, getattr(run, field))

    def metrics(self, run: SinkRun, step: int, values: Mapping[str, float], time: float) -> None:
        self._runs[run.run_id].log({**values, "step": step})

    def text(self, run: SinkRun, step: int, name: str, text: str, time: float) -> None:
        if name.startswith("alarms/"):
            self._runs[run.run_id].alert(title=name, text=text, level="WARN")
        else:
            shown = self._wandb.Table(columns=["step", "text"], data=[[step, text]])
            self._runs[run.run_id].log({name: shown, "step": step})

    def end(self, run: SinkRun, state: str) -> None:
        self._runs.pop(run.run_id).finish(exit_code=1 if state == "FAILED" else 0)

    def close(self) -> None:
        for run in self._runs.values():
            run.finish()
        self._runs.clear()
