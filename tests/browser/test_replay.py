"""Recorded runs in a real browser: a replay moves and says what it is, and a run whose process died is shown whole."""

import re

from playwright.sync_api import expect

from .conftest import Open
from .test_live_panel import SETUP

STEERING = re.compile("Pause|Resume|Stop|Checkpoint|Rollback|Branch|Load|Delete")
DIE = """\
import subprocess, sys
code = '''
import os, signal, tensafe_nb as tn
tc = tn.ServiceClient().create_training_client(lora_config=tn.LoRAConfig(rank=8), optimizer={"learning_rate": 1e-2})
batches = [tn.BatchData([[5 + n % 40, 6, 7, 8 + n % 30]]) for n in range(200)]
run = tc.fit(batches, checkpoint_every=40, show=False)
tc.subscribe(lambda event: os.kill(os.getpid(), signal.SIGKILL) if tc.step == 100 else None)
run.result()
'''
subprocess.run([sys.executable, "-c", code], capture_output=True).returncode"""


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


def test_after_a_kernel_restart_a_run_whose_process_died_is_shown_with_its_whole_history(
    notebook: Open,
) -> None:
    cells = [DIE, "import tensafe_nb as tn\nrecord = tn.list_runs()[-1]\nrecord"]
    with notebook(cells) as lab:
        lab.finish_cell(0)
        assert "-9" in lab.output(0).inner_text()
        lab.finish_cell(1)
        lab.wait_until("data.points >= 99 && data.state === 'INTERRUPTED'")
        expect(lab.panel).to_contain_text("last checkpoint art-")
        assert lab.panel.get_by_role("button", name=STEERING).count() == 0
        lab.screenshot("interrupted-light", of=lab.panel)
