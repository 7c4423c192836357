"""The arithmetic of the benchmark table; the measurements themselves are `make bench`."""

import json
import sys
from pathlib import Path

import pytest

import bench.__main__ as command
from bench import pages, report
from bench.harness import (
    FASTER,
    LARGER,
    Row,
    Skipped,
    Taken,
    Target,
    as_it_says,
    beside,
    fresh_process,
    p99,
    paired,
    stopwatch,
)

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
NAMES = {
    "training": "training:all_labelled",
    "queue-p99": "queue:worst_latency",
    "real-training": "real:all_labelled",
}
NOTHING: dict[str, dict] = {"runs": {}, "rows": {}, "skipped": {}}

MACHINE = {
    "cpu_count": 2,
    "cpu": "a CPU",
    "load_average": 0.1,
    "torch_threads": 1,
    "OMP_WAIT_POLICY": "PASSIVE",
    "torch": "2",
    "transformers": "5",
    "peft": "0.18",
    "python": "3.11",
    "date": "2026-01-31T12:00:00+00:00",
}


def row(taken: Taken, **fields: object) -> Row:
    return Row(what="a step", peer="by hand", precision="fp32", sizes="8×64", taken=taken, **fields)


def test_the_ratio_is_the_median_of_the_pairs_ratios_not_the_ratio_of_the_medians() -> None:
    taken = Taken(ours=[1.0, 10.0, 4.0], peer=[2.0, 10.0, 1.0])
    assert row(taken, compares=FASTER).ratio == 1.0  # 2, 1, 0.25
    assert row(taken, compares=LARGER).ratio == 1.0  # 0.5, 1, 4
    assert row(Taken([1.0, 1.0, 8.0], [2.0, 3.0, 4.0])).ratio == 2.0
    assert row(Taken([1.0, 1.0, 8.0], [2.0, 3.0, 4.0])).ours == 1.0


def test_ours_and_the_peer_take_turns_in_going_first() -> None:
    order: list[str] = []
    taken = paired(
        lambda: order.append("ours"), lambda: order.append("peer"), seconds=0, at_least=3, warmup=1
    )
    assert order == ["ours", "peer", "ours", "peer", "peer", "ours", "ours", "peer"]
    assert len(taken.ours) == len(taken.peer) == len(taken.cpu.ours) == 3


def test_pairs_stay_pairs_whoever_goes_first() -> None:
    clock = iter(range(100))

    def watch(action):
        return (next(clock) + action(), 1.0)

    taken = paired(lambda: 0, lambda: 1000, seconds=0, at_least=3, warmup=0, watch=watch)
    assert list(taken.ours) == [0, 3, 4]
    assert list(taken.peer) == [1001, 1002, 1005]
    assert set(taken.cpu.ours) == {1.0}


def test_the_watch_sees_the_time_an_action_takes() -> None:
    wall, cpu = stopwatch(lambda: sum(range(200_000)))
    assert wall > 0 and cpu > 0


def test_p99_is_what_one_in_a_hundred_exceeds() -> None:
    assert p99(list(range(101))) == 99


def test_a_target_is_met_or_missed_by_the_ratio_or_by_our_own_figure() -> None:
    taken = Taken([2.0, 2.0], [2.0, 2.0])
    assert row(taken, target=Target("≥", 0.97)).met is True
    assert row(taken, target=Target("≤", 0.97)).met is False
    assert row(taken, target=Target("≤", 0.5, "ours")).met is False
    assert row(taken).met is None
    by_cpu = Taken([2.0], [2.0], Taken([1.0], [1.7]))
    assert row(by_cpu, target=Target("≥", 1.6, "cpu")).met is True
    assert "ratio in CPU time ≥ 1.8: missed" in report.lines("x", row(by_cpu, target=Target("≥", 1.8, "cpu")))
    assert row(Taken([2.0]), target=Target("≥", 0.97)).met is False  # no peer, no ratio


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0002134, "s", "0.213 ms"),
        (0.02, "s", "20.0 ms"),
        (2.345, "s", "2.35 s"),
        (0.00001, "s", "0.0100 ms"),
        (431.9, "MiB", "432 MiB"),
        (0.0, "s", "0.0000 ms"),
    ],
)
def test_amounts_have_three_digits_and_a_fitting_unit(value: float, unit: str, text: str) -> None:
    assert report.amount(value, unit) == text


