"""A run or a comparison as one file for a browser: a replay that plays, without a kernel and without the network."""

import base64
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from tensafe_nb.checks import checked
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.runs.record import RunRecord, read_log
from tensafe_nb.runs.run import TrainingRun
from tensafe_nb.store.disk import disk_errors, write_whole
from tensafe_nb.widgets.feed.feed import feed_of
from tensafe_nb.widgets.feed.rollouts import Decode, plain_text
from tensafe_nb.widgets.live.base import css, esm
from tensafe_nb.widgets.live.comparison import ComparisonChart
from tensafe_nb.widgets.live.dashboard import Dashboard
from tensafe_nb.widgets.replay import find_record
from tensafe_nb.widgets.still.race import Shown
from tensafe_nb.widgets.still.snapshot import Snapshot
from tensafe_nb.widgets.tape import Tape

OPERATOR = (
    "Operator view: the curves of a private training are computed from its data, and ε does not cover them. "
    "This file is for whoever may see the data."
)


@dataclass(frozen=True, slots=True)
class Chapter:
    """A run on a page, with what is said of it.

    Attributes:
        run: The run; it has ended.
        title: Above it.
        words: Paragraphs between title and panel.
        outcome: What came of it, in one line above the panel.
        answers: (prompt, answer before, answer after), in a table beneath it.
        code: How it was made, to be opened.
    """

    run: TrainingRun | RunRecord
    title: str
    words: Sequence[str] = ()
    outcome: str = ""
    answers: Sequence[tuple[str, str, str]] = ()
    code: str = ""


@checked
def save_page(
    to: str | Path,
    run: TrainingRun | RunRecord | str | Path,
    *more: TrainingRun | RunRecord | str | Path,
    title: str | None = None,
    samples: int = 0,
) -> Path:
    """Save runs as one HTML file in which their panels play as replays: for whoever has a browser and nothing else.

    The file loads nothing from anywhere. No prompt and no answer is in it, unless you ask for some. Of a training with
    differential privacy it is the operator's view, which ε does not cover, and says so; only you can read the file.

    Args:
        to: The file; one that is there is replaced.
        run: A run that has ended: itself, its record, its id, or an event log, of which the last run is taken.
        more: Further runs, one beneath the other.
        title: The page's.
        samples: So many prompts of each step, with their answers, those from which something is learned first.

    Returns:
        The file.

    Raises:
        ValidationError: A run that is still under way, a log that cannot be read, or a wrong number of samples.
        RunNotFoundError: No such run.
        StorageError: The file cannot be written.

    Example:
        >>> tn.save_page("run.html", run, samples=4)
    """
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 0:
        raise ValidationError(f"save_page: samples={as_given(samples)} must be a whole number, 0 or more.")
    found = [one if isinstance(one, TrainingRun) else find_record(one) for one in (run, *more)]
    chapters = [Chapter(one, f"Run {one.run_id}") for one in found]
    heading = title or " · ".join(chapter.title for chapter in chapters)
    return write_page(Path(to).expanduser(), chapters, heading, samples)


def write_page(
    to: Path, chapters: Sequence[Chapter], title: str, samples: int = 0, words: Sequence[str] = ()
) -> Path:
    """Write a page of several chapters; `words` are paragraphs beneath its title."""
    parts = [_Part.of(chapter, samples) for chapter in chapters]
    body = [line for part in parts for line in part.html()]
    text = _page(title, words, body, Dashboard._esm + esm("scheme", "player"))
    return _written(to, text, private=any(part.private for part in parts))


