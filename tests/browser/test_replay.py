"""Recorded runs in a real browser: a replay moves and says what it is, and a run whose process died is shown whole."""

import re

from playwright.sync_api import expect

from .conftest import Open
from .lab import PATIENCE
from .test_live_panel import SETUP, start

EXPECTED = re.compile("[Kk]ernel|comm|widget|model", re.IGNORECASE)  # of a page whose kernel has died
STEERING = re.compile("Pause|Resume|Stop|Checkpoint|Rollback|Branch|Load|Delete")
MAKE_BATCHES = SETUP.splitlines()[0] + "\n" + "\n".join(SETUP.splitlines()[2:5])
DIE = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
LOOK = "import tensafe_nb as tn\nrecord = tn.list_runs()[-1]\nrecord"
GO_ON = f"""\
{MAKE_BATCHES}
tc = tn.ServiceClient().restore(record.last_checkpoint)
run = tc.fit(batches, steps=5000, resume_from=record.last_checkpoint)"""


def test_a_replay_moves_and_says_that_it_is_one_and_has_no_buttons_to_steer_it(notebook: Open) -> None:
    cells = [
        SETUP,
        "run = tc.fit(batches, steps=150, eval_batches=batches[:1], eval_every=15, show=False); await run;",
        "replay = tn.replay(run.run_id, speed=0.5)",
        "replay.close(); replay",
    ]
    with notebook(cells) as lab:
        for cell in range(3):
            lab.finish_cell(cell)
        lab.wait_until("data.points > 5 && data.state === 'RUNNING'")
        before = int(lab.value("points"))
        lab.wait_until(f"data.points > {before + 10} && data.points < 150")
        assert "REPLAY" in lab.panel.inner_text()
        assert lab.panel.get_by_role("button", name=STEERING).count() == 0
        lab.screenshot("replay-light", of=lab.panel)
        lab.finish_cell(3)
        lab.wait_until("data.points === 150 && data.state === 'FINISHED' && data.step === 150")
        assert "REPLAY" in lab.output(3).inner_text()
        lab.screenshot("replay-ended-light", of=lab.panel)


def test_after_the_kernel_died_the_run_is_shown_whole_and_training_goes_on_from_its_checkpoint(
    notebook: Open,
) -> None:
    fit = "run = tc.fit(batches, steps=5000, checkpoint_every=30)"
    with notebook([SETUP, fit, DIE, LOOK, GO_ON, "run.stop(); tc.step, record.step"]) as lab:
        start(lab)
        lab.wait_until("data.points > 100")
        seen = int(lab.value("points"))
        lab.run_cell(2)
        lab.page.get_by_role("dialog").get_by_role("button", name="Ok").click()
        lab.wait_for_kernel()
        lab.finish_cell(3)
        dead = lab.output(3).locator(".tsnb-panel")
        expect(dead).to_have_attribute("data-state", "INTERRUPTED")
        expect(dead).to_contain_text("last checkpoint art-")
        points = int(dead.get_attribute("data-points") or 0)
        assert points >= seen
        assert dead.get_by_role("button", name=STEERING).count() == 0
        lab.screenshot("interrupted-light", of=dead)
        lab.finish_cell(4)
        alive = lab.output(4).locator(".tsnb-panel")
        expect(alive).to_have_attribute("data-state", "RUNNING")
        lab.page.wait_for_function(
            "panel => Number(panel.dataset.step) > 150", arg=alive.element_handle(), timeout=PATIENCE
        )
        lab.screenshot("gone-on-light", of=alive)
        lab.finish_cell(5)
        expect(alive).to_have_attribute("data-state", "STOPPED")
        lab.problems = [problem for problem in lab.problems if not EXPECTED.search(problem)]