def test_a_row_is_shown_with_peer_circumstances_spread_and_verdict() -> None:
    taken = Taken([0.1] * 4, [0.2] * 4, Taken([1.0] * 4, [1.5] * 4))
    text = report.lines("training", row(taken, target=Target("≥", 0.97)))
    for part in (
        "training  ",
        "against by hand; fp32, 8×64",
        "median 100 ms · peer 200 ms · ratio 2.000, peer ÷ ours",
        "half of 4 pairs in 2.000 to 2.000; in CPU time 1.500",
        "target: ratio ≥ 0.97: met",
    ):
        assert part in text


def test_a_table_has_one_line_for_each_row_below_its_subject_and_names_the_machine() -> None:
    rows = {
        "training": row(Taken([0.1], [0.05]), target=Target("≥", 0.97)),
        "queue-p99": Row(what="latency", peer="", taken=Taken([0.006, 0.006]), figure=p99),
    }
    lines = pages.tables(pages.merged(NOTHING, MACHINE, rows, NAMES), NAMES).splitlines()
    assert lines[0] == "## Training"
    assert lines[4] == (
        "| **training**<br>a step<br>against by hand<br>fp32, 8×64 | 100 ms | 50.0 ms | 0.5, peer ÷ ours "
        "| ratio ≥ 0.97: **missed** | 1 |"
    )
    assert "| **queue-p99**<br>latency | 6.00 ms | – | – | none | 1 |" in lines
    assert {line.count("|") for line in lines if line.startswith("|")} == {len(pages.COLUMNS) + 1}
    assert lines[-1].startswith("1. Commit unknown, 2 CPU cores (a CPU") and "2026-01-31" in lines[-1]


def test_a_row_that_was_not_measured_says_why_in_table_and_json() -> None:
    rows = {"real-training": Skipped("no model")}
    kept = pages.merged(NOTHING, MACHINE, rows, NAMES)
    assert "| **real-training**<br>not measured: no model | – | – | – | – | – |" in pages.tables(kept, NAMES)
    assert json.loads(report.as_json(MACHINE, rows))["skipped"] == {"real-training": "no model"}


def test_rows_measured_again_leave_the_others_and_their_runs_as_they_were() -> None:
    first = {name: row(Taken([0.1], [0.05])) for name in NAMES}
    old = pages.merged(NOTHING, MACHINE, first, NAMES)
    later = MACHINE | {"date": "2026-02-01T12:00:00+00:00"}
    new = {"training": row(Taken([0.2], [0.05])), "real-training": Skipped("no model")}
    kept = pages.merged(old, later, new, NAMES)
    assert list(kept["runs"]) == [MACHINE["date"], later["date"]]
    assert kept["rows"]["training"] | {"ours": 0.2, "run": later["date"]} == kept["rows"]["training"]
    assert kept["rows"]["queue-p99"] == old["rows"]["queue-p99"]
    assert kept["rows"]["real-training"] == old["rows"]["real-training"], (
        "a figure gives way to a figure only"
    )
    assert kept["skipped"] == {}
    gone = pages.merged(kept, later, first, {"training": NAMES["training"]})
    assert list(gone["rows"]) == ["training"] and list(gone["runs"]) == [later["date"]]


def test_the_headlines_tell_speeds_as_speeds_and_times_as_times() -> None:
    rows = {
        "rl-update": row(Taken([1.0], [2.0]), compares=LARGER),
        "real-pairs": row(Taken([1.0], [3.0]), compares=FASTER),
        "dp-step-llama": row(Taken([1.5], [1.0]), compares=LARGER),
    }
    said = pages.headlines(pages.merged(NOTHING, MACHINE, rows, command.ALL)).splitlines()
    assert [line.split("**")[1] for line in said] == ["2 ×", "3 ×", "1.5 ×"]


