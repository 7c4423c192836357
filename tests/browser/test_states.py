"""Every state in a real browser: provoked, compared with what results and files say, and pictured in light and dark.

`make screens` runs these scenarios; their pictures lie in build/screens/, to be looked at.
"""

import json
import re
import time
from collections.abc import Mapping
from typing import Any

import pytest
from playwright.sync_api import Locator, expect

from .conftest import Open
from .lab import PATIENCE, Lab

pytestmark = pytest.mark.soak

NO_PROBLEM = "no problem found"
LOST = re.compile("[Kk]ernel|comm|widget|model|WebSocket|Failed to load resource", re.IGNORECASE)
START = """\
import json, random, threading, tensafe_nb as tn
service = tn.ServiceClient()
dice = random.Random(0)
rows = [[dice.randrange(3, 60) for _ in range(12)] for _ in range(64)]
batches = [tn.BatchData(input_ids=dice.sample(rows, 4)) for _ in range(400)]
gate = threading.Event(); gate.set()
def gated(source, fails_at=None):
    for number, batch in enumerate(source):
        gate.wait()
        if number == fails_at:
            raise tn.ValidationError("no column 'text' in row 17")
        yield batch
def facts(tc, run=None):
    told = {"client": str(tc.status)}
    if run is not None:
        told |= {"state": str(run.state), "step": run.steps_done, "file": str(tn.load_run(run.run_id).state)}
        told["file_step"] = tn.load_run(run.run_id).steps_done
    print(json.dumps(told))
"""
NEW = "tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=8))"


def told(lab: Lab, cell: int) -> dict[str, Any]:
    """Run a cell that prints JSON last, and return it."""
    lab.finish_cell(cell)
    found: dict[str, Any] = json.loads(lab.output(cell).inner_text().strip().splitlines()[-1])
    return found


def see(lab: Lab, name: str, panel: Locator | None = None) -> None:
    """Take a picture of a panel in light and in dark."""
    for theme in ("Dark", "Light"):
        lab.switch_theme(f"JupyterLab {theme}")
        lab.screen(f"{name}-{theme.lower()}", of=panel or lab.panel)


def agree(lab: Lab, facts: Mapping[str, Any], panel: Locator | None = None) -> None:
    """The panel says what client, run and file say."""
    panel = panel or lab.panel
    expect(panel).to_have_attribute("data-client", facts["client"])
    if "state" in facts:
        expect(panel).to_have_attribute("data-state", facts["state"])
        expect(panel).to_have_attribute("data-step", str(facts["step"]))
        assert (facts["file"], facts["file_step"]) == (facts["state"], facts["step"])


def reopen(lab: Lab) -> None:
    """End the kernel and open the saved file without one."""
    lab.server.end_kernels()
    lab.page.goto(f"{lab.server.url}/lab/tree/{lab.name}?token={lab.server.token}&reset&kernel=none")
    lab.page.locator(".jp-Notebook .jp-Cell").first.wait_for()


def expect_noise(lab: Lab) -> None:
    """Forget what a page says of a kernel that has gone."""
    lab.problems = [problem for problem in lab.problems if not LOST.search(problem)]


def test_the_states_of_a_client(notebook: Open) -> None:
    cells = [
        START + NEW + "\ntc",
        "facts(tc)",
        "waiting = [tc.forward_backward(batches[n]) for n in range(400)]",
        "tc.cancel_pending(); tc.ready().result(); waiting[-1].exception(); facts(tc)",
        "tc.close(); facts(tc)",
        "broken = service.create_training_client(model_ref='./nowhere'); broken",
        "broken.ready().exception(); facts(broken)",
        "run = broken.fit(batches, steps=3); run",
        "run._promise.wait(20); facts(broken, run)",
    ]
    with notebook(cells) as lab:
        lab.run_cell(0)
        lab.wait_until("data.client === 'INITIALIZING'")
        see(lab, "client-initializing")
        lab.wait_until("data.client === 'READY'")
        agree(lab, told(lab, 1))
        expect(lab.panel).not_to_contain_text(NO_PROBLEM)
        see(lab, "client-ready")
        lab.finish_cell(2)
        lab.wait_until("data.client === 'BUSY'")
        lab.screen("client-busy-light", of=lab.panel)
        agree(lab, told(lab, 3))
        agree(lab, told(lab, 4))
        assert lab.value("client") == "TERMINATED"
        see(lab, "client-terminated")
        lab.finish_cell(5)
        broken = lab.output(5).locator(".tsnb-panel")
        expect(broken).to_have_attribute("data-client", "ERROR")
        agree(lab, told(lab, 6), broken)
        expect(broken).to_contain_text("The training client has failed")
        expect(broken.locator(".tsnb-note")).to_contain_text("nowhere")
        assert broken.get_by_role("button", name="Checkpoint").count() == 0
        see(lab, "client-error", broken)
        lab.finish_cell(7)
        broken = lab.output(7).locator(".tsnb-panel")
        facts = told(lab, 8)
        assert facts["state"] == "FAILED"
        agree(lab, facts, broken)
        expect(broken).not_to_contain_text(NO_PROBLEM)
        see(lab, "client-error-run-failed", broken)


