"""Recorded runs: shown again as they went, shown whole after a crash, gone on with from their last checkpoint."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import tensafe_nb as tn
from tensafe_nb.events import RunStep
from tensafe_nb.history.log import RunHistory
from tensafe_nb.store.home import Home
from tensafe_nb.widgets import renderer
from tensafe_nb.widgets import replay as replays
from tensafe_nb.widgets.feed import feed
from tensafe_nb.widgets.feed.recording import Recording
from tensafe_nb.widgets.live import dashboard
from tensafe_nb.widgets.still import snapshot
from tests.forking import Forker

STEPS = 12
AT_ONCE = 1e9
KILLED = """
import os, signal, tensafe_nb as tn
tc = tn.ServiceClient().create_training_client(optimizer={"learning_rate": 1e-2})
batches = [tn.BatchData([[5 + n, 6, 7, 8 + n]]) for n in range(10)]
run = tc.fit(batches, checkpoint_every=4, show=False)
tc.subscribe(lambda event: os.kill(os.getpid(), signal.SIGKILL) if tc.step == 10 else None)
run.result()
"""


@pytest.fixture
def recorded(tc: tn.TrainingClient, batch: tn.BatchData) -> tn.TrainingRun:
    """A finished run, the second of its client."""
    tc.fit([batch], steps=2, show=False).result()
    run = tc.fit([batch], steps=STEPS, eval_batches=[batch], eval_every=4, checkpoint_every=5, show=False)
    run.result()
    return run


@pytest.fixture(scope="module")
def left_behind(forker: Forker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home folder of a process that was killed."""
    folder = tmp_path_factory.mktemp("killed") / "home"
    assert forker.status_of(forker.begin(KILLED, TENSAFE_HOME=str(folder))) == -signal.SIGKILL
    return folder


