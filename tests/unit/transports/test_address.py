"""The address of a server: what stands behind its question mark is a proxy's secret."""

from pathlib import Path

import pytest

import tensafe_nb as tn
from tests.parity.serving import serving_thread


def test_a_query_goes_with_every_request_and_is_shown_nowhere(tmp_path: Path) -> None:
    with serving_thread(tmp_path / "server") as serving:
        asked: list[bytes] = []

        with tn.ServiceClient(f"{serving.url}/?token=secret", api_key=serving.tokens.mint()) as service:
            requests = service._transport._requests  # type: ignore[attr-defined]
            hooks = requests._http.event_hooks

            async def note(request: object) -> None:
                asked.append(request.url.query)  # type: ignore[attr-defined]

            requests._http.event_hooks = {**hooks, "request": [note]}
            tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
            tc.forward(tn.BatchData([[5, 6, 7, 8]])).result()
            shown = f"{service!r} {service._facts()} {tc!r} {requests.url}"
            with pytest.raises(tn.TrainingClientNotFoundError) as refused:
                service.get_training_client("tc-none")
            tc.close()
    assert len(asked) > 3 and all(b"token=secret" in query for query in asked)
    assert "secret" not in shown + str(refused.value)
    with pytest.raises(tn.ServerConnectionError) as unreachable:
        tn.ServiceClient(f"{serving.url}/?token=secret")
    assert "secret" not in str(unreachable.value)
