"""A comparison under its cell in a real JupyterLab: it moves, pauses, survives a reload, and is seen in the dark."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

import tensafe_nb as tn

from .conftest import Open
from .lab import SCREENS
from .test_page import LOOKS, opened

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


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of a comparison of three arms, one of which was given up."""
    folder = tmp_path_factory.mktemp("race")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSAFE_HOME", str(folder / "home"))
        rows = tn.datasets.docstring_pairs("train")[:16]
        recipe = {"training": {"steps": 16}, "lora": {"rank": 4}, "batch": {"batch_size": 4}}
        race = tn.compare(
            recipe, data=rows, seeds=3, vary={"learning_rate": [1e-4, 1e-3, 1e-2]}, name="rates", show=False
        )
        race.result()
        return race.save_page(folder / "race.html")


@pytest.mark.soak
@pytest.mark.parametrize("look", LOOKS)
def test_its_page_shows_chart_table_and_words_without_a_kernel(
    browser: Browser, page: Path, look: str
) -> None:
    with opened(browser, page, look) as shown:
        panel = shown.locator(".tsnb-race")
        expect(panel).to_have_attribute("data-state", "FINISHED")
        expect(panel.locator(".tsnb-verdicts li")).to_have_count(2)
        expect(panel.locator("table tr")).to_have_count(4)
        expect(panel.get_by_role("button", name="Stop")).to_be_hidden()
        expect(panel).to_contain_text("up to date")
        panel.locator("summary").click()
        expect(panel).to_contain_text("Each run's value: loss")
        SCREENS.mkdir(parents=True, exist_ok=True)
        shown.screenshot(path=SCREENS / f"race-page-{look}.png", full_page=True)