@pytest.fixture
def killed(left_behind: Path) -> Any:
    """The record of a run whose process was killed, in a home folder of the test's own."""
    shutil.copytree(left_behind, os.environ["TENSAFE_HOME"])
    [record] = tn.list_runs()
    return record


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the cells of a notebook were given to show; no page is open."""
    shown: list[dict[str, Any]] = []

    def publish(data: Any, metadata: Any, display_id: str | None = None, *, update: bool = False) -> None:
        shown.append(data)

    monkeypatch.setattr(renderer, "choose", lambda: renderer.Renderer.WIDGET)
    monkeypatch.setattr(snapshot, "publish", publish)
    monkeypatch.setattr(dashboard, "publish", publish)
    return shown


def files() -> dict[Path, tuple[int, int]]:
    return {
        path: (path.stat().st_mtime_ns, path.stat().st_size) for path in Home.of_environment().root.rglob("*")
    }


def texts(outputs: list[dict[str, Any]]) -> str:
    return "\n".join(str(data.get(kind, "")) for data in outputs for kind in ("text/html", "text/plain"))


def test_a_replay_ends_where_the_run_ended_with_the_same_curves(recorded: tn.TrainingRun) -> None:
    replay = tn.replay(recorded.run_id, speed=AT_ONCE, show=False)
    record = replay.result()
    assert replay.done()
    assert (record.run_id, replay.state, replay.steps_done) == (recorded.run_id, "FINISHED", STEPS)
    for name in ("loss", "eval/loss"):
        assert replay.history[name].tolist() == recorded.history[name].tolist()
    assert repr(replay) == f"<REPLAY ×1e+09 of run {recorded.run_id} FINISHED, step 12 of 12>"


async def _awaited(replay: Any) -> Any:
    return await replay


def test_it_can_be_awaited(recorded: tn.TrainingRun) -> None:
    import asyncio

    record = asyncio.run(_awaited(tn.replay(recorded.run_id, speed=AT_ONCE, show=False)))
    assert record.state == "FINISHED"


@pytest.mark.alone  # it measures time
def test_it_takes_the_time_that_the_run_took_divided_by_the_speed(
    recorded: tn.TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tn.load_run(recorded.run_id)
    seconds = list(record.history.events())[-1].time - record.started_at
    monkeypatch.setattr(replays, "LONGEST_GAP", 60.0)
    started = time.monotonic()
    tn.replay(record, speed=seconds / 0.4, show=False).result()
    assert 0.3 < time.monotonic() - started < 3


def test_a_stretch_in_which_nothing_happened_is_cut_short(recorded: tn.TrainingRun) -> None:
    replay = replays.Replay(tn.load_run(recorded.run_id), speed=1.0)
    night = RunStep(run_id=recorded.run_id, done=1, duration=1.0, time=replay.record.started_at + 30_000)
    moment = RunStep(run_id=recorded.run_id, done=1, duration=1.0, time=replay.record.started_at + 0.5)
    assert replay._gap(night) == replays.LONGEST_GAP
    assert replay._gap(moment) == pytest.approx(0.5, abs=1e-6)


def test_what_comes_later_is_not_known_yet(recorded: tn.TrainingRun) -> None:
    recording = Recording(tn.load_run(recorded.run_id), "REPLAY")
    steps = 0
    for event in recording.events():
        recording.tell(event)
        steps += isinstance(event, RunStep) and event.run_id == recorded.run_id
        if steps == 5:
            break
    assert recording.run.steps_done == 5
    assert recording.run.state == "RUNNING"
    assert len(list(recording.history.events())) == recording.history.last_seq
    assert len(recording.history["loss"]) < len(recorded.history["loss"])
    assert recording.history.state.queue.depth >= 0


def test_closing_shows_the_rest_at_once_and_ends_the_thread(recorded: tn.TrainingRun) -> None:
    replay = tn.replay(recorded.run_id, speed=0.001, show=False)
    assert not replay.done()
    replay.close()
    assert replay.done()
    assert replay.steps_done == STEPS


def test_nothing_is_written_to_the_home_folder(
    recorded: tn.TrainingRun, service: tn.ServiceClient, outputs: list[dict[str, Any]]
) -> None:
    service.close()
    before = files()
    replay = tn.replay(recorded.run_id, speed=AT_ONCE)
    replay.result()
    replay.freeze()
    tn.load_run(recorded.run_id)._repr_mimebundle_()
    assert files() == before
    assert outputs


def test_lines_of_a_replay_say_so(recorded: tn.TrainingRun, capsys: pytest.CaptureFixture[str]) -> None:
    tn.replay(recorded.run_id, speed=AT_ONCE).result()
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"REPLAY {recorded.run_id} step 12/12 loss=")
    assert lines[-1].endswith(" finished")
    assert all(line.startswith("REPLAY ") for line in lines)


def test_everything_that_a_notebook_shows_of_a_replay_says_so(
    recorded: tn.TrainingRun, outputs: list[dict[str, Any]]
) -> None:
    replay = tn.replay(recorded.run_id, speed=AT_ONCE)
    replay.result()
    pictures = [data for data in outputs if "image/png" in data]
    tables = [data["text/html"] for data in outputs if "tsnb-frozen" in data.get("text/html", "")]
    assert pictures and "REPLAY" in pictures[-1]["text/plain"]
    assert "REPLAY" in tables[-1]
    [live] = [data for data in outputs if "application/vnd.jupyter.widget-view+json" in data]
    assert "REPLAY" in live["text/plain"] and "REPLAY" in live["text/html"]
    assert "run.pause()" not in texts(outputs)
    panel = dashboard.panel_of(replay.run)
    assert panel.feed.client.marks == ("REPLAY",)
    assert not panel.feed.client.steerable


def test_a_replay_and_the_live_panel_of_the_same_client_are_two(
    recorded: tn.TrainingRun, tc: tn.TrainingClient, outputs: list[dict[str, Any]]
) -> None:
    replay = tn.replay(recorded.run_id, speed=AT_ONCE)
    replay.result()
    assert dashboard.panel_of(replay.run) is not dashboard.panel_of(tc)
    assert dashboard.panel_of(tc) is dashboard.panel_of(recorded)
    tc.close()


def test_a_loaded_run_is_shown_whole(recorded: tn.TrainingRun, outputs: list[dict[str, Any]]) -> None:
    record = tn.load_run(recorded.run_id)
    data, _ = record._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    facts = feed.feed_of(record).standing()
    assert (facts.state, facts.step, facts.planned, facts.active) == ("FINISHED", STEPS, STEPS, False)
    assert 0 < facts.elapsed < 60
    assert dashboard.panel_of(record) is dashboard.panel_of(tn.load_run(recorded.run_id))


def test_a_run_of_a_process_that_died_says_where_and_what_to_go_on_from(
    killed: Any, outputs: list[dict[str, Any]]
) -> None:
    checkpoint = killed.last_checkpoint
    assert repr(killed) == (
        f"<RunRecord {killed.run_id} INTERRUPTED at step {killed.step}, last checkpoint {checkpoint}>"
    )
    killed._repr_mimebundle_()
    facts = feed.feed_of(killed).standing()
    assert (facts.state, facts.active) == ("INTERRUPTED", False)
    assert checkpoint in facts.reason
    tn.replay(killed, speed=AT_ONCE).result()
    assert "INTERRUPTED" in texts(outputs) and checkpoint in texts(outputs)


def test_after_a_crash_training_goes_on_as_if_nothing_had_happened(
    killed: Any, service: tn.ServiceClient
) -> None:
    batches = [tn.BatchData([[5 + n, 6, 7, 8 + n]]) for n in range(10)]
    earlier = killed.history["loss"]
    assert len(earlier) == 10
    tc = service.restore(killed.last_checkpoint)
    run = tc.fit(batches, epochs=2, resume_from=killed.last_checkpoint, show=False)
    run.result()
    again = service.create_training_client(optimizer={"learning_rate": 1e-2})
    again.fit(batches, epochs=2, show=False).result()
    assert earlier.tolist() == again.history["loss"][:10].tolist()
    assert tc.history["loss"].tolist() == again.history["loss"][8:].tolist()
    whole = Recording(tn.load_run(run.run_id), "RECORDED")
    whole.tell_all()
    assert (whole.run.steps_done, whole.history.state.step) == (20, 20)


def test_the_curve_before_a_crash_and_the_one_after_it_are_shown_on_the_same_axes(
    recorded: tn.TrainingRun, outputs: list[dict[str, Any]]
) -> None:
    from tensafe_nb.widgets import LossCurve

    record, client = tn.load_run(recorded.run_id), recorded.run_id.partition("/")[0]
    replay = tn.replay(record, speed=AT_ONCE, show=False)
    replay.result()
    curve = LossCurve(record, recorded, replay.run)
    assert curve.labels == [f"run 2 of {client}", f"run 2 of {client}", f"REPLAY run 2 of {client}"]
    assert [list(one.client.history["loss"]) for one in curve.feeds] == [list(recorded.history["loss"])] * 3
    curve.close()
    named = tn.load_run(recorded.run_id).describe("first try")
    curve = LossCurve(named, tn.replay(named, speed=AT_ONCE, show=False).run)
    assert curve.labels == ["first try", "REPLAY first try"]
    curve.close()


def test_a_log_from_elsewhere_can_be_replayed(recorded: tn.TrainingRun, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_bytes(recorded.history.path.read_bytes())
    for given in (copy, str(copy)):
        replay = tn.replay(given, speed=AT_ONCE, show=False)
        assert replay.result().log == copy
        assert replay.run_id == recorded.run_id


def test_a_log_that_breaks_off_in_the_middle_of_a_line_ends_there(
    recorded: tn.TrainingRun, tmp_path: Path
) -> None:
    torn = tmp_path / "torn.jsonl"
    lines = recorded.history.path.read_text().splitlines(keepends=True)
    torn.write_text("".join(lines[:-5]) + lines[-5][:20])
    replay = tn.replay(torn, speed=AT_ONCE, show=False)
    assert replay.result().state == replay.state == "INTERRUPTED"


def test_a_log_that_becomes_unreadable_fails_the_replay_and_ends_its_panel(
    recorded: tn.TrainingRun, tmp_path: Path
) -> None:
    copy = tmp_path / "events.jsonl"
    lines = recorded.history.path.read_text().splitlines(keepends=True)
    middle = next(n for n, line in enumerate(lines) if '"run_step"' in line and n > len(lines) // 2)
    copy.write_text("".join([*lines[:middle], '{"$": "FromTheFuture"}\n', *lines[middle:]]))
    replay = tn.replay(copy, speed=AT_ONCE, show=False)
    with pytest.raises(tn.ValidationError, match=r"cannot be read to its end: Unknown tag"):
        replay.result()
    assert replay.state == "INTERRUPTED"


@pytest.mark.parametrize("speed", [0, -1, float("inf"), float("nan"), "fast", True])
def test_a_speed_is_a_number_above_0(speed: Any) -> None:
    with pytest.raises(tn.ValidationError, match="speed="):
        tn.replay("tc-1/1", speed=speed)


def test_what_cannot_be_replayed_is_refused_with_the_reason(
    tc: tn.TrainingClient, batch: tn.BatchData, tmp_path: Path
) -> None:
    with pytest.raises(tn.RunNotFoundError, match="no run 'tc-x/1'"):
        tn.replay("tc-x/1")
    with pytest.raises(tn.ValidationError, match="no event log"):
        tn.replay(tmp_path / "none.jsonl")
    (tmp_path / "other.jsonl").write_text('{"name": "RunState", "$": "x"}\n["RunState"]\n"Metrics"\n')
    with pytest.raises(tn.ValidationError, match="cannot be read as an event log"):
        tn.replay(tmp_path / "other.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(tn.RunNotFoundError, match="no run in"):
        tn.replay(tmp_path / "empty.jsonl")
    run = tc.fit([batch], steps=100_000, show=False)
    with pytest.raises(tn.ValidationError, match="still under way"):
        tn.replay(run.run_id)
    assert "RUNNING" in tn.load_run(run.run_id)._repr_mimebundle_()["text/plain"]
    run.stop()
    run.result()


def test_a_log_without_its_beginning_is_refused(recorded: tn.TrainingRun, tmp_path: Path) -> None:
    headless = tmp_path / "headless.jsonl"
    headless.write_text("".join(recorded.history.path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(tn.ValidationError, match="does not begin with what was trained"):
        tn.replay(headless)


def test_a_record_reads_as_its_log_says(recorded: tn.TrainingRun) -> None:
    record = tn.load_run(recorded.run_id)
    assert json.loads(record.log.read_text().splitlines()[0])["$"] == "client_created"
    assert record.curve == "loss"
    assert isinstance(record.history, RunHistory)


def test_the_samples_of_a_log_that_was_moved_are_found_beside_it_and_nowhere_else(
    service: tn.ServiceClient, tmp_path: Path
) -> None:
    tc = service.create_training_client(model_ref="builtin:sums")
    few = {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 4}
    trainer = tn.rlvr.RLVRTrainer(tc, tn.datasets.sums(8, seed=0), "exact_match", **few)
    run = trainer.run(steps=2, show=False)
    run.result()
    service.close()
    moved = tmp_path / "moved"
    Home.of_environment().event_log(tc.training_client_id).parent.rename(moved)
    log = moved / "events.jsonl"
    log.write_text(log.read_text().replace(str(Home.of_environment().root), "/etc"))
    replay = tn.replay(log, speed=AT_ONCE, show=False)
    assert replay.result().curve == "reward"
    seen = feed.feed_of(replay.run)
    shown = seen.state.rollouts
    assert sorted(shown) == [1, 2]
    found = [seen.client.history.rollouts_file(one) for one in shown.values()]
    assert all(path.is_file() and moved in path.parents for path in found)
