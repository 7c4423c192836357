"""The panel of each policy of prompts says what it does to the curves; pictured in light and dark, to be looked at."""

import pytest
from playwright.sync_api import expect

from .conftest import Open
from .test_states import see, told

pytestmark = pytest.mark.soak

SETUP = """\
import json, tensafe_nb as tn
from tensafe_nb import rlvr
service = tn.ServiceClient()
def start(policy):
    tc = service.create_training_client(model_ref="builtin:sums", optimizer={"learning_rate": 1e-4})
    trainer = rlvr.RLVRTrainer(
        tc, tn.datasets.sums(48, seed=0), "exact_match", prompt_policy=policy, prompts_per_step=8, group_size=4,
        max_new_tokens=4, eval_prompts=tn.datasets.sums(16, seed=1), eval_every=6,
    )
    return trainer.run(steps=18)
"""
FACTS = """\
run.result()
print(json.dumps({name: run.history[name][-1] for name in run.history.names}))
"""
BIAS = {
    "uniform": "",
    "curriculum": " · prompts: easy ones first; compare eval/reward",
    "adaptive": " · prompts: more of what is half solved; compare eval/reward",
    "dynamic": " · prompts: those without signal are replaced; compare resample/reward and eval/reward",
}


@pytest.mark.parametrize("policy", BIAS)
def test_the_panel_says_how_prompts_are_chosen(notebook: Open, policy: str) -> None:
    with notebook([SETUP, f"run = start({policy!r})", FACTS]) as lab:
        lab.finish_cell(0)
        lab.finish_cell(1)
        measured = told(lab, 2)
        lab.wait_until("data.state === 'FINISHED' && data.step === 18")
        see(lab, f"prompts-{policy}")
        foot = lab.panel.locator(".tsnb-subject").inner_text()
        assert foot.endswith(BIAS[policy]) and ("prompts" in foot) == bool(BIAS[policy])
        legend = lab.panel.locator(".tsnb-chart").first
        if policy == "dynamic":
            expect(legend).to_contain_text(f"all sampled{measured['resample/reward']:.4f}")
            assert measured["resample/reward"] != measured["reward"]
            expect(lab.panel).to_contain_text("thrown away without")
        else:
            expect(legend).not_to_contain_text("all sampled")
