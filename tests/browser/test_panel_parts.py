"""The parts of the panel in a real browser: every button, every table, a step's samples, a long history."""

import pytest
from playwright.sync_api import Locator, expect

from .conftest import Open
from .lab import Lab
from .test_live_panel import FIT, SETUP, start

pytestmark = pytest.mark.soak

MADE_UP = """\
import random, tensafe_nb as tn
tc = tn.ServiceClient().create_training_client()
await tc.ready();"""
LONG = """\
import numpy as np
from tensafe_nb.events import Metrics
from tensafe_nb.widgets import LossCurve
dice = np.random.default_rng(0)
names = ["loss", "eval/loss", "grad_norm", "tokens"]
values = np.exp(dice.normal(0, 0.1, (100_000, 4)))
values[60_000, 0] = 40.0
history = tc.history
for step, row in enumerate(values.tolist(), 1):
    history.add(Metrics(step=step, values=dict(zip(names, row)), seq=history.last_seq, time=1e9 + step))
tc"""
TASK = """\
import tensafe_nb as tn
from tensafe_nb.rlvr import RLVRTrainer
tc = tn.ServiceClient().create_training_client(
    model_ref="builtin:sums", optimizer=tn.OptimizerConfig(learning_rate=3e-4), micro_batch_tokens=16_384)
def right(prompt, response, meta=None):
    if {broken}:
        raise ValueError("no <b>number</b>")
    return float(response.strip() == meta["answer"])
trainer = RLVRTrainer(tc, tn.datasets.sums(256, seed=0), right, max_new_tokens=4, prompts_per_step=8,
                      reward_timeout=None, eval_prompts=tn.datasets.sums(8, seed=1), eval_every=10)
await tc.ready()"""


def frame_times(plot: Locator, frames: int) -> list[float]:
    """Zoom a little in and out again, so often, and return what each frame's drawing took in ms."""
    taken = plot.evaluate(
        """(plot, frames) => new Promise(resolve => {
            const times = [];
            plot.focus();
            const next = () => {
                if (times.length === frames) return resolve(times);
                const before = plot.dataset.ms;
                const rect = plot.getBoundingClientRect();
                const at = { bubbles: true, cancelable: true, clientX: rect.x + 300, clientY: rect.y + 50 };
                plot.dispatchEvent(new WheelEvent('wheel', { ...at, deltaY: times.length % 2 ? 100 : -1 }));
                requestAnimationFrame(() => requestAnimationFrame(() => {
                    times.push(Number(plot.dataset.ms));
                    next();
                }));
            };
            next();
        })""",
        frames,
    )
    return sorted(taken[20:])  # the first ones are compiled while they run


def test_checkpoint_rollback_branch_export_and_delete_by_their_buttons(notebook: Open) -> None:
    cells = [
        SETUP,
        FIT.format(steps=5000, every=5000),
        "steps, losses = tc.history.series('loss'); len(steps)",
        "import os; sorted(name for name in os.listdir() if name.endswith('-adapter'))",
        "run.stop(); await run; run.state.name",
    ]
    with notebook(cells) as lab:
        start(lab)
        table = lab.panel.locator(".tsnb-checkpoints")
        lab.press("Checkpoint")
        table.locator("tr:has(td) .tsnb-hash").first.wait_for()
        saved = int(table.locator("th[scope=row]").first.inner_text())
        expect(table).to_contain_text("AES-256-GCM")
        lab.wait_until(f"data.points > {saved + 15}")
        lab.press("Rollback ▾")
        lab.screenshot("menu-light", of=lab.panel)
        lab.panel.locator(".tsnb-menu").first.get_by_role("button", name=f"step {saved}").click()
        lab.wait_until(f"data.state === 'PAUSED' && data.step === {saved}")
        lab.screenshot("rolled-back-paused-light", of=lab.panel)
        lab.press("Resume")
        lab.wait_until(f"data.state === 'RUNNING' && data.step > {saved + 5}")
        lab.press("Branch")
        branch = lab.page.locator(".tsnb-branch .tsnb-panel")
        branch.wait_for()
        expect(branch).to_have_attribute("data-state", "READY")
        expect(branch.locator(".tsnb-subject")).to_contain_text("⎇ branch from tc-")
        branch.get_by_role("button", name="Checkpoint", exact=True).click()
        branch.locator(".tsnb-hash").first.wait_for()
        lab.press("Pause")
        lab.wait_until("data.state === 'PAUSED'")
        lab.screenshot("branch-light", of=lab.output(1))
        lab.press("Export")
        expect(lab.panel.locator(".tsnb-note").first).to_contain_text("in the clear")
        lab.finish_cell(3)
        assert "art-" in lab.output(3).inner_text()
        table.get_by_role("button", name="Delete").click()
        table.get_by_role("button", name="Delete for good?").click()
        expect(table.locator(".tsnb-hash")).to_have_count(0)
        assert lab.value("state") == "PAUSED"
        lab.finish_cell(4)
        assert "STOPPED" in lab.output(4).inner_text()