def test_the_states_of_a_run(notebook: Open) -> None:
    cells = [
        START + NEW + "\nawait tc.ready();",
        "run = tc.fit(gated(batches), steps=300, eval_batches=batches[:1], eval_every=50)",
        "gate.clear()",
        "gate.set()",
        "facts(tc, run)",
        "tc.fit(batches, steps=3)",
        "gate.clear(); run.resume()",
        "run = tc.fit(batches, steps=60, eval_batches=batches[:1], eval_every=20, checkpoint_every=25); await run;",
        "first = next(iter(tc.history.state.checkpoints)); await tc.load_state(first); print(json.dumps(tc.step))",
        "run = tc.fit(gated(batches, fails_at=20), steps=60)",
        "run._promise.wait(60); facts(tc, run)",
    ]
    with notebook(cells) as lab:
        lab.finish_cell(0)
        lab.finish_cell(1)
        lab.wait_until("data.state === 'RUNNING' && data.points > 5")
        expect(lab.panel).to_contain_text(NO_PROBLEM)
        see(lab, "run-running")
        lab.finish_cell(2)
        lab.press("Pause")
        lab.wait_until("data.state === 'PAUSING'")
        see(lab, "run-pausing")
        lab.finish_cell(3)
        lab.wait_until("data.state === 'PAUSED'")
        agree(lab, told(lab, 4))
        see(lab, "run-paused")
        paused = lab.value("step")
        lab.finish_cell(5)
        expect(lab.output(5)).to_contain_text("still under way")
        assert (lab.value("state"), lab.value("step")) == ("PAUSED", paused), (
            "a run that was refused changed another"
        )
        lab.finish_cell(6)
        lab.wait_until("data.state === 'RUNNING'")
        lab.press("Stop")
        lab.wait_until("data.state === 'STOPPING'")
        see(lab, "run-stopping")
        lab.finish_cell(3)
        lab.wait_until("data.state === 'STOPPED'")
        agree(lab, told(lab, 4))
        see(lab, "run-stopped")
        lab.finish_cell(7)
        lab.wait_until("data.state === 'FINISHED' && data.step === 60")
        agree(lab, told(lab, 4))
        see(lab, "run-finished")
        step = told(lab, 8)
        lab.wait_until(f"data.now === {step}")
        assert lab.value("state") == "FINISHED"
        expect(lab.panel.locator(".tsnb-note").first).to_contain_text("was loaded after the run had ended")
        lab.press("Table view")
        expect(lab.panel.locator(".tsnb-curves tr").last).to_contain_text(str(step))
        lab.press("Chart view")
        see(lab, "run-loaded-after-the-end")
        lab.page.wait_for_function(
            "step => jupyterapp.shell.currentWidget.content.widgets[7].model.outputs.toJSON()"
            ".some(output => String(output.data['text/plain']).includes(`the client now at step ${step}`))",
            arg=step,
        )
        lab.finish_cell(9)
        lab.wait_until("data.state === 'FAILED'")
        agree(lab, told(lab, 10))
        failed = lab.output(9).locator(".tsnb-panel")
        expect(failed).to_contain_text("The run has failed at step")
        expect(failed).to_contain_text("no column 'text' in row 17")
        expect(failed).not_to_contain_text(NO_PROBLEM)
        see(lab, "run-failed", failed)


