"""A server in a process of its own that is killed as `kill -9` kills, and begun again on the same home folder.

Its process is forked from one that has imported everything: it begins within a moment, and is a process as any other.
"""

import contextlib
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

import tensafe_nb as tn
from tensafe_nb.events import UNRECORDED

ROOT = Path(__file__).parents[2]


class Nursery:
    """Begins servers within a moment; see `tests.faults.nursery`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.nursery"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **command: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()


@dataclass
class KilledServer:
    """A server that can be killed.

    Attributes:
        nursery: Where it is begun.
        home: Its home folder.
        options: Further ones of `tensafe-nb serve`.
        bounds: Of its automatic checkpoints; names of `server.journal`.
        seconds: How long each beginning took, until it was ready.
    """

    nursery: Nursery
    home: Path
    options: list[str] = field(default_factory=list)
    bounds: dict[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    process: int = 0

    def __post_init__(self) -> None:
        from tensafe_nb.server.door.tokens import Tokens

        self.tokens = self.home / "tokens"
        self.home.mkdir(parents=True, exist_ok=True)
        self.token = Tokens(self.tokens).mint()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def begin(self) -> None:
        """Begin, and return when it is ready."""
        arguments = ["--port", str(self.port), "--home", str(self.home), "--tokens", str(self.tokens)]
        began = time.monotonic()
        self.process = self.nursery.ask(serve=arguments + self.options, bounds=self.bounds)
        with httpx.Client(verify=False) as http:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if http.get(f"{self.url}/ready").status_code == 200:
                        break
                assert not self.nursery.ask(ended=self.process), "the server ended by itself"
                time.sleep(0.01)
        self.seconds.append(time.monotonic() - began)

    def kill(self) -> None:
        """End it as a power cut of its process alone would."""
        self.nursery.ask(kill=self.process)

    def begin_again(self) -> None:
        self.kill()
        self.begin()


@contextlib.contextmanager
def killed_server(nursery: Nursery, home: Path, **options: Any) -> Iterator[KilledServer]:
    """Run a server that can be killed."""
    server = KilledServer(nursery, home, **options)
    server.begin()
    try:
        yield server
    finally:
        server.kill()


class Killer:
    """Kills a server at moments of its own choosing, as long as the block lasts.

    A moment is some events and some milliseconds after the last kill: so it falls anywhere, and the work goes on
    however slow the machine is.

    Args:
        server: Whom.
        tc: Whose events are counted.
        seed: Decides when.
        most: Kills.
    """

    def __init__(self, server: KilledServer, tc: tn.TrainingClient, seed: int, most: int = 1_000) -> None:
        self._server, self._tc, self._random, self._most = server, tc, random.Random(seed), most
        self._seen, self._over = threading.Semaphore(0), threading.Event()
        self._thread = threading.Thread(target=self._run, name="killer")
        self.kills = 0

    def _run(self) -> None:
        while self.kills < self._most:
            for _ in range(self._random.randint(1, 25)):
                self._seen.acquire()
            if self._over.wait(self._random.uniform(0.0, 0.05)):
                return
            self._server.begin_again()
            self.kills += 1

    def __enter__(self) -> "Killer":
        # of what is not recorded there may be more than 25 in one operation: then it would never end
        self._forget = self._tc.subscribe(
            lambda event: None if isinstance(event, UNRECORDED) else self._seen.release()
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._forget()
        self._seen.release(25)
        self._thread.join()
