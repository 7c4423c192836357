"""What a cell shows of whatever one can hold: one line, one small table, at once, and nothing that could harm."""

import dataclasses
import json
import pickle
import re
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

import tensafe_nb as tn
from tensafe_nb import display as reprs
from tensafe_nb.core.bus import EventBus
from tensafe_nb.display import as_markdown
from tensafe_nb.events import CheckpointSaved, Metrics
from tensafe_nb.history.log import RunHistory
from tensafe_nb.protocol import results as types
from tensafe_nb.protocol.codec import decode, encode
from tensafe_nb.rlvr.algorithms.result import UpdateResult
from tensafe_nb.rlvr.rollouts.trajectories import RolloutGroup, Trajectory, TrajectoryBatch
from tensafe_nb.rlvr.scoring.scorer import FunctionReport, ScoreReport
from tensafe_nb.runs import record as records

HOSTILE = "<img src=x onerror=alert(1)>\u202eevil\x1b[31m\n&"
SECRET = "tsk-do-not-show-me"


def hostile(kind: type) -> Any:
    """Make an instance of a dataclass whose texts are hostile."""
    samples = {"str": HOSTILE, "int": 3, "float": 0.123456789, "bool": True}
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        name = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
        if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING:
            continue
        values[field.name] = samples.get(name.partition(" ")[0], samples.get(name))
        if values[field.name] is None:
            values[field.name] = {HOSTILE: HOSTILE} if "Mapping" in str(field.type) else (HOSTILE,)
    return kind(**values)


DATA = [
    kind
    for kind in vars(types).values()
    if isinstance(kind, type)
    and dataclasses.is_dataclass(kind)
    and kind.__name__.endswith(("Result", "Metrics", "Entry", "Verification", "Info", "Encryption"))
]
BATCH = tn.BatchData([[5, 6, 7, 8]], advantages=[[1.0, 0.0, 0.0, 0.0]])
TRAJECTORY = Trajectory(HOSTILE, HOSTILE, meta={HOSTILE: HOSTILE}, tokens=list(range(500)), reward=1.0)
GROUP = RolloutGroup("p", HOSTILE, [TRAJECTORY])
HELD: dict[str, Any] = {
    **{kind.__name__: hostile(kind) for kind in DATA},
    "SampleResult": types.SampleResult((hostile(types.SampledSequence),) * 3, 1),
    "BatchData": BATCH,
    "LoRAConfig": tn.LoRAConfig(target_modules=(HOSTILE,)),
    "TrainingConfig": tn.TrainingConfig(model_ref=HOSTILE, lora_config=tn.LoRAConfig()),
    "SamplingConfig": tn.SamplingConfig(stop=(HOSTILE,)),
    "DPConfig": tn.DPConfig(dataset_id=HOSTILE, dataset_size=100),
    "Trajectory": TRAJECTORY,
    "RolloutGroup": GROUP,
    "TrajectoryBatch": TrajectoryBatch([GROUP], tn.SamplingConfig()),
    "ScoreReport": ScoreReport(1, 0, 0, 0, {HOSTILE: FunctionReport(0.5, 0.1)}, HOSTILE, None),
    "CheckpointSaved": CheckpointSaved(
        artifact_id="art-1", step=3, size_bytes=1, content_hash="x", name=HOSTILE
    ),
    "RunRecord": dataclasses.replace(hostile(records.RunRecord), state=tn.RunStatus.RUNNING),
}


