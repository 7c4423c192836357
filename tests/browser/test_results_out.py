"""Results leave the notebook: a file that the page makes, a figure that a cell shows once, a run under its name."""

import csv
from pathlib import Path

import pytest
from playwright.sync_api import expect

from .conftest import Open
from .test_live_panel import FIT, SETUP

pytestmark = pytest.mark.soak


def test_the_curves_are_saved_as_they_stand_and_the_run_is_shown_by_its_name(
    notebook: Open, tmp_path: Path
) -> None:
    cells = [
        SETUP,
        FIT.format(steps=40, every=10)[:-1] + ", name='first try')",
        "(await run).steps; print(run.to_csv('kernel.csv'))",
        "run.plot(['loss', 'grad_norm'])",
        "tn.list_runs(name='first*')",
    ]
    with notebook(cells) as lab:
        for cell in range(3):
            lab.finish_cell(cell)
        lab.wait_until("data.state === 'FINISHED'")
        expect(lab.panel).to_contain_text("run 1 “first try”")
        with lab.page.expect_download() as download:
            lab.press("Download CSV")
        saved = tmp_path / "page.csv"
        download.value.save_as(saved)
        assert download.value.suggested_filename.endswith("-1.csv")
        with saved.open(newline="") as page, (lab.server.root / "kernel.csv").open(newline="") as kernel:
            shown, written = list(csv.DictReader(page)), list(csv.DictReader(kernel))
        assert len(shown) == len(written) == 41
        for one, other in zip(shown, written, strict=True):
            assert one["step"] == other["step"]
            for name in ("loss", "eval/loss", "grad_norm"):
                assert (one[name] == "") == (other[name] == "")
                assert other[name] == "" or float(one[name]) == pytest.approx(float(other[name]), rel=1e-6)
        lab.screenshot("named-light", of=lab.panel)
        lab.switch_theme("JupyterLab Dark")
        lab.screenshot("named-dark", of=lab.panel)
        lab.finish_cell(3)
        assert lab.output(3).locator("img").count() == 1, "a figure is shown once"
        lab.screenshot("figure-dark", of=lab.output(3))
        lab.finish_cell(4)
        expect(lab.output(4).locator("table")).to_contain_text("first try")
        lab.screenshot("runs-dark", of=lab.output(4))
