"""The privacy meter in a real browser: it spends as the run does, ends with the budget, and answers what-ifs."""

import pytest

from .conftest import Open

pytestmark = pytest.mark.soak
SETUP = """\
import tensafe_nb as tn
tc = tn.ServiceClient().create_training_client(
    model_ref="builtin:sums", lora_config=tn.LoRAConfig(rank=4), batch_size=16,
    dp_config=tn.DPConfig(dataset_size=400, target_epsilon=2.5))
rows = [{"prompt": f"{a:02d}+{b:02d}=", "completion": f"{a + b:03d}"} for a in range(20) for b in range(20)]
await tc.ready();"""
FIT = "run = tc.fit(tc.dp_batches(rows, steps=500))"


def test_the_meter_follows_the_budget_to_its_end_and_its_sliders_answer(notebook: Open) -> None:
    with notebook([SETUP, FIT, "(await run).reason", "tc.dp_metrics.total_epsilon"], scale=2) as lab:
        for cell in range(4):
            lab.finish_cell(cell)
        lab.wait_until("data.state === 'STOPPED'")
        assert "the budget is 2.5" in lab.output(2).inner_text()
        meter = lab.panel.locator(".tsnb-meter")
        spent = float(meter.get_attribute("data-epsilon") or "nan")
        assert spent == float(lab.output(3).inner_text().split()[-1]) <= 2.5
        assert "was refused" in meter.inner_text()
        assert "the budget is 2.5" in lab.panel.locator(".tsnb-note").inner_text()
        plan = meter.locator(".tsnb-plan")
        plan.locator("summary").click()
        lab.page.wait_for_function("document.querySelector('.tsnb-plan').dataset.answered === '1'")
        sigma, epsilon = (plan.locator("input").nth(n) for n in (0, 3))
        before = float(epsilon.input_value())
        sigma.fill("2")
        lab.page.wait_for_function("document.querySelector('.tsnb-plan').dataset.answered === '2'")
        assert float(epsilon.input_value()) < before
        epsilon.fill("8")
        lab.page.wait_for_function("document.querySelector('.tsnb-plan').dataset.answered === '3'")
        assert float(sigma.input_value()) < 2
        assert "steps from the start" in plan.inner_text()
        lab.screenshot("privacy-light", of=lab.panel)
        lab.switch_theme("JupyterLab Dark")
        lab.screenshot("privacy-dark", of=lab.panel)