class Tags(HTMLParser):
    """The tags and attributes of a fragment, and whether every tag is closed."""

    def __init__(self, fragment: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(fragment)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def html_of(held: Any) -> str:
    if hasattr(held, "_repr_html_"):
        return held._repr_html_()
    return held._repr_mimebundle_()["text/html"]


def check_table(fragment: str) -> None:
    tags = Tags(fragment)
    assert tags.open == []
    assert set(tags.tags) <= {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert ("scope", "row") in tags.attributes or ("scope", "col") in tags.attributes
    assert {name for name, _ in tags.attributes} <= {"class", "scope", "style"}, "no scripts of their own"
    styles = {value for name, value in tags.attributes if name == "style"}
    assert styles <= {"text-align: left", "text-align: right"}, "no colours of their own"
    assert not re.search(r"[\x00-\x1f\x7f\u202a-\u202e\u2066-\u2069]", fragment)


@pytest.mark.parametrize("name", HELD)
def test_the_table_of_whatever_one_holds_is_scoped_escaped_and_colourless(name: str) -> None:
    check_table(html_of(HELD[name]))


@pytest.mark.parametrize("name", HELD)
def test_the_repr_of_whatever_one_holds_is_one_short_line(name: str) -> None:
    text = repr(HELD[name])
    assert "\n" not in text and "\x1b" not in text and "\u202e" not in text
    assert len(text) < 1500
    assert type(HELD[name]).__name__ in text


def test_the_list_of_what_is_tested_has_all_results_and_more() -> None:
    assert {"ForwardBackwardResult", "SampleResult", "AuditLogEntry", "SaveStateResult"} < set(HELD)
    assert hasattr(UpdateResult, "_repr_html_")


def test_what_is_shown_is_what_is_there() -> None:
    result = types.ForwardBackwardResult(2.3456789, 0.5, 6, {"gamma": 2.5}, 6.0)
    assert repr(result) == (
        "ForwardBackwardResult(loss=2.34568, grad_norm=0.5, tokens_processed=6, metrics={'gamma': 2.5}, weight=6, "
        "logprobs=None)"
    )
    assert f'<th scope="row" {reprs.LEFT}>loss</th><td {reprs.LEFT}>2.34568</td>' in result._repr_html_()
    assert f'<th scope="row" {reprs.LEFT}>metrics</th><td {reprs.LEFT}>gamma 2.5</td>' in result._repr_html_()
    scores = types.LogprobsResult(np.zeros((2, 4)), np.zeros((2, 4)), None)
    assert repr(scores) == (
        "LogprobsResult(logprobs=<(2, 4) float64>, entropy=<(2, 4) float64>, policy_version=None, values=None)"
    )
    assert (
        f'<th scope="row" {reprs.LEFT}>advantages</th><td {reprs.LEFT}>(1, 4) float64</td>'
        in BATCH._repr_html_()
    )


def test_invisible_characters_are_shown_as_codes() -> None:
    assert reprs.visible("a\x1b\n\u202eb\u2028\x00é日") == "a\\x1b\\n\\u202eb\\u2028\\x00é日"
    assert len(reprs.short("x" * 10_000)) == reprs.LONGEST + 1


def test_a_moment_is_shown_as_a_date() -> None:
    info = types.TrainingClientInfo("tc-1", "builtin:tiny", "READY", 0, 0, 1_700_000_000.0)
    assert "2023-11-1" in info._repr_html_()


def test_data_stays_what_it_was() -> None:
    result = types.ForwardBackwardResult(2.3456789, 0.5, 6)
    assert decode(json.loads(json.dumps(encode(result)))) == result
    assert pickle.loads(pickle.dumps(result)) == result
    assert not hasattr(result, "__dict__"), "it has slots"


def test_a_listing_is_a_list_and_shows_a_row_for_each() -> None:
    items = [types.Encryption("AES", HOSTILE), types.Encryption("GCM", "k")]
    listing = reprs.Listing(items, reprs.fields_of)
    assert isinstance(listing, list) and listing == items
    assert type(listing[:1]) is list and type(sorted(listing, key=str)) is list
    assert encode(listing) == encode(items)
    copied = pickle.loads(pickle.dumps(listing))
    assert type(copied) is list and copied == items
    check_table(listing._repr_html_())
    assert listing._repr_html_().count("<tr>") == 3
    long = reprs.Listing(items * 50, reprs.fields_of)._repr_html_()
    assert "100 in all, the first 50 shown" in long and long.count("<tr>") == 51
    assert "0 in all" in reprs.Listing([], reprs.fields_of)._repr_html_()


def test_a_history_offers_its_metrics_to_the_tab_key(tmp_path: Any) -> None:
    bus = EventBus(tmp_path / "events.jsonl")
    bus.publish(Metrics(step=1, values={"loss": 3.0, HOSTILE: 1.0}))
    bus.publish(Metrics(step=2, values={"loss": 2.0}))
    bus.close()
    history = RunHistory.load(tmp_path / "events.jsonl")
    assert "loss" in history._ipython_key_completions_()
    assert (
        f'<th scope="row" {reprs.LEFT}>loss</th><td {reprs.LEFT}>2 values, 3 → 2</td>'
        in history._repr_html_()
    )
    check_table(history._repr_html_())


@pytest.fixture
def busy(service: tn.ServiceClient, tc: tn.TrainingClient) -> Iterator[tn.FutureHandle[Any]]:
    """A client whose worker is held up inside an operation, until the test is over."""
    entered, free = threading.Event(), threading.Event()

    def held_up(outputs: Any, batch: Any) -> Any:
        entered.set()
        assert free.wait()
        return outputs.logprobs.mean()

    handle = tc.forward_backward({"input_ids": [[5, 6, 7, 8]]}, held_up)
    assert entered.wait()
    yield handle
    free.set()
    assert handle.exception() is None


def test_nothing_waits_while_the_worker_is_busy(
    service: tn.ServiceClient, tc: tn.TrainingClient, busy: tn.FutureHandle[Any]
) -> None:
    held = [
        service,
        tc,
        busy,
        tc.history,
        tc.config,
        service.list_training_clients(),
        service.list_artifacts(),
    ]
    shown = threading.Event()

    def show() -> None:
        for one in held:
            repr(one)
            getattr(one, "_repr_html_", str)()
        shown.set()

    threading.Thread(target=show, daemon=True).start()
    assert shown.wait()
    assert busy.state == "RUNNING"


def test_what_a_service_lists_is_shown_as_tables_and_no_secret_is_in_them(
    monkeypatch: pytest.MonkeyPatch, service: tn.ServiceClient, tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    monkeypatch.setenv("TENSAFE_API_KEY", SECRET)
    monkeypatch.setenv("TENSAFE_PASSPHRASE", SECRET)
    tc.fit([batch], steps=1, show=False).result()
    saved = tc.save_state(metadata={"note": HOSTILE}, name=HOSTILE).result()
    shown = [
        service, saved, service.list_artifacts(), service.get_audit_logs(), service.verify_audit_log(),
        service.list_training_clients(), tn.list_runs(), tc.history, tc.config,
    ]  # fmt: skip
    for one in shown:
        check_table(html_of(one))
        assert SECRET not in html_of(one) + repr(one)
    assert saved.artifact_id in service.list_artifacts()._repr_html_()
    assert "1 in all" in tn.list_runs()._repr_html_()
    assert isinstance(service.list_artifacts(), list) and isinstance(tn.list_runs(), list)


HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>\"'><svg onload=alert(3)> | `code` **bold** ~~gone~~ "
    "[a](javascript:alert(4)) ![b](x) $x$ \u202e &lt;b&gt;\n# heading"
)


def test_text_as_markdown_renders_as_just_that_text() -> None:
    from nbconvert.filters.markdown_mistune import markdown2html_mistune

    class Tags(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []
            self.text = ""

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.seen.append(tag)

        def handle_data(self, data: str) -> None:
            self.text += data

    for source in (f"a {as_markdown(HOSTILE)} z", f"| a | b |\n|---|---|\n| {as_markdown(HOSTILE)} | y |"):
        page = Tags()
        page.feed(markdown2html_mistune(source))
        assert set(page.seen) <= {"p", "table", "thead", "tbody", "tr", "th", "td"}
        assert "<script>alert(1)</script><img src=x onerror=alert(2)>" in page.text
        assert "[a](javascript:alert(4)) ![b](x) $x$ \\u202e &lt;b&gt; # heading" in page.text


def test_bytes_are_told_in_units_and_numbers_stand_on_the_right() -> None:
    told = [reprs.size_text(count) for count in (0, 999, 1200, 999_499, 999_600, 12_500_000, 3 * 10**9)]
    assert told == ["0 B", "999 B", "1.20 kB", "999 kB", "1.00 MB", "12.5 MB", "3.00 GB"]
    listed = reprs.listing(
        "two", [{"name": "a", "size_bytes": 1200, "loss": None}, {"name": "b", "size_bytes": 5, "loss": 2.0}]
    )
    assert f'<th scope="col" {reprs.LEFT}>name</th><th scope="col" {reprs.RIGHT}>size_bytes</th>' in listed
    assert f"<td {reprs.RIGHT}>1.20 kB</td><td {reprs.RIGHT}>—</td>" in listed