def test_recordings_mocks_and_what_was_interrupted(notebook: Open) -> None:
    script = (
        "import tensafe_nb as tn\n"
        "tc = tn.ServiceClient().create_training_client(lora_config=tn.LoRAConfig(rank=2))\n"
        "batches = [tn.BatchData([[5, 6, 7, n]]) for n in range(8, 30)] * 100\n"
        "tc.fit(batches, checkpoint_every=4, show=False).result()"
    )
    cells = [
        START + NEW + "\nrun = tc.fit(batches, steps=80, show=False); await run;",
        "replay = tn.replay(run.run_id, speed=0.1)",
        "replay.close(); tn.load_run(run.run_id)",
        f"import subprocess, sys, time\nother = subprocess.Popen([sys.executable, '-c', {script!r}])\n"
        "while not any(r.state == 'RUNNING' and r.last_checkpoint for r in tn.list_runs()): time.sleep(0.1)\n"
        "other.kill(); other.wait()\n"
        "record = next(r for r in tn.list_runs() if r.state == 'INTERRUPTED'); record",
        "print(json.dumps({'step': record.steps_done, 'checkpoint': record.last_checkpoint}))",
        "mocked = service.create_training_client(model_ref='builtin:sums')\n"
        "from tensafe_nb.events import MockTookPart\n"
        "mocked.publish(MockTookPart()); await mocked.ready()\nmocked",
    ]
    with notebook(cells) as lab:
        lab.finish_cell(0)
        lab.finish_cell(1)
        lab.wait_until("data.points > 3 && data.state === 'RUNNING'")
        expect(lab.panel).to_contain_text("REPLAY")
        see(lab, "replay-running")
        lab.finish_cell(2)
        lab.wait_until("data.state === 'FINISHED' && data.step === 80")
        recorded = lab.output(2).locator(".tsnb-panel")
        expect(recorded).to_have_attribute("data-state", "FINISHED")
        expect(recorded).to_contain_text("RECORDED")
        see(lab, "recorded", recorded)
        lab.finish_cell(3)
        dead = lab.output(3).locator(".tsnb-panel")
        expect(dead).to_have_attribute("data-state", "INTERRUPTED")
        facts = told(lab, 4)
        expect(dead).to_have_attribute("data-step", str(facts["step"]))
        expect(dead).to_contain_text(facts["checkpoint"])
        expect(dead).to_contain_text("The run was interrupted at step")
        expect(dead).not_to_contain_text(NO_PROBLEM)
        see(lab, "run-interrupted", dead)
        lab.finish_cell(5)
        mocked = lab.output(5).locator(".tsnb-panel")
        expect(mocked.locator(".tsnb-marks")).to_have_text("MOCK")
        see(lab, "mock", mocked)


def test_with_differential_privacy_the_meter_says_what_was_spent_and_when_nothing_is_guaranteed(
    notebook: Open,
) -> None:
    cells = [
        START
        + "tc = service.create_training_client(model_ref='builtin:sums', lora_config=tn.LoRAConfig(rank=4),\n"
        "    batch_size=16, dp_config=tn.DPConfig(dataset_size=400, target_epsilon=8.0))\n"
        "pairs = [{'prompt': f'{a:02d}+1=', 'completion': f'{a + 1:03d}'} for a in range(400)]\n"
        "run = tc.fit(tc.dp_batches(pairs, steps=12)); await run;",
        "print(json.dumps(tc.dp_metrics.total_epsilon))",
        "await tc.void_privacy('noise was switched off for a test')",
    ]
    with notebook(cells) as lab:
        lab.finish_cell(0)
        lab.wait_until("data.state === 'FINISHED'")
        spent = told(lab, 1)
        meter = lab.panel.locator(".tsnb-meter")
        expect(meter).to_have_attribute("data-epsilon", str(spent))
        expect(lab.panel).to_contain_text("operator view")
        see(lab, "dp-on")
        lab.finish_cell(2)
        expect(meter).to_contain_text("ε ∞: no guarantee")
        expect(meter).to_contain_text("switched off for a test")
        expect(lab.panel).not_to_contain_text(NO_PROBLEM)
        see(lab, "dp-void")


