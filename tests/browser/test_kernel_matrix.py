"""The panel on the ipykernel versions that behave differently: it moves, it obeys, it comes back after a reload."""

import re
import time
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from .conftest import Open
from .kernels import VERSIONS, NoIndexError, register
from .lab import Lab, Server
from .test_live_panel import FIT, SETUP, start

pytestmark = [pytest.mark.soak, pytest.mark.timeout(300)]

CELL_SECONDS = 8
BLOCK = f"try:\n    run.result({CELL_SECONDS})\nexcept TimeoutError:\n    pass"
AWAIT = (
    f"import asyncio\ntry:\n    await asyncio.wait_for(run, {CELL_SECONDS})\nexcept TimeoutError:\n    pass"
)
LISTENS_WHILE_A_CELL_BLOCKS = ("7.3.0",)
LISTENS_WHILE_A_CELL_AWAITS = ("7.4.0", "7.3.0")


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest, server: Server) -> Iterator[str]:
    """An ipykernel version of which the server has a kernelspec."""
    try:
        register(request.param, server.data_folder)
    except NoIndexError as error:
        pytest.skip(str(error))
    yield request.param


def notebook_of(notebook: Open, version: str, *cells: str) -> object:
    check = f"import ipykernel\nassert ipykernel.__version__ == {version!r}\n"
    first, *others = cells
    return notebook([check + first, *others], kernel=f"ipykernel-{version}")


def test_the_curve_moves_after_the_cell_has_returned(notebook: Open, version: str) -> None:
    with notebook_of(
        notebook, version, SETUP, FIT.format(steps=200, every=25), "6 * 7", "(await run).steps"
    ) as lab:
        start(lab)
        before = int(lab.value("points"))
        lab.finish_cell(2)
        assert "42" in lab.output(2).inner_text()
        lab.wait_until(f"data.points > {before + 5}")
        latencies = sorted(lab.samples("latency", 40))
        print(f"\n{version}: event → shown: p50 {latencies[20]} ms, p95 {latencies[37]} ms")
        lab.finish_cell(3)
        lab.wait_until("data.state === 'FINISHED' && data.points === 200 && data.step === 200")
        lab.screenshot(f"matrix-finished-{version}", of=lab.panel)


def test_pause_resume_and_stop_act_within_a_second(notebook: Open, version: str) -> None:
    cells = (SETUP, FIT.format(steps=5000, every=500), "run.state.name, run.steps_done")
    with notebook_of(notebook, version, *cells) as lab:
        start(lab)
        seconds = {}
        for button, state in (("Pause", "PAUSED"), ("Resume", "RUNNING"), ("Stop", "STOPPED")):
            lab.panel.get_by_role("button", name=button, exact=True).click()
            seconds[button] = lab.wait_until(f"data.state === '{state}'")
            step = lab.value("step")
            if state == "PAUSED":
                lab.finish_cell(2)
                assert f"('PAUSED', {step})" in lab.output(2).inner_text(), "the panel and the run disagree"
                assert lab.value("step") == step, "a paused run took a step"
        print(f"\n{version}: click → state, cell returned: {rounded(seconds)}")
        assert max(seconds.values()) < 1.0, seconds


@pytest.mark.parametrize(
    ("cell", "listening"),
    [(BLOCK, LISTENS_WHILE_A_CELL_BLOCKS), (AWAIT, LISTENS_WHILE_A_CELL_AWAITS)],
    ids=["blocks", "awaits"],
)
def test_a_click_while_a_cell_runs_is_obeyed_at_once_or_says_what_it_waits_for(
    notebook: Open, version: str, cell: str, listening: tuple[str, ...]
) -> None:
    with notebook_of(notebook, version, SETUP, FIT.format(steps=5000, every=500), cell) as lab:
        start(lab)
        lab.run_cell(2)
        before = int(lab.value("points"))
        lab.wait_until(f"data.points > {before + 5}")
        clicked = time.perf_counter()
        lab.panel.get_by_role("button", name="Pause", exact=True).click()
        if version in listening:
            lab.wait_until("data.state === 'PAUSED'", timeout=2_000)
            assert cell_runs(lab, 2), "the cell had ended: this shows nothing"
        else:
            lab.wait_until("data.waiting === 'true'", timeout=3_000)
            assert cell_runs(lab, 2)
            expect(lab.panel).to_contain_text("waiting for the running cell")
            lab.screenshot(f"matrix-waiting-{version}", of=lab.panel)
            lab.wait_until("data.state === 'PAUSED' && data.waiting === 'false'")
        print(f"\n{version}: click → PAUSED, cell running: {time.perf_counter() - clicked:.2f} s")


def test_after_a_reload_in_mid_run_all_points_are_back_and_it_goes_on(notebook: Open, version: str) -> None:
    cells = (SETUP, FIT.format(steps=5000, every=100), "len(tc.history['loss'])")
    with notebook_of(notebook, version, *cells) as lab:
        start(lab)
        lab.wait_until("data.points > 120")
        before = int(lab.value("points"))
        lab.save()
        started = time.perf_counter()
        lab.reload()
        lab.wait_until(f"data.points >= {before}", timeout=10_000)
        print(f"\n{version}: {before} points back {time.perf_counter() - started:.2f} s after the reload")
        after = int(lab.value("points"))
        lab.wait_until(f"data.points > {after + 10} && data.state === 'RUNNING'")
        lab.panel.get_by_role("button", name="Stop", exact=True).click()
        lab.wait_until("data.state === 'STOPPED'")
        lab.finish_cell(2)
        assert lab.output(2).inner_text().split()[-1] == lab.value("points")


def cell_runs(lab: Lab, index: int) -> bool:
    prompt = lab.page.locator(".jp-Cell").nth(index).locator(".jp-InputPrompt").inner_text()
    return re.search(r"\[\*\]", prompt) is not None


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}
