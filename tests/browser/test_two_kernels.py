"""A student leaves the last notebook's kernel running: the panel of the next one tells of it, and shuts it down."""

import json
from urllib.request import Request, urlopen

import pytest
from playwright.sync_api import expect

from .conftest import Open
from .lab import Server

pytestmark = pytest.mark.soak
CELL = """
import os
os.environ["MEM_LIMIT"] = "500_000_000".replace("_", "")  # as a hub says it
import tensafe_nb as tn
service = tn.ServiceClient()
tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2), batch_size=2)
run = tc.fit([{"input_ids": [[5, 6, 7, 8]]}] * 3)
await run
"""


def test_the_panel_tells_of_a_second_kernel_and_its_button_shuts_it_down(
    notebook: Open, server: Server
) -> None:
    server.write_notebook("01_quickstart.ipynb", ["1"])
    with notebook([CELL]) as lab:
        about = {"path": "01_quickstart.ipynb", "name": "", "type": "notebook", "kernel": {"name": "python3"}}
        headers = {"Authorization": f"token {server.token}", "Content-Type": "application/json"}
        started = Request(f"{server.url}/api/sessions", json.dumps(about).encode(), headers)
        with urlopen(started, timeout=60) as answer:
            other = json.loads(answer.read())["kernel"]["id"]
        lab.finish_cell(0)
        told = lab.panel.get_by_text("01_quickstart.ipynb is open too")
        expect(told).to_be_visible()
        lab.screen("two-kernels-light", of=lab.panel)
        lab.switch_theme("JupyterLab Dark")
        lab.screen("two-kernels-dark", of=lab.panel)
        lab.press("Shut down 01_quickstart.ipynb")
        assert other in [kernel["id"] for kernel in server.api("kernels")], "one click asks only"
        lab.press("Its variables go: sure?")
        expect(told).to_have_count(0)
        expect(lab.panel.get_by_text("01_quickstart.ipynb was shut down")).to_be_visible()
        (left,) = server.api("kernels")
        assert left["id"] != other
        lab.press("Checkpoint")  # its own kernel goes on
        lab.wait_until("data.acked === 2")
        label = lab.panel.get_by_text("loss", exact=True).first
        assert (label.get_attribute("title") or "").startswith("loss: what training makes smaller")
        lab.screen("two-kernels-after", of=lab.panel)