def test_a_kernel_that_stands_still_is_stale_and_one_that_is_gone_is_said_to_be(notebook: Open) -> None:
    import os
    import signal

    cells = [
        START + NEW + "\nawait tc.ready();",
        "import os\nrun = tc.fit(batches * 20, steps=8000); print(json.dumps(os.getpid()))",
    ]
    with notebook(cells) as lab:
        lab.finish_cell(0)
        lab.finish_cell(1)
        lab.wait_until("data.state === 'RUNNING' && data.points > 5")
        kernel = json.loads(lab.output(1).locator(".jp-RenderedText").last.inner_text().strip())
        os.kill(kernel, signal.SIGSTOP)
        try:
            lab.wait_until("data.doubt === 'STALE'")
            expect(lab.panel).not_to_contain_text(NO_PROBLEM)
            expect(lab.panel.locator(".tsnb-badge")).to_contain_text("last heard: RUNNING")
            see(lab, "stale")
        finally:
            os.kill(kernel, signal.SIGCONT)
        lab.wait_until("data.doubt === '' && data.state === 'RUNNING'")
        expect(lab.panel).to_contain_text(NO_PROBLEM)
        os.kill(kernel, signal.SIGKILL)
        lab.page.get_by_role("dialog").get_by_role("button", name="Ok").click()
        lab.wait_until("data.doubt === 'NO KERNEL'")
        expect(lab.panel).not_to_contain_text(NO_PROBLEM)
        expect(lab.panel.locator(".tsnb-fresh")).to_contain_text("tn.load_run(")
        assert lab.panel.locator("[data-do]:visible").count() == 0
        see(lab, "no-kernel")
        expect_noise(lab)


def test_a_page_that_is_not_answered_asks_again_and_says_so(notebook: Open) -> None:
    blocked = "import time\nfrom IPython.display import display\ndisplay(tc)\ntime.sleep(12)"
    with notebook([START + NEW + "\nawait tc.ready();", blocked]) as lab:
        lab.finish_cell(0)
        lab.run_cell(1)
        lab.wait_until("data.tries >= 3 && data.state === ''")
        expect(lab.panel.locator(".tsnb-fresh")).to_contain_text(
            "waiting for the kernel: asked 3 times, again in"
        )
        expect(lab.panel).not_to_contain_text("DP off")  # nobody has said so yet
        see(lab, "waiting-for-the-kernel")
        lab.wait_until("data.state === 'READY' && data.tries === 0")


def test_a_reload_before_the_first_save_loses_nothing_that_the_kernel_holds(notebook: Open) -> None:
    with notebook(
        [START + NEW + "\nrun = tc.fit(batches, steps=400)", "run", "len(tc.history['loss'])"]
    ) as lab:
        lab.page.evaluate("jupyterapp.commands.execute('docmanager:toggle-autosave')")
        lab.run_cell(0)
        lab.wait_until("data.points > 20")
        lab.reload()
        lab.finish_cell(1)
        lab.wait_until("data.points > 20")
        expect(lab.panel.locator(".tsnb-note").first).to_have_text(
            ""
        )  # the picture of this cell is within reach
        lab.wait_until("data.state === 'FINISHED' && data.points === 400")
        lab.finish_cell(2)
        assert lab.output(2).inner_text().split()[-1] == "400"
        lab.page.wait_for_function(
            "() => jupyterapp.shell.currentWidget.content.widgets[1].model.outputs.toJSON()"
            ".some(output => String(output.data['text/plain']).includes('FINISHED at step 400'))"
        )
        expect_noise(lab)


def test_after_a_reload_the_panel_says_of_which_moment_the_picture_in_the_file_is(notebook: Open) -> None:
    cells = [
        START + NEW + "\nrun = tc.fit(batches * 50, steps=20_000)",
        "run.pause()",
        "run.resume()",
        "run.freeze()",
    ]
    with notebook(cells) as lab:
        lab.finish_cell(0)
        lab.wait_until("data.points > 20")
        lab.finish_cell(1)
        lab.wait_until("data.state === 'PAUSED'")
        step = lab.value("step")
        lab.page.wait_for_function(
            "step => jupyterapp.shell.currentWidget.content.widgets[0].model.outputs.toJSON().some("
            "output => output.data['image/png'] && output.data['text/plain'].includes(`PAUSED at step ${step}`))",
            arg=step,
        )
        lab.save()
        lab.finish_cell(2)
        lab.wait_until(f"data.step > {step} + 20")
        lab.reload()
        lab.wait_until("data.state === 'RUNNING'")
        note = lab.panel.locator(".tsnb-note")
        expect(note).to_contain_text(f"PAUSED at step {step} of 20000")
        expect(note).to_contain_text("run.freeze()")
        see(lab, "reloaded")
        lab.press("Pause")
        lab.wait_until("data.state === 'PAUSED'")
        lab.finish_cell(3)
        frozen = lab.output(3).locator("table.tsnb-frozen caption")
        expect(frozen).to_contain_text(f"PAUSED at step {lab.value('step')} of 20000")
        expect_noise(lab)


