"""A comparison under its cell in a real JupyterLab: it moves, pauses, survives a reload, and is seen in the dark."""

import pytest

from .conftest import Open

SETUP = """\
import tensafe_nb as tn
service = tn.ServiceClient()
rows = tn.datasets.docstring_pairs("train")[:32]
def arm(service, seed, learning_rate):
    tc = service.create_training_client(lora_config={"rank": 4}, optimizer={"learning_rate": learning_rate}, seed=seed)
    return tc.fit(tc.batches(rows, seed=seed), steps=24, show=False)"""
RACE = """\
race = tn.compare(
    arm, seeds=3, vary={"learning_rate": [1e-4, 3e-3]}, service=service, name="rates", early_stop=False
)"""


@pytest.mark.soak
def test_a_comparison_moves_pauses_and_comes_back_after_a_reload(notebook: Open) -> None:
    with notebook([SETUP, RACE, "print(race.result())", "race"]) as lab:
        lab.finish_cell(0)
        lab.finish_cell(1)
        lab.wait_until("data.state === 'RUNNING' && data.points > 8")
        lab.press("Pause")
        lab.wait_until("data.state === 'PAUSED'")
        lab.screenshot("comparison-paused-light", of=lab.panel)
        lab.save()
        lab.reload()
        lab.wait_until("data.state === 'PAUSED' && data.points > 8")
        lab.press("Resume")
        lab.finish_cell(2)
        assert "paired, 3 seeds" in lab.output(2).inner_text()
        lab.wait_until("data.state === 'FINISHED' && data.points === 96")
        assert lab.panel.locator(".tsnb-verdicts li").count() == 1
        lab.screenshot("comparison-light", of=lab.panel)
        lab.switch_theme("JupyterLab Dark")
        lab.screenshot("comparison-dark", of=lab.panel)
        lab.finish_cell(3)
        assert lab.output(3).locator(".tsnb-race").count() == 1
