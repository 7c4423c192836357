"""The live panel in a real browser: it moves, it obeys, it survives a reload, and it looks right in the dark."""

import json
import time
from pathlib import Path

import pytest

from .conftest import Open
from .lab import Lab

RLVR = Path(__file__).parents[2] / "notebooks" / "05_rlvr.ipynb"
SETUP = """\
import random, tensafe_nb as tn
tc = tn.ServiceClient().create_training_client(lora_config=tn.LoRAConfig(rank=8))
dice = random.Random(0)
rows = [[dice.randrange(3, 60) for _ in range(12)] for _ in range(64)]
batches = [tn.BatchData(input_ids=dice.sample(rows, 4)) for _ in range(5000)]
await tc.ready();"""
IS_PAINTED = """canvas => canvas.getContext('2d')
    .getImageData(0, 0, canvas.width, canvas.height).data.some(value => value > 0)"""
NAME_IN_FOCUS = """(document.activeElement.ariaLabel || document.activeElement.labels?.[0]?.firstChild.textContent
    || document.activeElement.labels?.[0]?.textContent || document.activeElement.textContent).trim()"""
FIT = "run = tc.fit(batches, steps={steps}, eval_batches=batches[:1], eval_every={every})"


def start(lab: Lab, cells: int = 2) -> None:
    for cell in range(cells):
        lab.finish_cell(cell)
    lab.wait_until("data.points > 5 && data.state === 'RUNNING'")


def test_the_curve_moves_after_the_cell_has_returned_and_another_cell_runs_meanwhile(notebook: Open) -> None:
    with notebook([SETUP, FIT.format(steps=200, every=25), "6 * 7", "(await run).steps"]) as lab:
        start(lab)
        before = int(lab.value("points"))
        lab.finish_cell(2)
        assert "42" in lab.output(2).inner_text()
        lab.wait_until(f"data.points > {before + 5}")
        lab.screenshot("live-light")
        latencies = sorted(lab.samples("latency", 40))
        print(f"event → shown: p50 {latencies[20]} ms, p95 {latencies[37]} ms")
        lab.finish_cell(3)
        lab.wait_until("data.state === 'FINISHED' && data.points === 200 && data.step === 200")
        assert "200" in lab.output(3).inner_text()
        lab.chart.hover(position={"x": 300, "y": 100})
        lab.screenshot("finished-light")


def test_pause_and_stop_act_within_a_second_and_resume_goes_on(notebook: Open) -> None:
    with notebook([SETUP, FIT.format(steps=5000, every=500), "run.state.name, run.steps_done"]) as lab:
        start(lab)
        latencies = {}
        for button, state in (("Pause", "PAUSED"), ("Resume", "RUNNING"), ("Stop", "STOPPED")):
            lab.press(button)
            latencies[button] = lab.wait_until(f"data.state === '{state}'")
            step = lab.value("step")
            if state == "PAUSED":
                lab.screenshot("paused-light", of=lab.panel)
                lab.finish_cell(2)
                assert f"('PAUSED', {step})" in lab.output(2).inner_text(), "the panel and the run disagree"
                assert lab.value("step") == step, "a paused run took a step"
        assert lab.value("acked") == "3"
        assert lab.panel.locator("[data-do=pause]:visible, [data-do=stop]:visible").count() == 0
        print("click → state:", latencies)
        assert max(latencies.values()) < 1.0, latencies
        lab.screenshot("stopped-light", of=lab.panel)


@pytest.mark.soak
def test_a_rollback_takes_the_panel_back_to_the_checkpoint_and_the_run_goes_on_from_there(
    notebook: Open,
) -> None:
    cells = [
        SETUP,
        FIT.format(steps=5000, every=5000),
        "good = await run.checkpoint(note='here'); good.step",
        "back = await run.rollback(good.artifact_id); back.step == good.step",
        "run.resume()",
        "run.stop()",
    ]
    with notebook(cells) as lab:
        start(lab)
        lab.finish_cell(2)
        saved = int(lab.output(2).inner_text().split()[-1])
        lab.wait_until(f"data.points > {saved + 10}")
        lab.finish_cell(3)
        assert "True" in lab.output(3).inner_text()
        lab.wait_until(f"data.state === 'PAUSED' && data.step === {saved}")
        points = int(lab.value("points"))
        assert points > saved + 10, "what was abandoned is still to be seen"
        lab.finish_cell(4)
        lab.wait_until(f"data.state === 'RUNNING' && data.points > {points + 20}")
        lab.screenshot("rolled-back-light")
        lab.finish_cell(5)
        lab.wait_until("data.state === 'STOPPED'")