def write_race(to: str | Path, race: Shown, title: str | None = None) -> Path:
    """Write a page of a comparison: its chart, its table and its words.

    Raises:
        ValidationError: It is still under way.
        StorageError: The file cannot be written.
    """
    if race.status["state"] in ("RUNNING", "PAUSED"):
        raise ValidationError(
            f"The {race.title} is still under way ({race.status['state']}): a page is saved of one that has ended."
        )
    private = bool(race.status["dp"])
    points = {
        name: (
            0,
            steps.tolist(),
            [value if math.isfinite(value) else str(value) for value in values.tolist()],
        )
        for name, (steps, values) in race.curves.items()
    }
    messages = [{"t": "standing"} | race.standing, {"t": "delta", "s": points}, {"t": "status"} | race.status]
    body = [
        *([f"<p><strong>{OPERATOR}</strong></p>"] if private else []),
        f'<div class="tsnb-raced">{_json({"title": race.title, "messages": messages})}</div>',
        f"<details><summary>The comparison in figures</summary>{race.table}</details>",
    ]
    text = _page(title or race.title, (), body, ComparisonChart._esm + esm("scheme", "raced"))
    return _written(Path(to).expanduser(), text, private=private)


def _written(to: Path, text: str, *, private: bool) -> Path:
    with disk_errors(f"write {to}"):
        to.parent.mkdir(parents=True, exist_ok=True)
    write_whole(to, text, shared=not private)
    return to


def _json(content: Any) -> str:
    text = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'


@dataclass(frozen=True, slots=True)
class _Part:
    """A chapter, with what is played in it."""

    chapter: Chapter
    content: dict[str, Any]
    table: str
    private: bool

    @classmethod
    def of(cls, chapter: Chapter, samples: int) -> "_Part":
        record, decode = _record_of(chapter.run)
        tape = Tape(record, samples, decode)
        content = tape.content()
        table = Snapshot.take(tape.feed, tape.run).table()["text/html"]
        return cls(chapter, content, table, tape.feed.is_private)

    def html(self) -> Iterator[str]:
        chapter = self.chapter
        yield f"<section><h2>{_text(chapter.title)}</h2>"
        yield from (f"<p>{_text(words)}</p>" for words in chapter.words)
        if self.private:
            yield f"<p><strong>{OPERATOR}</strong></p>"
        if chapter.outcome:
            yield f'<p class="tsnb-outcome">{_text(chapter.outcome)}</p>'
        yield f'<div class="tsnb-tape">{_json(self.content)}</div>'
        if chapter.answers:
            yield _table(("prompt", "answer before", "answer after"), chapter.answers)
        yield f"<details><summary>The run in figures</summary>{self.table}</details>"
        if chapter.code:
            yield f"<details><summary>The code</summary><pre>{_text(chapter.code)}</pre></details>"
        yield "</section>"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell.strip())}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="tsnb-answers"><tbody><tr>{head}</tr>{body}</tbody></table>'


def _record_of(run: TrainingRun | RunRecord) -> tuple[RunRecord, Decode | None]:
    """Return the record of a run that has ended, and what turns its tokens into texts, where that is at hand."""
    decode = None
    if isinstance(run, TrainingRun):
        decode = feed_of(run).decode()
        [run] = [record for record in read_log(run.history.path) if record.run_id == run.run_id]
    if not run.state.ended:
        raise ValidationError(
            f"The run {run.run_id} is still under way ({run.state}): a page is saved of one that has ended."
        )
    return run, decode


def _page(title: str, words: Sequence[str], body: Sequence[str], script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    lines = "\n".join(body)
    saved = f"Saved by tensafe_nb on {datetime.now().astimezone():%Y-%m-%d %H:%M}."
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>{css("standalone")}{css("panel")}</style>
</head>
<body class="tsnb-page">
<h1>{_text(title)}</h1>
{"".join(f"<p>{_text(paragraph)}</p>" for paragraph in words)}
<noscript><p>Charts and replays need JavaScript; the figures beneath them do not.</p></noscript>
{lines}
<footer>{saved} All of it is in this file; nothing is loaded from anywhere.</footer>
<script type="module">{script}</script>
</body>
</html>
"""


def _text(text: str) -> str:
    return escape(plain_text(text))