@pytest.mark.pictures
def test_a_click_on_a_point_shows_that_steps_samples_and_texts_stay_text(notebook: Open) -> None:
    setup = TASK.format(broken="meta['answer'].endswith('3')")
    find = (
        "await run\n"
        "tc.dashboard().selected_step = next("
        "step for step, batch in trainer.store.last(40) if any(t.reward_error for t in batch))"
    )
    with notebook([setup, "run = trainer.run(steps=40)", find], scale=2) as lab:
        for cell in range(3):
            lab.finish_cell(cell)
        lab.wait_until("data.state === 'FINISHED' && data.points === 40")
        expect(lab.panel.locator(".tsnb-samples")).to_contain_text("no <b>number</b>")
        samples = lab.panel.locator(".tsnb-samples")
        title = samples.locator(".tsnb-title")
        before = title.inner_text()
        lab.chart.click(position={"x": 200, "y": 100})
        expect(title).to_be_focused()
        expect(title).not_to_have_text(before)  # the kernel has sent those of the chosen step
        expect(title).to_be_in_viewport()
        chosen = int(title.inner_text().split()[-1])
        assert 5 < chosen < 15, "a fifth of the chart from its left edge"
        expect(samples).to_have_attribute("data-step", str(chosen))
        assert lab.panel.locator(".tsnb-samples img, .tsnb-samples q b").count() == 0
        answer = samples.locator(".tsnb-answer").first
        answer.focus()
        lab.page.keyboard.press("ArrowRight")
        expect(samples.locator(".tsnb-token")).to_contain_text("token 2 of")
        samples.get_by_label("show").select_option("with signal")
        samples.get_by_role("button", name="Compare").click()
        expect(samples.locator(".tsnb-versus").first.locator("> div")).to_have_count(2)
        expect(samples.get_by_label("step", exact=True)).to_have_value("0")
        expect(samples.locator(".tsnb-prompt")).to_have_count(8)
        lab.screenshot("samples-compare-light", of=samples)
        samples.get_by_role("button", name="Compare").click()
        samples.get_by_label("as").select_option("advantage")
        lab.screenshot("samples-light", of=samples)
        lab.screenshot("rl-panel-light", of=lab.panel)
        lab.switch_theme("JupyterLab Dark")
        lab.screenshot("samples-dark", of=samples)
        lab.screenshot("rl-panel-dark", of=lab.panel)


@pytest.mark.pictures
def test_the_checkpoints_are_pictured_with_names_and_metadata(notebook: Open) -> None:
    fit = "run = tc.fit(batches, steps=60, checkpoint_every=20)\nawait run;"
    with notebook(
        [SETUP, fit, "await tc.save_state(name='best so far', metadata={'note': 'for the paper'})"], 2
    ) as lab:
        for cell in range(3):
            lab.finish_cell(cell)
        table = lab.panel.locator(".tsnb-checkpoints")
        expect(table.locator(".tsnb-hash")).to_have_count(4)
        expect(table).to_contain_text("note: for the paper")
        lab.screenshot("checkpoints-light", of=lab.panel)
        lab.switch_theme("JupyterLab Dark")
        lab.screenshot("checkpoints-dark", of=lab.panel)


def test_the_curve_is_zoomed_panned_and_read_by_mouse_and_keys(notebook: Open) -> None:
    with notebook([SETUP, FIT.format(steps=150, every=30), "await run;"]) as lab:
        start(lab)
        lab.finish_cell(2)
        lab.wait_until("data.state === 'FINISHED'")
        reset = lab.panel.get_by_role("button", name="Reset zoom")
        expect(reset).to_be_hidden()
        box = lab.chart.bounding_box()
        assert box is not None
        lab.page.mouse.move(box["x"] + 200, box["y"] + 80)
        lab.page.mouse.down()
        lab.page.mouse.move(box["x"] + 400, box["y"] + 90, steps=4)
        lab.screenshot("zooming-light", of=None)
        lab.page.mouse.up()
        expect(reset).to_be_visible()
        lab.chart.focus()
        lab.page.keyboard.press("Shift+ArrowRight")
        lab.page.keyboard.press("End")
        expect(lab.panel.locator(".tsnb-at-step").first).to_contain_text("step 150")
        lab.page.keyboard.press("0")
        expect(reset).to_be_hidden()
        lab.page.keyboard.press("+")
        expect(reset).to_be_visible()
        reset.click()
        lab.panel.get_by_label("log").check()
        lab.panel.get_by_label("horizontal axis").select_option("tokens")
        lab.screenshot("log-tokens-light", of=lab.panel)
        lab.panel.get_by_label("horizontal axis").select_option("time")
        lab.panel.get_by_label("smoothing").fill("0")
        lab.press("Table view")
        expect(lab.panel.locator(".tsnb-curves caption")).to_contain_text("of 150 points")
        lab.screenshot("table-light", of=lab.panel)
        lab.press("Chart view")