@pytest.mark.soak
def test_a_click_while_a_cell_blocks_says_what_it_waits_for_and_is_obeyed_afterwards(notebook: Open) -> None:
    block = "try:\n    run.result(6)\nexcept TimeoutError:\n    pass"
    with notebook([SETUP, FIT.format(steps=5000, every=500), block]) as lab:
        start(lab)
        lab.run_cell(2)
        before = int(lab.value("points"))
        lab.wait_until(f"data.points > {before + 5}")
        lab.press("Pause")
        lab.wait_until("data.waiting === 'true'", timeout=3_000)
        assert "waiting for the running cell" in lab.panel.locator(".tsnb-note").inner_text()
        lab.screenshot("waiting-light", of=lab.panel)
        lab.wait_until("data.state === 'PAUSED' && data.waiting === 'false'")


@pytest.mark.soak
def test_a_client_in_two_cells_is_two_views_of_one_widget_and_freezing_leaves_the_picture(
    notebook: Open,
) -> None:
    fit = FIT.format(steps=100, every=25) + "\nrun"
    with notebook([SETUP, fit, "tc", "await run;", "run.freeze()"]) as lab:
        start(lab)
        assert "<TrainingRun" in lab.output(1).inner_text(), (
            "run, shown by the same cell, is one line of text"
        )
        lab.finish_cell(2)
        lab.page.wait_for_function("document.querySelectorAll('.tsnb-panel').length === 2")
        lab.finish_cell(3)
        lab.page.wait_for_function(
            "[...document.querySelectorAll('.tsnb-panel')].every(panel => panel.dataset.points === '100')"
        )
        assert lab.page.locator(".tsnb-frozen:visible").count() == 0
        assert lab.page.locator("img:visible").count() == 0
        lab.finish_cell(4)
        lab.output(4).locator("img:visible").wait_for()
        lab.output(4).locator("table.tsnb-frozen:visible").wait_for()
        lab.output(1).locator("table.tsnb-frozen:visible").wait_for()
        assert lab.output(1).locator(".tsnb-panel").count() == 0
        lab.screenshot("frozen-light")


@pytest.mark.soak
@pytest.mark.pictures
def test_in_notebook_05_the_reward_climbs_after_the_cell_has_returned(notebook: Open) -> None:
    cells = [cell["source"] for cell in json.loads(RLVR.read_text())["cells"] if cell["cell_type"] == "code"]
    run = next(index for index, source in enumerate(cells) if "trainer.run(" in source)
    with notebook(cells, scale=2) as lab:
        for index in range(run + 1):
            lab.finish_cell(index)
        lab.wait_until("data.curve === 'reward' && data.points > 100 && data.state === 'RUNNING'")
        lab.screenshot("rlvr-light", of=lab.panel)
        lab.switch_theme("JupyterLab Dark")
        lab.screenshot("rlvr-dark", of=lab.panel)
        lab.finish_cell(run + 1)
        lab.wait_until("data.state === 'FINISHED' && data.points === 200")
        lab.finish_cell(run + 2)
        sampled = lab.output(run + 2).inner_text().splitlines()[0].split()
        assert float(sampled[-1]) > float(sampled[1]) + 0.2, sampled


