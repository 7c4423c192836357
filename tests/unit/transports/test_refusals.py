"""What a user sees where the network, something on the way, or the server refuses: which error, and that it goes on."""

import _thread
import json
import socket
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

import tensafe_nb as tn
from tensafe_nb.events import LineChanged, Metrics
from tensafe_nb.server import clients, process
from tensafe_nb.server.door.limits import Limits
from tensafe_nb.transports import http_channel
from tests.faults.proxy import BadNetwork
from tests.parity.serving import Gate, Serving, core_of, eventually, serving_thread

BATCH = tn.BatchData([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving_thread(tmp_path_factory.mktemp("server")) as serving:
        yield serving


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again sooner what could not be had: nothing else differs from how a user has it."""
    monkeypatch.setattr(http_channel, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(http_channel, "LONGEST_PAUSE", 0.1)


@pytest.fixture
def network(serving: Serving) -> Iterator[BadNetwork]:
    """A network that does what its script says, and no harm else."""
    with BadNetwork(serving.url, harm=False) as network:
        yield network
    serving.end()


@pytest.fixture
def service(network: BadNetwork, serving: Serving) -> Iterator[tn.ServiceClient]:
    with tn.ServiceClient(network.url, serving.tokens.mint("me")) as service:
        yield service


@pytest.fixture
def tc(service: tn.ServiceClient) -> tn.TrainingClient:
    tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
    tc.ready().result()
    return tc


@pytest.fixture
def impatient(service: tn.ServiceClient) -> None:
    be_patient(service, 0.5)


def be_patient(service: tn.ServiceClient, seconds: float) -> None:
    service._transport._requests.patience = seconds  # type: ignore[attr-defined]


def answer(status: str, content: str = "<p>nginx", *fields: str) -> bytes:
    """Return an answer as a proxy gives one."""
    head = [f"HTTP/1.1 {status}", f"content-length: {len(content)}", "connection: close", *fields]
    return ("\r\n".join(head) + "\r\n\r\n" + content).encode()


def refusal(status: str, code: str, *fields: str) -> bytes:
    """Return an answer as the server gives one."""
    error = {"code": code, "message": f"no: {code}", "details": {}, "request_id": "req-1"}
    return answer(status, json.dumps({"error": error}), "x-tensafe-request: req-1", *fields)


def the_first(word: str, times: int, fate: str | bytes) -> Callable[[str], str | bytes | None]:
    """Return a script that lets something befall the first few requests that have a word in them."""
    numbers = count(1)
    return lambda request: fate if word in request and next(numbers) <= times else None


def steps(tc: tn.TrainingClient) -> int:
    tc.forward_backward(BATCH)
    return tc.optim_step().result(60).step


@pytest.mark.parametrize(
    "said",
    [
        answer("502 Bad Gateway"),
        answer("504 Gateway Timeout"),
        answer("404 Not Found"),
        answer("302 Found", "", "location: /login"),
        answer("200 OK", "<html>Log in, please"),
        refusal("503 Service Unavailable", "draining"),
        refusal("429 Too Many Requests", "too_many_requests", "retry-after: 1"),
    ],
    ids=lambda said: said.split(b"\r\n")[0].decode() if isinstance(said, bytes) else said,
)
@pytest.mark.parametrize("where", ["/stream", "/operations"])
def test_what_passes_is_waited_for_and_nothing_is_lost(
    network: BadNetwork, tc: tn.TrainingClient, said: bytes, where: str
) -> None:
    network.script = the_first(where, 2, said)
    network.cut()
    assert steps(tc) == 1 and steps(tc) == 2
    assert len(tc.history["loss"]) == 2


def test_what_a_run_tells_stays_before_what_is_submitted_after_it_however_late_it_comes(
    network: BadNetwork, tc: tn.TrainingClient
) -> None:
    network.script = the_first("/events", 3, "never arrives")
    for step in (1, 2):
        tc.publish(Metrics(step=step, values={"grad_norm": -step}, run_id="run-1"))
        tc.forward_backward(BATCH), tc.optim_step().result(60)
    told, measured = tc.history["grad_norm"][::2], tc.history["grad_norm"][1::2]
    assert told.tolist() == [-1, -2] and (measured > 0).all()


def test_what_the_server_does_not_take_of_what_a_run_tells_holds_up_nothing_behind_it(
    network: BadNetwork, tc: tn.TrainingClient
) -> None:
    network.script = the_first("/events", 1, refusal("422 Unprocessable", "validation_error"))
    tc.publish(Metrics(step=1, values={"mine": 1.0}, run_id="run-1"))
    assert steps(tc) == 1
    tc.publish(Metrics(step=2, values={"mine": 2.0}, run_id="run-1"))
    assert steps(tc) == 2
    assert tc.history["mine"].tolist() == [2.0]


def test_behind_a_proxy_that_keeps_streams_a_question_that_fails_is_asked_again(
    network: BadNetwork, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_channel, "FIRST_SIGN", 0.3)
    network.holds_streams, network.script = True, the_first("/poll", 3, "never arrives")
    with tn.ServiceClient(network.url, serving.tokens.mint("held")) as service:
        tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
        assert steps(tc) == 1


@pytest.mark.usefixtures("impatient")
def test_a_token_that_is_not_valid_for_a_while_fails_what_waits_and_then_the_client_goes_on(
    network: BadNetwork, tc: tn.TrainingClient
) -> None:
    assert steps(tc) == 1
    network.script = lambda request: refusal("401 Unauthorized", "unauthorized")
    network.cut()
    handles = [tc.forward_backward(BATCH), tc.optim_step()]
    for handle in handles:
        assert isinstance(handle.exception(30), tn.errors.AuthenticationError)
    network.script = lambda request: None
    eventually(lambda: tc.history.state.line is None)
    assert steps(tc) == 2  # of what had failed, nothing was done, and nothing waits for it


def test_something_on_the_way_that_wants_to_know_who_it_is_says_so(
    network: BadNetwork, service: tn.ServiceClient
) -> None:
    network.script = lambda request: answer("403 Forbidden")
    with pytest.raises(tn.errors.AuthenticationError, match=r"it was not the server that did.*\?token="):
        service.list_artifacts()


def test_a_body_that_a_proxy_does_not_take_fails_alone_and_says_what_to_set(
    network: BadNetwork, tc: tn.TrainingClient
) -> None:
    network.script = the_first("/operations", 1, answer("413 Request Entity Too Large"))
    large = tc.forward_backward(BATCH)
    with pytest.raises(
        tn.errors.ServerConnectionError, match=r"takes no request of \d+ bytes.*client_max_body_size"
    ):
        large.result(30)
    assert steps(tc) == 1  # its number is not waited for


@pytest.mark.usefixtures("impatient")
def test_after_a_line_that_was_lost_for_too_long_the_client_goes_on_and_what_was_given_up_is_not_done(
    network: BadNetwork, tc: tn.TrainingClient
) -> None:
    assert steps(tc) == 1
    network.script = lambda request: "never arrives"
    network.cut()
    handles = [handle for _ in range(4) for handle in (tc.forward_backward(BATCH), tc.optim_step())]
    for handle in handles:
        with pytest.raises(tn.errors.ServerConnectionError, match="does not answer"):
            handle.result(30)
    eventually(lambda: getattr(tc.history.state.line, "state", None) == "LOST")
    network.script = lambda request: None
    eventually(lambda: tc.history.state.line is None)
    assert steps(tc) == 2 and tc.ready().result().status in ("READY", "BUSY")


def test_a_line_that_was_quiet_for_long_has_the_whole_patience_when_it_breaks(
    network: BadNetwork,
    service: tn.ServiceClient,
    tc: tn.TrainingClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clients, "HEARTBEAT", 0.1)
    network.cut()
    assert steps(tc) == 1
    channel: http_channel.HttpChannel = tc._channel  # type: ignore[assignment]
    heard = channel.heard_at
    be_patient(service, 1.0)
    eventually(lambda: channel.heard_at > heard + 1.2)  # nothing happens, but the server is there
    told: list[str] = []
    tc.subscribe(lambda event: told.append(event.state) if isinstance(event, LineChanged) else None)
    network.cut()
    assert steps(tc) == 2
    assert "LOST" not in told


def test_a_training_client_that_the_server_knows_no_more_fails_what_waits_and_another_can_be_made(
    network: BadNetwork, service: tn.ServiceClient, tc: tn.TrainingClient, serving: Serving
) -> None:
    gone = refusal("404 Not Found", "training_client_not_found")
    network.script = lambda request: gone if tc.training_client_id in request else None
    network.cut()
    with pytest.raises((tn.errors.TrainingClientNotFoundError, tn.errors.ClientClosedError)):
        tc.forward_backward(BATCH).result(30)
    eventually(lambda: tc.status == "TERMINATED")
    with pytest.raises(tn.errors.ClientClosedError, match="Create a new one"):
        tc.forward_backward(BATCH)
    assert steps(service.create_training_client(lora_config=tn.LoRAConfig(rank=2))) == 1


@pytest.mark.parametrize("fate", ["loses its answer", "arrives twice", "is refused on the way back"])
def test_what_is_asked_for_once_is_done_once_whatever_becomes_of_the_answer(
    network: BadNetwork, service: tn.ServiceClient, serving: Serving, fate: str
) -> None:
    network.script = the_first("POST /api/v1/training_clients ", 1, fate)
    tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
    assert [info.training_client_id for info in service.list_training_clients()] == [tc.training_client_id]
    saved = tc.save_state(name="one").result()
    network.script = the_first("DELETE", 1, fate)
    service.delete_artifact(saved.artifact_id)
    assert service.list_artifacts() == []


def test_a_draw_whose_answer_was_lost_is_owed_once(network: BadNetwork, service: tn.ServiceClient) -> None:
    network.script = the_first("/draws", 1, "loses its answer")
    tc = service.create_training_client(
        lora_config=tn.LoRAConfig(rank=2), dp_config=tn.DPConfig(dataset_size=10, expected_batch_size=4)
    )
    channel: http_channel.HttpChannel = tc._channel  # type: ignore[assignment]
    numbers = [channel.enter_draw("row")[0] for _ in range(2)]
    assert numbers == [1, 2]


def test_the_first_word_of_a_server_is_waited_for_a_little_and_what_is_no_server_is_not(
    network: BadNetwork, serving: Serving
) -> None:
    token = serving.tokens.mint("me")
    network.script = the_first("/capabilities", 2, answer("502 Bad Gateway"))
    tn.ServiceClient(network.url, token).close()
    network.script = lambda request: answer("200 OK", "<html>hello")
    with pytest.raises(tn.errors.ServerConnectionError, match="no tensafe-nb server says"):
        tn.ServiceClient(network.url, token)
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(tn.errors.ServerConnectionError, match="Is it running"):
        tn.ServiceClient(nobody, token)


def test_a_reader_that_stops_reading_fills_no_memory_and_holds_up_nobody(
    serving: Serving, service: tn.ServiceClient, tc: tn.TrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "MOST_BEHIND", 50)
    token = serving.tokens.mint("me")
    port = int(serving.url.rsplit(":", 1)[1])
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        slow.connect(("127.0.0.1", port))
        path = f"/api/v1/training_clients/{tc.training_client_id}/stream"
        head = ["host: localhost", f"authorization: Bearer {token}", "connection: close"]
        slow.sendall("\r\n".join([f"GET {path} HTTP/1.1", *head, "", ""]).encode())
        assert slow.recv(10)
        name = tc.training_client_id
        (served,) = [one for one in serving.service.live_clients() if one.channel.training_client_id == name]
        eventually(lambda: len(served.lags) == 2)
        for _ in range(15):
            told = [core_of(tc).publish(alarm("x" * 20_000)) for _ in range(20)]
            eventually(lambda seq=told[-1].seq: tc.history.last_seq >= seq)  # type: ignore[misc]
        assert max(served.lags) == 50 and len(served.lags) == 2
        assert steps(tc) == 1  # its own reader, and the work, go on
        assert max(served.lags) == 50
        rest = b""
        while data := slow.recv(1 << 16):  # it reads on: what there was for it comes, then the end
            rest += data
        assert rest.count(b"\nid: ") < 300


def alarm(message: str) -> tn.events.Event:
    return tn.events.Alarm(run_id="run", step=1, name="test", level="amber", message=message, remedy="none")


def test_a_reader_that_takes_nothing_for_long_is_hung_up_on(
    serving: Serving, service: tn.ServiceClient, tc: tn.TrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "STALLED_SECONDS", 0.3)
    token = serving.tokens.mint("me")
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        slow.connect(("127.0.0.1", int(serving.url.rsplit(":", 1)[1])))
        path = f"/api/v1/training_clients/{tc.training_client_id}/stream"
        slow.sendall(
            f"GET {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {token}\r\n\r\n".encode()
        )
        assert slow.recv(10)
        name = tc.training_client_id
        (served,) = [one for one in serving.service.live_clients() if one.channel.training_client_id == name]
        for _ in range(300):
            core_of(tc).publish(alarm("x" * 20_000))
        eventually(lambda: len(served.lags) == 1)


def test_a_full_queue_raises_in_the_call_and_the_client_goes_on_when_there_is_room(
    network: BadNetwork, service: tn.ServiceClient, tc: tn.TrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    service._transport._requests.capabilities["limits"]["waiting_operations"] = 2  # type: ignore[attr-defined]
    held = tc.forward_backward(BATCH, loss_fn=gate.name)
    assert gate.reached.wait(20)
    eventually(lambda: held.state == "RUNNING")
    waiting = [tc.forward(BATCH), tc.forward(BATCH)]
    with pytest.raises(tn.errors.QueueFullError, match="Wait for some results"):
        tc.forward(BATCH)
    gate.opened.set()
    assert all(handle.result(30).loss > 0 for handle in waiting)
    assert steps(tc) == 1


def test_more_training_clients_than_allowed_and_a_rank_that_is_too_high_are_errors_of_the_call(
    tmp_path: Path,
) -> None:
    with (
        serving_thread(tmp_path / "server", limits=Limits(clients=1)) as serving,
        tn.ServiceClient(serving.url, serving.tokens.mint("ada")) as service,
    ):
        with pytest.raises(tn.ValidationError, match="rank is at most"):
            service.create_training_client(lora_config=tn.LoRAConfig(rank=1_000))
        tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
        with pytest.raises(tn.errors.QueueFullError, match=r"Close one: tc\.close\(\)"):
            service.create_training_client()
        with pytest.raises(tn.ValidationError, match=r"has the tokens 0 to 2047"):
            tc.forward_backward(tn.BatchData([[5, 90_000]])).result(60)
        tc.close()
        service.create_training_client(lora_config=tn.LoRAConfig(rank=2)).close()


def test_a_client_that_cannot_be_closed_says_so_where_it_lives_on_and_can_be_closed_later(
    network: BadNetwork, service: tn.ServiceClient, tc: tn.TrainingClient, impatient: None, serving: Serving
) -> None:
    name = tc.training_client_id
    network.script = lambda request: answer("502 Bad Gateway") if "DELETE" in request else None
    gate = Gate()
    waiting = tc.forward(BATCH, gate.name)
    assert gate.reached.wait(20)
    with pytest.raises(tn.errors.ServerConnectionError) as refused:
        tc.close()
    said = str(refused.value)
    assert f"{name} was not closed" in said and "run tc.close() again" in said
    assert f"service.get_training_client('{name}').close()" in said
    assert refused.value.details["training_client_id"] == name
    with pytest.raises(tn.errors.TGTinkerError):  # nothing at this end waits any more
        waiting.result(5)
    assert [info.training_client_id for info in service.list_training_clients()] == [name]
    network.script = lambda request: None
    gate.opened.set()
    tc.close()  # as the message says
    assert service.list_training_clients() == []
    tc.close()


def test_a_client_that_was_not_closed_is_closed_by_its_id_from_elsewhere(
    network: BadNetwork, service: tn.ServiceClient, tc: tn.TrainingClient, impatient: None, serving: Serving
) -> None:
    network.script = lambda request: answer("502 Bad Gateway") if "DELETE" in request else None
    with pytest.raises(tn.errors.ServerConnectionError, match="lives on"), tc:
        pass
    network.script = lambda request: None
    service.get_training_client(tc.training_client_id).close()
    assert service.list_training_clients() == []
    tc.close()  # it has ended: nothing is left to say


def test_a_token_that_was_taken_away_meanwhile_is_what_closing_fails_with(
    network: BadNetwork, service: tn.ServiceClient, tc: tn.TrainingClient, serving: Serving
) -> None:
    network.script = lambda request: (
        refusal("401 Unauthorized", "unauthorized") if "DELETE" in request else None
    )
    with pytest.raises(tn.errors.AuthenticationError, match=r"was not closed: .*run tc\.close\(\) again"):
        tc.close()


def test_closing_waits_for_a_server_that_is_restarted_says_so_and_can_be_interrupted(
    network: BadNetwork,
    service: tn.ServiceClient,
    tc: tn.TrainingClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    serving: Serving,
) -> None:
    monkeypatch.setattr(http_channel, "DRAINING", 0.3)
    be_patient(service, 60.0)

    def script(request: str) -> bytes | None:
        if "DELETE" not in request or network.script is not script:
            return None
        if "is not closed yet" in caplog.text:  # nothing has answered for longer than `DRAINING`
            _thread.interrupt_main()
        return answer("502 Bad Gateway")

    network.script = script
    with pytest.raises(KeyboardInterrupt):
        tc.close()
    assert "is not closed yet, and is asked for until 60 s are over" in caplog.text
    network.script = lambda request: None
    assert steps(tc) == 1  # the waiting was interrupted, and nothing else
    tc.close()
    assert service.list_training_clients() == []
