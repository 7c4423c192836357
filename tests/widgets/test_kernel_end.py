"""A kernel that is shut down in the middle of a run leaves the picture and the table of its last moment."""

import queue
from typing import Any

import pytest

CODE = """\
import tensafe_nb as tn
tc = tn.ServiceClient().create_training_client(lora_config=tn.LoRAConfig(rank=8))
await tc.ready()
run = tc.fit([tn.BatchData(input_ids=[[5, 6, 7, 8]])] * 50, steps=100_000)
import asyncio
while run.steps_done < 3:
    await asyncio.sleep(0.01)"""


def test_the_end_of_the_kernel_freezes_what_still_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    from jupyter_client.manager import start_new_kernel

    monkeypatch.setenv("TENSAFE_NB_RENDERER", "widget")
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        client.execute_interactive(CODE, timeout=None, output_hook=lambda message: None)
        client.shutdown()
        manager.provisioner.process.wait()
        frozen = _outputs_on_their_way(client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    captions = [data["text/plain"] for data in frozen if "tsnb-frozen" in data.get("text/html", "")]
    assert captions, "the table was renewed"
    assert "at step 0" not in captions[-1]
    assert any("image/png" in data for data in frozen)


def _outputs_on_their_way(client: Any) -> list[dict[str, Any]]:
    """Return what the kernel had sent before it ended: with the picture of its end, or, where none comes, without."""
    found: list[dict[str, Any]] = []
    while True:
        pictured = any("image/png" in data for data in found)
        try:  # on a busy machine, what was sent takes a while to be here
            message = client.get_iopub_msg(timeout=0.5 if pictured else 20)
        except queue.Empty:
            return found
        if message["msg_type"] == "update_display_data":
            found.append(message["content"]["data"])
