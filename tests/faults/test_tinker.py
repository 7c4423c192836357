"""The tinker protocol over a server that is killed: what was trained is there, and the model goes on where it was."""

from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.close import assert_close
from tests.faults.killing import Nursery, killed_server
from tests.unit.server.tinker.sdk import Sdk, datum

DATA = [datum(weights=np.ones(4))]


def test_a_model_and_its_checkpoints_outlive_a_server_that_is_killed(
    nursery: Nursery, tmp_path: Path
) -> None:
    with killed_server(nursery, tmp_path, options=["--tinker"]) as server:
        sdk = Sdk(server.url, server.token)
        sdk.make()
        for _ in range(3):
            sdk.forward_backward(DATA), sdk.step()
        path = sdk.ask("save_weights", path="kept")["path"]
        sampler = sdk.sampler(1, model_path=path)
        (before, logprobs) = sdk.forward_backward(DATA, forward_only=True)
        unread = sdk.send(DATA, number=sdk.next())  # whoever is answered is written down
        server.begin_again()
        assert "restarted" in sdk.wait(unread)["error"]
        assert sdk.http.get(f"samplers/{sampler}").status_code == 404
        again = sdk.forward_backward(DATA, forward_only=True)
        assert_close(again[0]["loss:sum"], before["loss:sum"])
        sdk.forward_backward(DATA)
        assert sdk.step()["metrics"]["step"] == 4
        sdk.session = sdk.post("create_session", tags=[], sdk_version="0.38.0")["session_id"]
        found = sdk.sample(sdk.sampler(1, model_path=path), prompt_logprobs=True)
        assert_close(np.frombuffer(found.prompt_logprobs, "<f4")[1:], logprobs[0])
        with pytest.raises(httpx.HTTPStatusError):
            sdk.http.post("session_heartbeat", json={"session_id": "unknown"}).raise_for_status()
        sdk.close()


pytestmark = pytest.mark.faults
