"""TensorBoard: event files, one folder for each run, written by the package tensorboard; no torch, no TensorFlow."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensafe_nb.history.sinks.sink import SinkRun, installed

FLUSH_SECONDS = 2  # between two writes to the disk, so that a page that is open follows


class TensorBoard:
    """Writes event files that `tensorboard --logdir` shows.

    Args:
        where: The folder of all runs; each run has one of its own in it.
    """

    def __init__(self, where: str | Path = "runs") -> None:
        self._files = installed("tensorboard.summary.writer.event_file_writer", "tensorboard")
        self._event = installed("tensorboard.compat.proto.event_pb2", "tensorboard")
        self._summary = installed("tensorboard.compat.proto.summary_pb2", "tensorboard")
        self._tensor = installed("tensorboard.compat.proto.tensor_pb2", "tensorboard")
        self._hparams = installed("tensorboard.plugins.hparams.summary_v2", "tensorboard")
        self._where = Path(where)
        self._writers: dict[str, Any] = {}

    def begin(self, run: SinkRun) -> None:
        folder = self._where.joinpath(*(name_of_folder(part) for part in run.name.split("/")))
        if (
            run.name != run.run_id and folder.exists()
        ):  # another run of that name: two in one would be one curve
            folder = folder.with_name(f"{folder.name} ({name_of_folder(run.run_id)})")
        self._writers[run.run_id] = self._files.EventFileWriter(str(folder), flush_secs=FLUSH_SECONDS)
        self._add(run, 0, self._hparams.hparams_pb(dict(run.config), trial_id=run.run_id), None)
        self.describe(run)

    def describe(self, run: SinkRun) -> None:
        name = run.name if run.name != run.run_id else ""
        words = [("name", name), ("tags", ", ".join(run.tags)), ("notes", run.notes), *run.config.items()]
        rows = "\n".join(f"| {name} | {value} |" for name, value in words if value != "")
        self._add(run, 0, self._text("config", f"| | {run.run_id} |\n|---|---|\n{rows}"), None)

    def metrics(self, run: SinkRun, step: int, values: Mapping[str, float], time: float) -> None:
        made = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(run, step, self._summary.Summary(value=made), time)

    def text(self, run: SinkRun, step: int, name: str, text: str, time: float) -> None:
        self._add(run, step, self._text(name, text), time)

    def end(self, run: SinkRun, state: str) -> None:
        self._writers.pop(run.run_id).close()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _add(self, run: SinkRun, step: int, summary: Any, time: float | None) -> None:
        at = {} if time is None else {"wall_time": time}
        self._writers[run.run_id].add_event(self._event.Event(step=step, summary=summary, **at))

    def _text(self, name: str, text: str) -> Any:
        """Return a summary of TensorBoard's plug-in for texts."""
        plugin = self._summary.SummaryMetadata.PluginData(plugin_name="text")
        value = self._tensor.TensorProto(dtype="DT_STRING", string_val=[text.encode()])
        made = self._summary.Summary.Value(
            tag=name, tensor=value, metadata=self._summary.SummaryMetadata(plugin_data=plugin)
        )
        return self._summary.Summary(value=[made])


def name_of_folder(name: str) -> str:
    """Return a name as a folder's: without what file systems refuse, and never one that leads elsewhere."""
    return re.sub(r"[^\w .=,+()-]", "_", name).strip(" .")[:100] or "_"