def test_two_runs_are_compared_and_a_click_is_linked_to_another_widget(notebook: Open) -> None:
    cells = [
        SETUP + "\nother = tc.fork()",
        "run = tc.fit(batches, steps=60, show=False)\n"
        "faster = other.fork(optimizer={'learning_rate': 3e-3}).fit(batches, steps=60, show=False)\n"
        "await run; await faster;",
        "from ipywidgets import HBox, VBox, jslink\n"
        "from tensafe_nb.widgets import CheckpointTable, LossCurve, PrivacyMeter\n"
        "curve, again = LossCurve(run, faster), LossCurve(run, log_scale=True)\n"
        "jslink((curve, 'selected_step'), (again, 'selected_step'))\n"
        "VBox([curve, again, HBox([PrivacyMeter(tc), CheckpointTable(other)])])",
        "curve.selected_step == again.selected_step, curve.selected_step",
    ]
    with notebook(cells) as lab:
        for cell in range(3):
            lab.finish_cell(cell)
        panels = lab.page.locator(".tsnb-panel")
        expect(panels).to_have_count(4)
        expect(panels.first.locator(".tsnb-entry")).to_have_count(2)
        expect(panels.nth(2)).to_contain_text("DP off")
        for beside in (panels.nth(2), panels.nth(3)):  # each has the width of its words
            assert (beside.bounding_box() or {"width": 0})["width"] > 150
        lab.chart.click(position={"x": 300, "y": 90})
        expect(panels.nth(1).locator(".tsnb-chosen")).to_have_count(1)
        lab.screenshot("compared-light", of=lab.output(2))
        lab.finish_cell(3)
        assert "(True, " in lab.output(3).inner_text()


def test_a_hundred_thousand_points_stay_smooth_and_a_spike_stays_visible(notebook: Open) -> None:
    with notebook([MADE_UP, LONG, "LossCurve(tc, tc, tc, tc)"]) as lab:
        lab.finish_cell(0)
        lab.run_cell(1)
        lab.page.wait_for_selector(".tsnb-panel", state="attached")
        badge = lab.wait_until("data.state !== ''")
        seconds = badge + lab.wait_until("data.points === 100000")
        print(f"100,000 steps × 6 series, after the mount: badge {badge:.2f} s, whole curve {seconds:.2f} s")
        assert seconds < 3.0
        lab.finish_cell(2)
        four = lab.output(2).locator(".tsnb-plot")
        four.scroll_into_view_if_needed()
        expect(lab.output(2).locator(".tsnb-entry")).to_have_count(4, timeout=20_000)
        times = frame_times(four, 120)
        p50, p95 = times[len(times) // 2], times[int(len(times) * 0.95)]
        print(f"frame at 4 × 100,000 points, raw and smoothed: p50 {p50} ms, p95 {p95} ms")
        top = lab.chart.locator("text[text-anchor=end]").last.text_content() or ""
        assert float(top) >= 30, "the spike of one step is on the axis, and so on the curve"
        lab.screenshot("long-light", of=lab.panel)
        assert p50 <= 16  # the budget is about p95, which is printed: other processes stretch single frames


def test_where_widgets_do_not_load_the_table_renews_itself(notebook: Open) -> None:
    setup = "import os; os.environ['TENSAFE_NB_RENDERER'] = 'html'\n" + SETUP
    with notebook([setup, FIT.format(steps=5000, every=5000), "run.stop()"]) as lab:
        lab.finish_cell(0)
        lab.finish_cell(1)
        caption = lab.output(1).locator("table.tsnb-frozen caption")
        caption.wait_for()
        first = caption.inner_text()
        expect(caption).not_to_have_text(first, timeout=10_000)
        expect(lab.output(1)).to_contain_text("run.pause()")
        assert "DP off" in caption.inner_text()
        lab.screenshot("no-widget-light")
        lab.finish_cell(2)


def test_memory_of_the_page_stays_where_it_was_over_ten_thousand_updates(notebook: Open) -> None:
    feed = (
        "import asyncio\nfrom tensafe_nb.events import Metrics\n"
        "async def updates(count):\n"
        "    for i in range(count):\n"
        "        tc.publish(Metrics(step=len(tc.history['loss']) + 1, values={'loss': 1 / (i + 1)}, run_id='mine'))\n"
        "        if i % 20 == 0: await asyncio.sleep(0.02)\n"
        "await updates({count})"
    )
    cells = [MADE_UP, "tc", feed.replace("{count}", "500"), feed.replace("{count}", "10_000")]
    with notebook(cells) as lab:
        for cell in range(3):
            lab.finish_cell(cell)
        lab.wait_until("data.points === 500")
        before = heap(lab)
        lab.finish_cell(3)
        lab.wait_until("data.points === 10500")
        after = heap(lab)
        print(
            f"page over 10,000 points: heap {before[0]:.1f} → {after[0]:.1f} MB, DOM nodes {before[1]} → {after[1]}"
        )
        assert after[0] - before[0] <= 8


def heap(lab: Lab) -> tuple[float, int]:
    session = lab.page.context.new_cdp_session(lab.page)
    session.send("HeapProfiler.enable")
    session.send("HeapProfiler.collectGarbage")
    session.send("Performance.enable")
    metrics = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
    nodes = lab.panel.evaluate("panel => panel.querySelectorAll('*').length")
    return metrics["JSHeapUsedSize"] / 1e6, nodes
