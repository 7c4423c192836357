"""What stays in the file."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from tensafe_nb.display import LEFT
from tensafe_nb.events import StateLoaded
from tensafe_nb.history.figures import smoothed
from tensafe_nb.protocol.results import RunStatus
from tensafe_nb.widgets.feed.feed import Feed
from tensafe_nb.widgets.still import picture, snapshot, words
from tensafe_nb.widgets.still.picture import extremes
from tensafe_nb.widgets.still.snapshot import Snapshot, StillOutputs
from tensafe_nb.widgets.still.words import Subject

from .conftest import FakeClient, FakeRun, HandFlusher, Output


class Cell:
    """A static part in a cell, and whether a page listens."""

    def __init__(self, feed: Feed, run: FakeRun | None, outputs: list[Output]) -> None:
        self.alone = True
        self.outputs = outputs
        self.part = StillOutputs(feed, None if run is None else run.run_id, alone=lambda: self.alone)
        self.part.place()
        outputs.clear()

    def flush(self) -> list[str]:
        """Flush, twice since a picture is sent by the flush after it was drawn; return what was renewed."""
        self.outputs.clear()
        self.part.flush()
        self.part.flush()
        return [str(output.display_id).rpartition("-")[2] for output in self.outputs]


@pytest.fixture
def run(client: FakeClient) -> FakeRun:
    return client.start()


@pytest.fixture
def cell(feed: Feed, run: FakeRun, outputs: list[Output], monkeypatch: pytest.MonkeyPatch) -> Cell:
    monkeypatch.setattr(snapshot, "draw", lambda *_: b"png")
    return Cell(feed, run, outputs)


def test_the_caption_says_everything_in_words(client: FakeClient, feed: Feed) -> None:
    run = client.start()
    client.advance(run, loss=3.0)
    client.measure(loss=2.34567, eval_loss=2.5)
    client.turn(run, RunStatus.FINISHED)
    sentence = Snapshot.take(feed, None).sentence
    assert sentence.startswith(
        "Run 1 of tc-1: FINISHED at step 1 of 10, loss 2.346, eval/loss 2.5, DP off, 20"
    )


def test_the_table_has_a_caption_and_row_headers_and_its_text_is_escaped(
    client: FakeClient, feed: Feed
) -> None:
    run = client.start()
    client.measure(loss=3.0)
    client.turn(run, RunStatus.FAILED, reason="<img src=x onerror=alert(1)>")
    table = Snapshot.take(feed, None).table()["text/html"]
    assert ">Run 1 of tc-1: FAILED at step 0 of 10, loss 3, " in table
    assert (
        f'<th scope="row" {LEFT}>state</th><td {LEFT}>FAILED: &lt;img src=x onerror=alert(1)&gt;</td>'
        in table
    )
    assert "<img" not in table
    assert "color" not in table


def test_only_a_table_that_is_all_there_is_names_the_calls_to_type(client: FakeClient, feed: Feed) -> None:
    client.start()
    assert "run.pause()" in Snapshot.take(feed, None, steering=True).table()["text/html"]
    assert "run.pause()" not in Snapshot.take(feed, None).table()["text/html"]


def test_the_picture_is_a_png_of_960_by_300_below_45_kb_with_words_for_who_does_not_see_it(
    client: FakeClient, feed: Feed
) -> None:
    values = np.random.default_rng(0).normal(size=3_000).cumsum()
    for value in values:
        client.measure(loss=float(value))
    client.measure(loss=float("nan"), eval_loss=1.0)
    taken = Snapshot.take(feed, None)
    drawn = taken.picture()
    assert drawn is not None
    data, metadata = drawn
    png = data["image/png"]
    assert struct.unpack(">II", png[16:24]) == (960, 300)
    assert len(png) < 45_000
    assert metadata["image/png"] == {"alt": taken.sentence}


def test_there_is_no_picture_of_nothing(feed: Feed) -> None:
    assert Snapshot.take(feed, None).picture() is None


def test_a_curve_that_was_not_measured_leaves_a_picture_that_says_so(client: FakeClient, feed: Feed) -> None:
    rewards = Subject((feed,), "curves", ("run",), "reward")
    assert Snapshot.take(rewards, None).picture() is None  # nothing at all so far
    client.measure(loss=1.0)
    drawn = Snapshot.take(rewards, None).picture()
    assert drawn is not None
    png = Image.open(io.BytesIO(drawn[0]["image/png"]))
    assert png.size == (960, 300) and png.info["Description"].startswith("No reward was measured so far. ")
    assert len(np.unique(np.asarray(png.convert("RGBA")).reshape(-1, 4), axis=0)) > 4  # its words are drawn


def test_a_spike_survives_however_long_the_curve() -> None:
    values = np.zeros(100_000)
    values[[40_000, 40_003]] = 7.0, -5.0
    steps, kept = extremes(np.arange(len(values)), values)
    assert len(kept) <= 1_800
    assert (kept.max(), kept.min()) == (7.0, -5.0)
    assert np.all(np.diff(steps) > 0)


def test_smoothing_is_unbiased_from_the_first_value_on_and_steps_over_what_is_not_finite() -> None:
    assert smoothed(np.array([5.0, 5.0, np.nan, 5.0])) == pytest.approx([5.0] * 4)
    assert smoothed(np.array([0.0, 1.0]), weight=0.5)[1] == pytest.approx(2 / 3)


def test_outputs_are_placed_empty_where_a_page_will_show_more(
    feed: Feed, run: FakeRun, outputs: list[Output]
) -> None:
    StillOutputs(feed, run.run_id, alone=lambda: False).place()
    assert [output.data["text/plain"] for output in outputs] == ["", ""]
    assert not any(output.update for output in outputs)


def test_outputs_are_placed_whole_where_nothing_else_may_ever_be_seen(
    client: FakeClient, feed: Feed, run: FakeRun, outputs: list[Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "draw", lambda *_: b"png")
    client.advance(run, loss=1.0)
    StillOutputs(feed, run.run_id, alone=lambda: True).place()
    assert [next(iter(output.data)) for output in outputs] == ["image/png", "text/html"]
    assert "at step 1 of 10, loss 1, " in outputs[0].data["text/plain"] == outputs[1].data["text/plain"]


def test_without_a_page_the_table_is_renewed_every_2_s_and_the_picture_every_30(
    client: FakeClient, flusher: HandFlusher, cell: Cell
) -> None:
    client.measure(loss=1.0)
    assert cell.flush() == []
    flusher.time += 2.0
    assert cell.flush() == ["table", "picture"]
    flusher.time += 2.0
    assert cell.flush() == ["table"]
    client.measure(loss=0.9)
    flusher.time += 28.0
    assert cell.flush() == ["table", "picture"]


def test_with_a_page_a_file_is_never_more_than_a_minute_older_than_the_training(
    client: FakeClient, flusher: HandFlusher, run: FakeRun, cell: Cell
) -> None:
    cell.alone = False
    renewed = []
    for seconds in (1, 4, 30, 30):  # after the output was placed 1, 5, 35 and 65 s ago
        client.advance(run)
        flusher.time += seconds
        renewed.append(cell.flush())
    assert renewed == [[], ["table", "picture"], [], ["table", "picture"]]
    assert "at step 4 of 10" in cell.outputs[1].data["text/plain"]
    client.turn(run, RunStatus.FINISHED)
    assert cell.flush() == ["table", "picture"]
    assert "FINISHED" in cell.outputs[0].data["text/html"]
    client.close()
    assert not cell.part.live


def test_a_picture_follows_the_table_of_a_pause_as_soon_as_another_may_be_drawn(
    client: FakeClient, flusher: HandFlusher, run: FakeRun, cell: Cell
) -> None:
    cell.alone = False
    for _ in range(2):
        client.advance(run)
        client.turn(run, RunStatus.PAUSED)
        cell.flush()
    flusher.time += 29
    assert cell.flush() == []
    flusher.time += 1
    assert cell.flush() == ["table", "picture"]


def test_a_state_that_is_loaded_after_the_end_is_in_table_and_picture(
    client: FakeClient, flusher: HandFlusher, run: FakeRun, cell: Cell
) -> None:
    cell.alone = False
    client.advance(run, loss=3.0)
    client.save("art-a", step=1)
    client.advance(run, loss=2.0)
    client.turn(run, RunStatus.FINISHED)
    cell.flush()
    client.publish(StateLoaded(artifact_id="art-a", step=1))
    assert cell.flush() == ["table", "picture"]
    table = cell.outputs[0].data["text/html"]
    assert "FINISHED at step 2 of 10, the client now at step 1, loss 3, " in table
    assert "step 1: art-a was loaded after the end</td>" in table


@pytest.mark.parametrize("end", [RunStatus.FAILED, RunStatus.STOPPED])
def test_the_end_is_pictured_however_it_came(
    client: FakeClient, run: FakeRun, cell: Cell, end: RunStatus
) -> None:
    cell.alone = False
    client.turn(run, end, reason="because")
    assert cell.flush() == ["table", "picture"]


def test_pauses_are_pictured_once_in_30_s_at_most(
    client: FakeClient, flusher: HandFlusher, run: FakeRun, cell: Cell
) -> None:
    cell.alone = False
    renewed = []
    for _ in range(2):
        client.advance(run)
        client.turn(run, RunStatus.PAUSED)
        renewed.append(cell.flush())
        client.turn(run, RunStatus.RUNNING)
        flusher.time += 5
    assert renewed == [["table", "picture"], ["table"]]


def test_after_a_reload_it_is_known_of_which_step_the_picture_in_the_file_is(
    client: FakeClient, run: FakeRun, cell: Cell
) -> None:
    cell.part.meet()
    assert cell.part.hint is None
    cell.part.meet()
    assert cell.part.hint == {"last": None}
    client.advance(run)
    client.turn(run, RunStatus.PAUSED)
    cell.flush()
    assert cell.part.hint == {"last": None}
    client.turn(run, RunStatus.FINISHED)
    cell.flush()
    assert cell.part.hint is not None and "FINISHED at step 1 of 10" in str(cell.part.hint["last"])
    cell.part.place()
    assert cell.part.hint is None


def test_a_picture_bears_the_words_of_its_caption(client: FakeClient, feed: Feed) -> None:
    client.measure(loss=3.0)
    taken = Snapshot.take(feed, None)
    drawn = taken.picture()
    assert drawn is not None
    image = Image.open(io.BytesIO(drawn[0]["image/png"]))
    assert image.info["Description"] == taken.sentence


def test_a_client_without_a_run_is_pictured_when_it_is_closed(
    client: FakeClient, feed: Feed, outputs: list[Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "draw", lambda *_: b"png")
    cell = Cell(feed, None, outputs)
    cell.alone = False
    client.measure(loss=1.0)
    assert cell.flush() == []
    client.close()
    assert cell.flush() == ["table", "picture"]
    assert not cell.part.live


def test_freezing_puts_picture_and_table_into_the_calling_cell(
    client: FakeClient, feed: Feed, outputs: list[Output]
) -> None:
    run = client.start()
    client.advance(run)
    snapshot.display(feed, run)  # type: ignore[arg-type]
    assert [next(iter(output.data)) for output in outputs] == ["image/png", "text/html"]


def test_after_a_rollback_the_curve_is_the_branch_that_is_trained() -> None:
    steps = np.array([1, 2, 3, 4, 3, 4, 5, 2, 3])
    kept = words.current(steps)
    assert kept.tolist() == [True, *[False] * 6, True, True]
    assert [part.tolist() for part in picture.abandoned(steps, kept)] == [[1, 2, 3], [4, 5, 6]]
    straight = np.arange(5)
    assert words.current(straight).all() and picture.abandoned(straight, words.current(straight)) == []


def test_what_a_loaded_state_gave_up_is_no_part_of_the_curve_though_nothing_was_trained_since(
    client: FakeClient, feed: Feed
) -> None:
    for loss in (3.0, 2.0, 1.0):
        client.measure(loss=loss)
        client.save(f"art-{client.step}", step=client.step)
    client.publish(StateLoaded(artifact_id="art-2", step=2))
    assert [column.tolist() for column in words.current_of(feed.history, "loss")] == [[1, 2], [3.0, 2.0]]
    assert "at step 2, loss 2, " in Snapshot.take(feed, None).sentence


def test_several_clients_are_told_side_by_side(client: FakeClient, feed: Feed) -> None:
    client.measure(loss=3.0)
    subject = words.Subject((feed, feed), "curves", ("mine", "yours"), "loss")
    taken = Snapshot.take(subject, None)
    assert taken.sentence.count("tc-1: READY at step 1, loss 3") == 2
    assert f'<th scope="row" {LEFT}>yours</th><td {LEFT}>loss 3 → 3</td>' in taken.table()["text/html"]
    assert taken.picture() is not None
