"""The line to a server: what a notebook sees of a bad network, a restart, a proxy; and nothing is left behind."""

import gc
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

import tensafe_nb as tn
from tensafe_nb import client
from tensafe_nb.events import Event, LineChanged, RunState
from tensafe_nb.history.log import RunHistory
from tensafe_nb.transports import http, http_channel
from tests.parity.serving import Serving, eventually, serving_thread

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


@pytest.fixture(autouse=True)
def _nothing_left(serving: Serving) -> Iterator[None]:
    yield
    serving.end()


@pytest.fixture
def service(serving: Serving) -> Iterator[tn.ServiceClient]:
    with tn.ServiceClient(serving.url, serving.tokens.mint("me")) as service:
        yield service


class Proxy:
    """A proxy on a thread that passes bytes on, but for what it holds back or cuts off.

    Args:
        url: Of the server.
        holds_streams: It keeps every stream to itself until it has ended.
        cuts_after: The first answer that has more bytes is cut off there.
    """

    def __init__(self, url: str, *, holds_streams: bool = False, cuts_after: int | None = None) -> None:
        self._target = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        self._holds, self._cuts_after, self._lines = holds_streams, cuts_after, []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.asked: list[bytes] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            self._lines += [near, far]
            threading.Thread(target=self._up, args=(near, far), daemon=True).start()
            threading.Thread(target=self._down, args=(far, near), daemon=True).start()

    def _up(self, near: socket.socket, far: socket.socket) -> None:
        with suppress(OSError):
            while data := near.recv(1 << 16):
                self.asked.append(data.split(b"\r\n", 1)[0])
                far.sendall(data)
        self._end(far, near)

    def _down(self, far: socket.socket, near: socket.socket) -> None:
        held, passed = False, 0
        with suppress(OSError):
            while data := far.recv(1 << 16):
                held = held or (self._holds and b"text/event-stream" in data)
                passed += len(data)
                if self._cuts_after is not None and passed > self._cuts_after:
                    self._cuts_after = None
                    break
                if not held:
                    near.sendall(data)
        self._end(far, near)

    def _end(self, *lines: socket.socket) -> None:
        for line in lines:
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
            line.close()

    def cut(self) -> None:
        """Cut every connection that there is."""
        lines, self._lines = self._lines, []
        self._end(*lines)

    def close(self) -> None:
        self._end(self._listening)
        self.cut()


def lines_of(tc: tn.TrainingClient) -> list[str]:
    """Return what is told of the line from now on."""
    told: list[str] = []

    def hear(event: Event) -> None:
        if isinstance(event, LineChanged):
            told.append(event.state)

    tc.subscribe(hear)
    return told