@pytest.mark.soak
def test_after_a_reload_in_mid_run_all_points_are_back_and_it_goes_on(notebook: Open) -> None:
    with notebook([SETUP, FIT.format(steps=5000, every=100), "len(tc.history['loss'])"]) as lab:
        start(lab)
        lab.wait_until("data.points > 120")
        before = int(lab.value("points"))
        lab.save()
        started = time.perf_counter()
        lab.reload()
        lab.wait_until(f"data.points >= {before}", timeout=10_000)
        print(f"{before} points back {time.perf_counter() - started:.2f} s after the reload")
        after = int(lab.value("points"))
        lab.wait_until(f"data.points > {after + 10} && data.state === 'RUNNING'")
        assert "run.freeze()" in lab.panel.locator(".tsnb-note").inner_text()
        lab.screenshot("reloaded-light")
        lab.press("Stop")
        lab.wait_until("data.state === 'STOPPED'")
        lab.finish_cell(2)
        assert lab.output(2).inner_text().split()[-1] == lab.value("points")


@pytest.mark.soak
def test_the_dark_theme_colours_the_panel_and_its_canvas(notebook: Open) -> None:
    with notebook([SETUP, FIT.format(steps=150, every=15), "await run;"], scale=2) as lab:
        start(lab)
        light = lab.panel.evaluate("panel => getComputedStyle(panel).backgroundColor")
        lab.switch_theme("JupyterLab Dark")
        dark = lab.panel.evaluate("panel => getComputedStyle(panel).backgroundColor")
        assert light != dark
        lab.screenshot("live-dark")
        assert lab.panel.locator("canvas").first.evaluate(IS_PAINTED)
        lab.finish_cell(2)
        lab.wait_until("data.state === 'FINISHED'")
        lab.screenshot("panel-dark", of=lab.panel)
        lab.switch_theme("JupyterLab Light")
        lab.screenshot("panel-light", of=lab.panel)


@pytest.mark.soak
def test_everything_is_reached_by_keyboard_and_has_a_name(notebook: Open) -> None:
    with notebook([SETUP, FIT.format(steps=5000, every=500)]) as lab:
        start(lab)
        pause, stop = (lab.panel.get_by_role("button", name=name) for name in ("Pause", "Stop"))
        pause.focus()
        lab.page.keyboard.press("Tab")
        assert stop.evaluate("button => button === document.activeElement")
        chart = lab.chart
        names = []
        for _ in range(10):
            if chart.evaluate("plot => plot === document.activeElement"):
                break
            names.append(lab.page.evaluate(NAME_IN_FOCUS))
            lab.page.keyboard.press("Tab")
        tools = ["smoothing", "log", "horizontal axis", "Table view", "Download CSV"]
        assert names[:7] == ["Stop", "Checkpoint", *tools]
        assert all(name.startswith(("loss", "eval/loss")) for name in names[7:]), "entries of the legend"
        lab.page.keyboard.press("Home")
        lab.page.keyboard.press("ArrowRight")
        lab.panel.locator(".tsnb-at-step", has_text="step 2").first.wait_for()
        assert (chart.get_attribute("aria-label") or "").startswith("loss ")
        pause.focus()
        lab.page.keyboard.press("Enter")
        lab.wait_until("data.state === 'PAUSED'")
        lab.screenshot("keyboard-light", of=lab.panel)


def test_the_saved_file_shows_picture_and_table_when_the_kernel_is_gone(notebook: Open) -> None:
    with notebook([SETUP, FIT.format(steps=60, every=10), "await run; tc.close()"]) as lab:
        start(lab)
        lab.finish_cell(2)
        lab.wait_until("data.state === 'FINISHED'")
        lab.page.wait_for_function(
            "() => jupyterapp.shell.currentWidget.content.widgets[1].model.outputs.toJSON()"
            "        .some(output => 'image/png' in output.data)"
        )
        lab.save()
        path = lab.server.root / lab.name
        saved = json.loads(path.read_text())
        assert "widgets" not in saved["metadata"]
        assert path.stat().st_size < 100_000
        lab.server.end_kernels()
        lab.page.goto(f"{lab.server.url}/lab/tree/{lab.name}?token={lab.server.token}&reset&kernel=none")
        lab.page.get_by_role("img", name="").first.wait_for()
        lab.page.locator("table.tsnb-frozen caption").wait_for()
        lab.screenshot("kernel-gone")
        lab.problems = [problem for problem in lab.problems if "widget" not in problem.lower()]
