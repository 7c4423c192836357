"""Arms whose runs are real and whose numbers are written down: a loop that trains nothing and publishes a score."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

import tensafe_nb as tn
from tensafe_nb.events import Metrics, RunState
from tensafe_nb.runs.loop import Run
from tensafe_nb.runs.run import TrainingRun

Score = Callable[[int, int], float]  # of a seed and a step


class ScriptedLoop:
    """Measures what it was told to."""

    lookahead = 0
    curve = "reward"

    def __init__(self, client: tn.TrainingClient, score: Callable[[int], float]) -> None:
        self._client, self._score = client, score

    def attach(self, run: Run) -> None:
        self._run = run

    def submit(self, index: int) -> Sequence[tn.FutureHandle[Any]]:
        self._client.publish(
            Metrics(step=index + 1, values={"reward": self._score(index + 1)}, run_id=self._run.run_id)
        )
        return []

    def collect(self, index: int, results: Sequence[Any]) -> None: ...

    def position(self) -> Mapping[str, Any]:
        return {}

    def seek(self, position: Mapping[str, Any]) -> None: ...

    def interrupt(self) -> None: ...

    def close(self) -> None: ...


def scripted(
    service: tn.ServiceClient, score: Callable[[int], float], steps: int, resume_from: str | None = None
) -> TrainingRun:
    """Start a run that measures `score(step)`; it stays in its first step until it is asked to pause."""
    client = service.create_training_client(lora_config={"rank": 1})
    asked = threading.Event()
    client.subscribe(lambda e: asked.set() if isinstance(e, RunState) and e.state == "PAUSING" else None)

    def held(step: int) -> float:
        assert asked.wait(60)
        return score(step)

    loop = ScriptedLoop(client, held)
    return client.start_run(loop, planned_steps=steps, resume_from=resume_from, show=False)


@pytest.fixture
def ideas() -> Callable[..., TrainingRun]:
    """An arm whose seeds differ by whole numbers and whose ideas differ by `gain` a step."""

    def idea(
        service: tn.ServiceClient,
        seed: int,
        gain: float = 0.0,
        steps: int = 8,
        resume_from: str | None = None,
    ) -> TrainingRun:
        return scripted(
            service,
            lambda step: seed + gain * step + 0.01 * ((seed * (7 + round(10 * gain)) + step * 3) % 7),
            steps,
            resume_from,
        )

    return idea