def test_a_tokenizer_that_two_fetch_at_a_time_is_there_for_both(
    service: tn.ServiceClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract = http.extract

    def after_another(archive: Path, folder: Path) -> None:
        extract(archive, folder)
        extract(archive, folder)

    monkeypatch.setattr(http, "extract", after_another)
    tc = service.create_training_client(model_ref="builtin:tiny")
    assert tc.tokenizer.decode(tc.tokenizer("def f")["input_ids"]) == "def f"
    assert len(list((tmp_path / "home" / "tokenizers").iterdir())) == 1


def test_behind_a_proxy_that_holds_streams_back_items_are_asked_for(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_channel, "FIRST_SIGN", 0.5)
    proxy = Proxy(serving.url, holds_streams=True)
    with tn.ServiceClient(proxy.url, serving.tokens.mint("held")) as service:
        tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
        run = tc.fit([BATCH], steps=3, show=False)
        assert run.result().steps == 3 == len(tc.history["loss"])
        assert any(b"/poll?" in line for line in proxy.asked)
        tc.close()
        assert tc.status == "TERMINATED"
    proxy.close()


def test_a_line_that_is_cut_again_and_again_loses_nothing_and_nothing_runs_twice(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_channel, "BLIP", 0.0)
    proxy = Proxy(serving.url)
    with tn.ServiceClient(proxy.url, serving.tokens.mint("cut")) as service:
        tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
        tc.ready().result()
        seen: list[int] = []
        told = lines_of(tc)
        tc.subscribe(
            lambda event: None if isinstance(event, LineChanged) else seen.append(event.seq), after=0
        )
        handles = []
        for number in range(30):
            handles += [tc.forward_backward(BATCH), tc.optim_step()]
            if number % 6 == 0:
                proxy.cut()
        assert [handle.result().step for handle in handles[1::2]] == list(range(1, 31))
        assert seen == sorted(set(seen))
        recorded = [event.seq for event in tc.history.events()]
        assert recorded == sorted(set(recorded)) and len(tc.history["loss"]) == 30
        assert (told[0], told[-1]) == ("RECONNECTING", "OPEN") and tc.history.state.line is None
        tc.close()
    proxy.close()


def test_a_line_that_is_there_again_before_a_blip_is_over_is_not_said_to_have_broken_off(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_channel, "BLIP", 1e6)  # whatever comes, it comes before
    proxy = Proxy(serving.url)
    with tn.ServiceClient(proxy.url, serving.tokens.mint("blip")) as service:
        tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
        tc.ready().result()
        told, channel = lines_of(tc), tc._channel
        assert isinstance(channel, http_channel.HttpChannel)
        proxy.cut()
        eventually(lambda: channel._blip is not None)
        tc.forward_backward(BATCH).result()
        eventually(lambda: channel._blip is None)
        assert told == [] and tc.history.state.line is None
        tc.close()
    proxy.close()


def test_a_download_that_is_cut_off_goes_on_where_it_ended(serving: Serving, tmp_path: Path) -> None:
    with tn.ServiceClient(serving.url, serving.tokens.mint("files")) as direct:
        saved = direct.create_training_client(optimizer={"name": "sgd"}).save_state().result()
        whole = direct.pull_artifact(saved.artifact_id)
    proxy = Proxy(serving.url, cuts_after=len(whole) // 2)
    with tn.ServiceClient(proxy.url, serving.tokens.mint("files")) as service:
        path = service.pull_artifact(saved.artifact_id, to=tmp_path / "state")
        assert path.read_bytes() == whole
        assert sum(b"/content" in line for line in proxy.asked) == 2
        assert [found.name for found in tmp_path.glob("*state*")] == ["state"]
        with pytest.raises(tn.errors.ArtifactNotFoundError):
            service.pull_artifact("none", to=tmp_path / "none")
        assert not list(tmp_path.glob("*none*"))
        assert service.export_adapter(saved.artifact_id, tmp_path / "plain", merged=True).is_dir()
        service.delete_artifact(saved.artifact_id)
        assert service.push_artifact(path) == saved
    proxy.close()


def test_when_nothing_answers_any_more_what_waits_fails_in_the_end(
    serving: Serving,
) -> None:
    proxy = Proxy(serving.url)
    with tn.ServiceClient(proxy.url, serving.tokens.mint("gone"), patience=0.5) as service:
        tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
        tc.ready().result()
        told = lines_of(tc)
        proxy.close()
        handle = tc.forward_backward(BATCH)
        with pytest.raises(tn.errors.ServerConnectionError, match="does not answer"):
            handle.result(20)
        eventually(lambda: told == ["LOST"])  # the patience was shorter than a blip
        line = tc.history.state.line
        assert line is not None and "does not answer" in (line.reason or "")


def test_no_thread_is_left_after_a_service_is_closed(serving: Serving) -> None:
    before = set(threading.enumerate())
    service = tn.ServiceClient(serving.url, serving.tokens.mint("me"))
    tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
    tc.fit([BATCH], steps=2, show=False).result()
    service.close()
    mine = [thread for thread in set(threading.enumerate()) - before if "http" in thread.name]
    assert mine == []


def test_a_service_that_nobody_holds_ends_its_thread(serving: Serving) -> None:
    service = tn.ServiceClient(serving.url, serving.tokens.mint("me"))
    name = service._transport._requests.io.thread.name  # type: ignore[attr-defined]
    del service
    gc.collect()
    assert name not in [thread.name for thread in threading.enumerate()]


def test_a_client_that_is_let_go_is_freed_and_lives_on_at_the_server(
    serving: Serving, service: tn.ServiceClient
) -> None:
    tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
    tc.forward_backward(BATCH), tc.optim_step().result()
    name, channel, client = tc.training_client_id, weakref.ref(tc._channel), weakref.ref(tc)
    del tc

    def freed() -> bool:
        gc.collect()
        return client() is None and channel() is None

    eventually(freed)
    tasks = service._transport._requests.io.loop  # type: ignore[attr-defined]
    eventually(lambda: waiting_tasks(tasks) == 0)
    again = service.get_training_client(name)
    assert again.step == 1 and len(again.history["loss"]) == 1
    again.forward_backward(BATCH)
    assert again.optim_step().result().step == 2


def waiting_tasks(loop: object) -> int:
    import asyncio

    return len(asyncio.all_tasks(loop))  # type: ignore[arg-type]


def test_what_a_client_had_to_send_is_sent_though_it_is_let_go(
    serving: Serving, service: tn.ServiceClient
) -> None:
    tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
    tc.save_state(name="last words")
    del tc
    gc.collect()
    eventually(lambda: [artifact.name for artifact in service.list_artifacts()] == ["last words"])


def test_another_kernel_attaches_with_the_history_and_both_go_on(serving: Serving, tmp_path: Path) -> None:
    token = serving.tokens.mint("two")
    with tn.ServiceClient(serving.url, token) as first:
        tc = first.create_training_client(lora_config=tn.LoRAConfig(rank=2))
        tc.fit([BATCH], steps=3, show=False).result()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TENSAFE_HOME", str(tmp_path / "another machine"))
            with tn.ServiceClient(serving.url, token) as second:
                same = second.get_training_client(tc.training_client_id)
                eventually(lambda: len(same.history["loss"]) == 3)
                assert same.config == tc.config
                same.forward_backward(BATCH)
                assert same.optim_step().result().step == 4
        eventually(lambda: tc.step == 4)  # its server told this kernel, too
        assert len(tc.history["loss"]) == 4
        tc.close()
        with pytest.raises(tn.TrainingClientNotFoundError):
            first.get_training_client("tc-none")


def test_a_run_of_another_kernel_is_not_mixed_with_and_one_that_fell_silent_is_said_to_have_ended(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = serving.tokens.mint("two")
    with tn.ServiceClient(serving.url, token) as first:
        tc = first.create_training_client(lora_config=tn.LoRAConfig(rank=2))
        run = tc.fit([BATCH], steps=1_000, show=False)
        run.pause()
        eventually(lambda: run.state == "PAUSED" and tc.status == "READY")
        monkeypatch.setenv("TENSAFE_HOME", str(tmp_path / "another"))
        with tn.ServiceClient(serving.url, token) as second:
            twin = second.get_training_client(tc.training_client_id)
            eventually(lambda: twin.history.state.latest_run is not None)
            eventually(lambda: twin.history.state.queue.depth == 0)
            with pytest.raises(tn.ValidationError, match=r"of another client .* is under way \(PAUSED, step"):
                twin.fit([BATCH], steps=2, show=False)
            assert twin.fork().fit([BATCH], steps=1, show=False).result().steps == 1
            monkeypatch.setattr(client, "SILENT_SECONDS", 0.0)
            mine = twin.fit([BATCH], steps=2, show=False)
            assert mine.result().state == "FINISHED"
            done, stood_at = run.steps_done, twin.step
            taken_over = run.result(20)  # by itself, as soon as it hears of it
            assert (taken_over.state, taken_over.steps_done) == ("INTERRUPTED", done)
            assert "another client started a run" in (taken_over.reason or "")
            for go_on in (run.resume, run.step):
                with pytest.raises(
                    tn.ValidationError, match=r"was interrupted at step .*takes no step any more"
                ):
                    go_on()
            assert tc.forward(BATCH).result() and tc.step == stood_at
            told = twin.history.state.runs
            assert [str(told[one].state) for one in (run.run_id, mine.run_id)] == ["INTERRUPTED", "FINISHED"]
            assert "another client started a run" in (told[run.run_id].reason or "")
        run.stop()


def test_a_run_that_is_resumed_before_it_hears_that_it_was_taken_over_takes_no_step(
    serving: Serving,
) -> None:
    with tn.ServiceClient(serving.url, serving.tokens.mint("deaf")) as service:
        tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
        run = tc.fit([BATCH], steps=1_000, show=False)
        run.pause()
        eventually(lambda: run.state == "PAUSED" and tc.status == "READY")
        stood_at = tc.step
        end = RunState(run_id=run.run_id, state="INTERRUPTED", step=stood_at, reason="another went on")
        with run._changed:  # told in one breath: the log lists the end first
            tc.publish(end)
            run.resume()
        assert run.result(20).state == "INTERRUPTED"
        assert tc.forward(BATCH).result() and tc.step == stood_at
        assert str(tc.history.state.runs[run.run_id].state) == "INTERRUPTED"


def test_of_two_kernels_that_start_a_run_in_the_same_instant_the_one_that_the_log_lists_first_trains(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = serving.tokens.mint("instant")
    both_have_looked = threading.Barrier(2)
    make_way = tn.TrainingClient._make_way

    def look_together(self: tn.TrainingClient) -> None:
        make_way(self)
        both_have_looked.wait(60)

    monkeypatch.setattr(tn.TrainingClient, "_make_way", look_together)
    with tn.ServiceClient(serving.url, token) as first:
        tc = first.create_training_client(lora_config=tn.LoRAConfig(rank=2))
        tc.ready().result()
        monkeypatch.setenv("TENSAFE_HOME", str(tmp_path / "another"))
        with tn.ServiceClient(serving.url, token) as second, ThreadPoolExecutor(2) as pool:
            twins = [tc, second.get_training_client(tc.training_client_id)]
            begun = [pool.submit(twin.fit, [BATCH], steps=3, show=False) for twin in twins]
            refused = [one.exception(60) for one in begun]
            assert sorted(str(error)[:14] for error in refused) == ["Another client", "None"]
            run = next(one.result() for one in begun if one.exception() is None)
            assert run.result(60).state == "FINISHED"
            assert len(run.history.state.runs) == 1 and tc.refresh().step == 3


def test_two_kernels_of_one_home_write_one_log_one_at_a_time(serving: Serving) -> None:
    token = serving.tokens.mint("home")
    with tn.ServiceClient(serving.url, token) as second:
        with tn.ServiceClient(serving.url, token) as first:
            tc = first.create_training_client(lora_config=tn.LoRAConfig(rank=2))
            same = second.get_training_client(tc.training_client_id)
            for client in (tc, same, tc):
                client.forward_backward(BATCH), client.optim_step().result()
            eventually(lambda: len(same.history["loss"]) == 3)
        same.forward_backward(BATCH), same.optim_step().result()  # the first kernel has left
        same.sync_events()
        recorded = [event.seq for event in same.history.events()]
        assert recorded == list(range(1, len(recorded) + 1))
        assert len(RunHistory.load(same.history.path)["loss"]) == 4
        same.close()


def test_asking_the_server_in_a_callback_raises_instead_of_hanging(service: tn.ServiceClient) -> None:
    tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
    raised: list[BaseException] = []
    asked = threading.Event()

    def ask(_: object) -> None:
        try:
            tc.forward(BATCH).result()
        except tn.ValidationError as error:
            raised.append(error)
        try:
            service.list_artifacts()
        except tn.ValidationError as error:
            raised.append(error)
        asked.set()

    tc.forward(BATCH).add_done_callback(ask)
    assert asked.wait(20) and len(raised) == 2 and "for ever" in str(raised[0]) + str(raised[1])


def test_operations_arrive_in_order_whatever_is_cancelled_meanwhile(service: tn.ServiceClient) -> None:
    import random

    chance = random.Random(0)
    tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
    handles = []
    for _ in range(100):
        handles += [tc.forward_backward(BATCH), tc.optim_step()]
        if chance.random() < 0.2:
            chance.choice(handles[-6:]).cancel()
    steps = [handle.result().step for handle in handles[1::2] if handle.exception() is None]
    assert steps == list(range(1, len(steps) + 1)) and 50 < len(steps) < 100
    for forward_backward, step in zip(handles[::2], handles[1::2], strict=True):
        if forward_backward.state == "CANCELLED" and step.state != "CANCELLED":
            assert isinstance(step.exception(), tn.FutureFailedError)
    assert tc.refresh().queue_depth == 0 and tc.step == len(steps)


def test_an_event_arrives_soon(service: tn.ServiceClient) -> None:
    tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
    tc.ready().result()
    delays: list[float] = []
    tc.subscribe(lambda event: delays.append(time.time() - event.time))
    for _ in range(20):
        tc.forward(BATCH).result()
    assert sorted(delays)[len(delays) // 2] < 0.5  # 2 ms on a quiet machine