def test_the_pages_say_what_was_measured() -> None:
    kept = pages.load()
    for page, mark, made in (
        (pages.TABLES, "bench", pages.tables(kept, command.ALL)),
        (pages.README, "headlines", pages.headlines(kept)),
    ):
        text = page.read_text(encoding="utf-8")
        assert pages.between_marks(text, made, page.name, mark) == text, (
            "run `python -m bench --write` with a row"
        )
    assert not [name for name in command.ALL if name not in kept["rows"] | kept["skipped"]], (
        "a row not in the pages"
    )


def test_a_program_beside_answers_line_by_line_and_says_why_it_died() -> None:
    double = (
        "import json, sys\nfor line in sys.stdin: print(json.dumps([2 * json.loads(line), 1]), flush=True)"
    )
    with beside(sys.executable, "-c", double) as ask:
        assert [ask(1), ask(2)] == [[2, 1], [4, 1]]
        taken = paired(lambda: (1.0, 0.5), lambda: tuple(ask(1)), seconds=0, watch=as_it_says)
    assert (taken.peer[0], taken.cpu.peer[0]) == (2, 1)
    with (
        pytest.raises(RuntimeError, match="no such peer"),
        beside(sys.executable, "-c", "raise SystemExit('no such peer')") as ask,
    ):
        ask(1)


def test_the_json_holds_what_the_table_holds() -> None:
    rows = {"training": row(Taken([0.1], [0.05]), target=Target("≥", 0.97))}
    found = json.loads(report.as_json(MACHINE, rows))
    assert found["machine"] == MACHINE
    assert found["rows"]["training"] | {"ours": 0.1, "ratio": 0.5, "met": False} == found["rows"]["training"]


def test_what_stands_between_the_marks_is_replaced_and_nothing_else() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    once = pages.between_marks(page, "new", "page.md", "bench")
    assert once == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    assert pages.between_marks(once, "new", "page.md", "bench") == once


@pytest.mark.parametrize("page", ["", BEGIN, END, END + BEGIN, (BEGIN + END) * 2])
def test_a_page_without_its_one_pair_of_marks_is_refused(page: str) -> None:
    with pytest.raises(
        ValueError, match=r"page\.md has no place for what was measured: write the lines <!-- bench -->"
    ):
        pages.between_marks(page, "new", "page.md", "bench")


def test_rows_are_chosen_by_name_or_by_how_names_begin() -> None:
    assert command.select([]) == list(command.ROWS)
    assert command.select(["queue", "import"]) == ["import", "queue-p50", "queue-p99"]
    assert command.select(["training-"]) == ["training-ragged", "training-quarter", "training-checkpointing"]
    with pytest.raises(ValueError, match="no row 'typo'"):
        command.select(["typo"])


def test_a_row_whose_model_is_missing_is_skipped_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TENSAFE_SMOLLM2", "/nowhere")
    assert isinstance(command.measured("real-training"), Skipped)
    assert "real-training     skipped: SmolLM2 is not here: run `make models`" in capsys.readouterr().out


def test_the_rows_of_the_real_model_are_run_only_when_asked_for() -> None:
    assert not command.REAL.keys() & set(command.select([]))
    assert command.select(["real-token"]) == ["real-token-ce", "real-token-ce-memory"]


def test_pages_without_marks_are_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no marks")
    monkeypatch.setattr(pages, "README", readme)
    with pytest.raises(SystemExit):
        command.main(["--write", "queue"])
    assert "README.md has no place for what was measured" in capsys.readouterr().err
    assert readme.read_text() == "no marks"


