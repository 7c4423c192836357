"""A saved page in a real browser, opened as a file: it plays to the end, and shows what the runs measured."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

import tensafe_nb as tn
from tensafe_nb.rlvr import RLVRTrainer

from .lab import PATIENCE, SCREENSHOTS
from .test_replay import STEERING

FINE_TUNED, REINFORCED = 0, 1
LOOKS = {  # (colour scheme, width)
    "light": ("light", 1180),
    "dark": ("dark", 1180),
    "phone": ("light", 390),
    "phone-dark": ("dark", 390),
}


@dataclass(frozen=True)
class Saved:
    """A page of a run of either kind, and their results."""

    path: Path
    losses: tn.TrainingRun
    rewards: tn.TrainingRun


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSAFE_HOME", str(folder / "home"))
        with tn.ServiceClient() as service:
            tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=4), batch_size=4)
            rows = tn.datasets.docstring_pairs("train")[:64]
            losses = tc.fit(tc.batches(rows, seed=0), steps=16, checkpoint_every=8, show=False)
            losses.result()
            policy = service.create_training_client(model_ref="builtin:sums")
            trainer = RLVRTrainer(
                policy, tn.datasets.sums(64, seed=0), "exact_match", prompts_per_step=8, group_size=4,
                max_new_tokens=4,
            )  # fmt: skip
            rewards = trainer.run(steps=6, show=False)
            rewards.result()
        page = tn.save_page(folder / "runs.html", losses, rewards, title="Two runs", samples=2)
    return Saved(page, losses, rewards)


@contextmanager
def opened(
    browser: Browser, path: Path, look: str = "light", motion: str = "no-preference"
) -> Iterator[Page]:
    """Open a page as a file; afterwards fail if it had an error, or asked for anything else."""
    scheme, width = LOOKS[look]
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion=motion
    )
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(f"page error: {error}"))
    page.on("console", lambda message: problems.append(f"console {message.type}: {message.text}"))
    page.on("request", lambda request: problems.append(f"request: {request.url}"))
    page.goto(path.as_uri())
    yield page
    context.close()
    assert problems == [f"request: {path.as_uri()}"]


def tape(page: Page, number: int) -> Locator:
    return page.locator(".tsnb-tape").nth(number)


def shown(player: Locator) -> float:
    """Return what the legend of the large chart says of the run's own curve."""
    chart = player.locator(".tsnb-chart").first
    chart.scroll_into_view_if_needed()  # a chart draws while it is on the screen
    value = chart.locator(".tsnb-entry b").first
    expect(value).not_to_be_empty()
    return float(value.inner_text())


def test_both_runs_play_to_their_ends_and_show_what_was_measured(browser: Browser, saved: Saved) -> None:
    with opened(browser, saved.path) as page:
        for number, run, curve in ((FINE_TUNED, saved.losses, "loss"), (REINFORCED, saved.rewards, "reward")):
            player = tape(page, number)
            player.scroll_into_view_if_needed()
            player.get_by_label("speed").select_option(index=5)
            expect(player).to_have_attribute("data-ended", "true", timeout=PATIENCE)
            panel = player.locator(".tsnb-panel")
            expect(panel).to_have_attribute("data-state", "FINISHED")
            expect(panel).to_have_attribute("data-step", str(run.steps_done))
            expect(panel.locator(".tsnb-marks")).to_have_text("REPLAY")
            assert panel.get_by_role("button", name=STEERING).count() == 0
            assert shown(player) == pytest.approx(run.history[curve][-1], rel=1e-3)


def test_the_slider_goes_anywhere_and_playing_goes_on_from_there(browser: Browser, saved: Saved) -> None:
    with opened(browser, saved.path, motion="reduce") as page:
        player = tape(page, FINE_TUNED)
        expect(player).to_have_attribute("data-ended", "true")  # who wants things still begins with the end
        slider = player.get_by_label("moment of the run")
        slider.fill("0")
        expect(player.locator(".tsnb-panel")).to_have_attribute("data-step", "0")
        expect(player).to_have_attribute("data-points", "0")
        assert not player.get_by_text("checkpoints").is_visible()
        player.get_by_role("button", name="Play", exact=True).click()
        expect(player.locator(".tsnb-panel")).to_have_attribute("data-points", "16", timeout=PATIENCE)
        expect(player.get_by_role("button", name="Play again")).to_be_visible(timeout=PATIENCE)
        expect(player.get_by_text("checkpoints", exact=True)).to_be_visible()


def test_a_click_on_a_step_shows_its_samples_and_another_steps_are_left(
    browser: Browser, saved: Saved
) -> None:
    with opened(browser, saved.path, motion="reduce") as page:
        player = tape(page, REINFORCED)
        plot = player.locator(".tsnb-plot").first
        plot.scroll_into_view_if_needed()
        plot.press("Home")
        plot.press("Enter")
        samples = player.locator(".tsnb-samples")
        expect(samples).to_have_attribute("data-step", "1")
        assert samples.locator(".tsnb-card").count() == 2
        expect(samples).to_contain_text("6 further prompts")


@pytest.mark.parametrize("look", LOOKS)
def test_it_fits_its_window(browser: Browser, saved: Saved, look: str) -> None:
    with opened(browser, saved.path, look, motion="reduce") as page:
        for number in (FINE_TUNED, REINFORCED):
            expect(tape(page, number)).to_have_attribute("data-ended", "true")
            tape(page, number).scroll_into_view_if_needed()
        assert page.evaluate("document.documentElement.scrollWidth") == LOOKS[look][1]
        page.set_viewport_size({"width": LOOKS[look][1], "height": 4200 if "phone" in look else 2600})
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / f"page-{look}.png", full_page=True)
