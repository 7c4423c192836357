"""A server on a thread of the test process, and what lies in the cores behind both transports."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensafe_nb as tn
from tensafe_nb.core.worker import Worker
from tensafe_nb.losses import register_loss

HUB_MODEL = "some-org/some-model"  # offered, and not to be had


@dataclass
class Serving:
    """A server that runs."""

    url: str
    home: Path
    tokens: Any
    service: Any
    stop: Callable[[], None]

    def end(self) -> None:
        """Close the training clients and the samplers that a test has left behind."""
        for client in self.service.live_clients():
            client.channel.close()
        for tenant in self.service._tenants.values():
            tenant.transport.samplers.put_away(-1)


_running: list[Serving] = []


@contextlib.contextmanager
def serving_thread(
    home: Path, offer: Callable[[Any], None] = lambda app: None, **options: Any
) -> Iterator[Serving]:
    """Run a server; `offer` adds to its application."""
    from tensafe_nb.server.app import create_app
    from tensafe_nb.server.door.tokens import Tokens
    from tensafe_nb.server.process import server_of
    from tensafe_nb.store.home import Home

    tokens = Tokens()
    # models are offered by their names in the folder that the process is in: a test's own
    app = create_app(Home(home), tokens, **{"models": Path(), "hub_models": [HUB_MODEL], **options})
    offer(app)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = server_of(app, seconds_to_stop=5)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="server")
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"

        def stop() -> None:
            server.should_exit = True
            thread.join()

        serving = Serving(url, home, tokens, app.state.service, stop)
        _running.append(serving)
        try:
            yield serving
        finally:
            _running.remove(serving)
            stop()


def core_of(tc: tn.TrainingClient) -> Worker:
    """Return the core of a training client, in this process or behind the server."""
    channel: Any = tc._channel
    if isinstance(channel, Worker):
        return channel
    name = tc.training_client_id
    for serving in _running:
        for tenant in serving.service._tenants.values():
            if name in tenant.clients:
                core: Worker = tenant.clients[name].channel
                return core
    raise LookupError(name)


def engine_of(tc: tn.TrainingClient) -> Any:
    """Return the engine of a training client whose model is loaded."""
    executor = core_of(tc)._executor
    assert executor is not None
    return executor.engine


def eventually(so: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until something is so, at the latest after some seconds."""
    end = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < end
        time.sleep(0.005)


def registered(name: str, function: Any) -> str:
    """Register a loss, which both cores then know, and return its name."""
    register_loss(name, overwrite=True)(function)
    return name


class Gate:
    """A loss that waits until it is opened: holds the lane at a known place."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.name = registered("gate", lambda outputs, batch: self(outputs))

    def __call__(self, outputs: Any) -> Any:
        self.reached.set()
        assert self.opened.wait()
        return outputs.logits.mean()