def test_a_row_is_kept_and_shown_as_soon_as_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (
        ("MEASURED", json.dumps(NOTHING)),
        ("TABLES", f"{BEGIN}\n{END}\n"),
        ("README", "<!-- headlines -->\n<!-- /headlines -->\n"),
    ):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(pages, name, tmp_path / name)

    def measure(name: str) -> Row:
        if name == "queue-p99":
            raise RuntimeError("a peer died")
        return row(Taken([1.0], [2.0]))

    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(command, "measured", measure)
    monkeypatch.setattr(command, "settle", lambda threads, home, **_: None)
    with pytest.raises(RuntimeError, match="a peer died"):
        command.main(["--write", "queue"])
    assert list(pages.load()["rows"]) == ["queue-p50"]
    assert "| **queue-p50**<br>a step<br>" in (tmp_path / "TABLES").read_text()


def test_every_row_is_a_function_that_exists() -> None:
    for where in command.ALL.values():
        module, _, function = where.partition(":")
        source = Path(command.__file__).with_name(f"{module}.py").read_text()
        assert f"def {function}() -> Row:" in source


def test_a_failure_in_a_fresh_process_shows_its_code_and_error() -> None:
    assert fresh_process("import json; print(json.dumps([1, 2]))") == [1, 2]
    with pytest.raises(RuntimeError, match=r"raise KeyError\('why'\)"):
        fresh_process("raise KeyError('why')")


def test_the_harness_loads_no_torch() -> None:
    code = "import sys, json, bench.__main__; print(json.dumps('torch' in sys.modules))"
    assert fresh_process(code) is False


def test_what_is_worse_than_what_was_kept_is_said_and_noise_is_not() -> None:
    def kept(**rows: Row) -> dict:
        names = dict.fromkeys(rows, "training:all_labelled")
        return pages.merged(NOTHING, MACHINE, rows, names)

    level, slower = row(Taken([1.0] * 4, [1.0] * 4)), row(Taken([1.2] * 4, [1.0] * 4))
    jumpy = row(Taken([0.7, 0.9, 1.5, 1.6], [1.0] * 4))
    before = kept(
        training=level, larger=row(Taken([1.0] * 4, [1.0] * 4), compares=LARGER), alone=row(Taken([1.0]))
    )
    assert report.regressions(before, MACHINE, {"training": slower}) == [
        "worse than bench/measured.json: training: ratio 0.833, kept 1, of 2026-01-31"
    ]
    assert len(report.regressions(before, MACHINE, {"larger": row(slower.taken, compares=LARGER)})) == 1
    fine = {"training": jumpy, "larger": Skipped("no time"), "alone": row(Taken([1.4])), "new": slower}
    assert report.regressions(before, MACHINE, fine) == report.regressions(before, MACHINE, {})
    assert (
        "alone: 1.60 s, kept 1.00 s" in report.regressions(before, MACHINE, {"alone": row(Taken([1.6]))})[0]
    )
    elsewhere = MACHINE | {"cpu": "another"}
    assert report.regressions(before, elsewhere, {"alone": row(Taken([9.0]))})[0].startswith(
        "nothing is worse"
    )


def test_an_imitated_processor_is_named_so_and_never_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert report.facts(1)["capability"].endswith(", imitated")
    with pytest.raises(SystemExit):
        command.main(["queue-p99", "--avx2", "--write"])
    assert "imitates another one" in capsys.readouterr().err


def test_rows_are_measured_again_only_where_vectors_decide_and_there_are_more_than_avx2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(command.subprocess, "run", lambda given, check: commands.append(given))
    monkeypatch.setattr(command, "IMITATED", tmp_path / "imitated.json")
    command.IMITATED.write_text(report.as_json(MACHINE, {"training": row(Taken([2.0], [3.0]))}))
    rows = {name: row(Taken([1.0], [2.0])) for name in ("queue-p99", "rl-waiting", "training")}
    command.again(rows, 1, "AVX2")
    command.again({"queue-p99": rows["queue-p99"]}, 1, "AVX512 with avx512_bf16")
    assert capsys.readouterr().out.count("nothing to measure again") == 2
    command.again(rows, 2, "AVX512")
    assert [given[2:] for given in commands] == [["bench", "training", "--avx2", "--threads=2"]]
    shown = capsys.readouterr().out
    assert "what AVX2 alone would give, beside AVX512:" in shown
    assert f"{'training':26}         2, with AVX2 1.5; peer ÷ ours" in shown
