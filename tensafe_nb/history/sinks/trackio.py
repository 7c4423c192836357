"""trackio: a database on this machine, which `trackio show` opens; or a Space of Hugging Face."""

from collections.abc import Mapping
from typing import Any

from tensafe_nb.history.sinks.sink import SinkRun, installed


class Trackio:
    """Logs to a project of trackio.

    Args:
        where: The project.
        options: Further arguments of `trackio.init`, such as `space_id`.
    """

    def __init__(self, where: str = "tensafe_nb", **options: Any) -> None:
        self._trackio = installed("trackio", "trackio")
        self._where = where
        quiet = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        self._options = quiet | options
        self._runs: dict[str, Any] = {}

    def begin(self, run: SinkRun) -> None:
        said = {"run_id": run.run_id, "tags": ", ".join(run.tags), "notes": run.notes}
        config = dict(run.config) | {name: value for name, value in said.items() if value}
        self._trackio.context_vars.current_run.set(None)  # else it would end the run before
        self._runs[run.run_id] = self._trackio.init(
            project=str(self._where), name=run.name, config=config, **self._options
        )

    def metrics(self, run: SinkRun, step: int, values: Mapping[str, float], time: float) -> None:
        self._runs[run.run_id].log(dict(values), step=step)

    def text(self, run: SinkRun, step: int, name: str, text: str, time: float) -> None:
        self._runs[run.run_id].log({name: self._trackio.Markdown(text)}, step=step)

    def end(self, run: SinkRun, state: str) -> None:
        self._runs.pop(run.run_id).finish()

    def close(self) -> None:
        for run in self._runs.values():
            run.finish()
        self._runs.clear()
