"""MLflow: runs of an experiment, on a tracking server or in a folder, through its client; nothing of it is global."""

import re
from collections.abc import Mapping

from tensafe_nb.history.sinks.sink import SinkRun, installed

LONGEST_PARAM = 6_000  # characters that MLflow keeps
STATES = {"FINISHED": "FINISHED", "STOPPED": "KILLED", "INTERRUPTED": "KILLED", "FAILED": "FAILED"}


class MLflow:
    """Logs to an experiment of MLflow.

    Args:
        where: The experiment, made if there is none.
        tracking_uri: Where MLflow keeps it; its own default (MLFLOW_TRACKING_URI) when None.
        tags: Of every run.
    """

    def __init__(
        self,
        where: str = "tensafe_nb",
        *,
        tracking_uri: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self._entities = installed("mlflow.entities", "mlflow")
        self._client = installed("mlflow.tracking", "mlflow").MlflowClient(tracking_uri)
        found = self._client.get_experiment_by_name(where)
        self._experiment = self._client.create_experiment(where) if found is None else found.experiment_id
        self._tags = dict(tags or {})
        self._runs: dict[str, str] = {}  # their ids there, by ours
        self._said: dict[str, tuple[str, ...]] = {}  # tags of a run, as they were told

    def begin(self, run: SinkRun) -> None:
        self._said[run.run_id] = run.tags
        tags = self._tags | {"tensafe_nb.run_id": run.run_id} | dict.fromkeys(run.tags, "true")
        if run.notes:
            tags["mlflow.note.content"] = run.notes
        made = self._client.create_run(self._experiment, run_name=run.name, tags=tags)
        self._runs[run.run_id] = made.info.run_id
        params = [
            self._entities.Param(name_of(name), str(value)[:LONGEST_PARAM])
            for name, value in run.config.items()
        ]
        self._client.log_batch(made.info.run_id, params=params)

    def describe(self, run: SinkRun) -> None:
        there = self._runs[run.run_id]
        for tag in set(self._said[run.run_id]) - set(run.tags):
            self._client.delete_tag(there, tag)
        self._said[run.run_id] = run.tags
        named = {"mlflow.runName": run.name, "mlflow.note.content": run.notes}
        for tag, value in (dict.fromkeys(run.tags, "true") | named).items():
            self._client.set_tag(there, tag, value)

    def metrics(self, run: SinkRun, step: int, values: Mapping[str, float], time: float) -> None:
        at = int(time * 1000)
        made = [self._entities.Metric(name_of(name), value, at, step) for name, value in values.items()]
        self._client.log_batch(self._runs[run.run_id], metrics=made)

    def text(self, run: SinkRun, step: int, name: str, text: str, time: float) -> None:
        self._client.log_text(self._runs[run.run_id], text, f"{name_of(name)}/step-{step:06d}.md")

    def end(self, run: SinkRun, state: str) -> None:
        self._client.set_terminated(self._runs.pop(run.run_id), STATES.get(state, "FINISHED"))

    def close(self) -> None:
        for run in self._runs.values():
            self._client.set_terminated(run, "KILLED")
        self._runs.clear()


def name_of(name: str) -> str:
    """Return a name as MLflow takes it; ours are such names, but for what a user's own reward is called."""
    return re.sub(r"[^\w\-. /]", "_", name)