def test_wherever_a_widget_was_picture_and_table_are_left_without_a_kernel(notebook: Open) -> None:
    import subprocess
    import sys

    shown = [
        "tc", "run", "tc.dashboard(['loss'])", "LossCurve(run, other)", "RewardHistory(run)", "RolloutInspector(run)",
        "CheckpointTable(tc)", "PrivacyMeter(tc)", "Dashboard(tc)",
    ]  # fmt: skip
    cells = [
        START + NEW + "\nfrom tensafe_nb.widgets import *\nother = tc.fork()\n"
        "run = tc.fit(batches, steps=40, checkpoint_every=20); await run;\n"
        "await other.fit(batches[20:], steps=30, show=False);",
        *shown,
    ]
    pictured = (
        "count => jupyterapp.shell.currentWidget.content.widgets.filter(cell => "
        "cell.model.outputs.toJSON().some(output => 'image/png' in (output.data ?? {}))).length === count"
    )
    with notebook(cells) as lab:
        for cell in range(len(cells)):
            lab.finish_cell(cell)
        lab.page.wait_for_function("document.querySelectorAll('.tsnb-panel').length >= 9")
        # RewardHistory's says that no reward was measured
        lab.page.wait_for_function(pictured, arg=len(cells), timeout=PATIENCE)
        assert lab.page.locator(".tsnb-frozen:visible").count() == 0
        lab.save()
        path = lab.server.root / lab.name
        html = path.with_suffix(".html")
        command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "html", str(path)]
        subprocess.run(command, check=True, capture_output=True)
        reopen(lab)
        for cell in range(1, len(cells)):
            output = lab.output(cell)
            output.scroll_into_view_if_needed()
            expect(output.locator("img").first).to_be_visible()
            expect(output.locator("table.tsnb-frozen caption")).to_contain_text("at step 40")
        lab.screen("reopened-without-a-kernel", of=lab.output(4))
        lab.page.goto(html.as_uri())
        assert lab.page.locator("table.tsnb-frozen").count() == len(cells)
        assert lab.page.locator("img[src^='data:image/png']").count() == len(cells)
        lab.screen("nbconvert", of=lab.page.locator("body"))
        lab.problems = []


def test_two_panels_and_a_fork_say_the_same_as_their_clients(notebook: Open) -> None:
    cells = [
        START + NEW + "\nrun = tc.fit(batches, steps=400)",
        "tc",
        "child = run.fork(); branch = child.fit(batches, steps=30); await branch;",
        "facts(child, branch)",
        "await run; facts(tc, run)",
    ]
    with notebook(cells) as lab:
        for cell in range(5):
            lab.finish_cell(cell)
        panels = lab.page.locator(".tsnb-panel")
        expect(panels).to_have_count(3)
        facts, branch = told(lab, 4), told(lab, 3)
        agree(lab, facts, panels.nth(0))
        agree(lab, facts, panels.nth(1))
        agree(lab, branch, panels.nth(2))
        expect(panels.nth(2).locator(".tsnb-subject")).to_contain_text("⎇ branch from tc-")
        see(lab, "two-panels-and-a-fork", lab.page.locator(".jp-Notebook"))


def test_from_the_first_cell_to_a_curve_that_moves(notebook: Open) -> None:
    cell = (
        "import tensafe_nb as tn\n"
        "tc = tn.ServiceClient().create_training_client(lora_config=tn.LoRAConfig(rank=8))\n"
        "batches = tc.batches(tn.datasets.docstring_pairs('train')[:200], seed=0)\n"
        "run = tc.fit(batches, steps=200)"
    )
    with notebook([cell]) as lab:
        started = time.perf_counter()
        lab.run_cell(0)
        lab.wait_until("data.points >= 3 && data.state === 'RUNNING'")
        seconds = time.perf_counter() - started
        print(f"first cell to first moving curve: {seconds:.1f} s")
        assert seconds < 60, "the target is 15 s, on a machine that does nothing else"
