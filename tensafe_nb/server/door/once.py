"""Requests that bear a name: each is carried out once, and a repeat gets the first answer, after a restart, too.

A client sends a request again where the answer was lost on its way, and cannot know whether it was done. Whoever was
killed in between cannot either, unless it was written down: so what is about to be done is noted before, and the answer
after, before it is sent. A repeat that finds the answer gets it. One that finds the note alone gets on with it: the
route is told what was noted, and does what is left to do.

Operations, what runs tell, and draws have their places in the journals of their training clients: see `journal.py`. The
connections of encrypted adapters end with the process, and so do the answers about them.
"""

import asyncio
import hashlib
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from tensafe_nb.errors import DecryptionError, StorageError
from tensafe_nb.store.disk import Files, make_folder
from tensafe_nb.store.keys.keyring import Keys
from tensafe_nb.store.sealed.log import SealedLog

logger = logging.getLogger(__name__)

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]

MOST_KEPT, MOST_KEPT_BYTES = 4_096, 1 << 16  # answers in memory, and how large one may be
KEPT_SECONDS = 3_600.0  # for which an answer outlives its process: longer than anybody sends a request again
MOST_RECORDS, MOST_BYTES = 2_000, 4 << 20  # of a file; a tenant has two


def is_lasting(path: str, headers: Mapping[str, str]) -> bool:
    """Whether the answer to a request is to outlive the process."""
    return "x-number" not in headers and not path.endswith("/draws") and "/encrypted" not in path


@dataclass(slots=True)
class Asked:
    """A request that bears a name, as its route sees it.

    Attributes:
        name: Its name: the same for every try.
        noted: What a try in an earlier process had noted before it was cut off; None where there was none.
        note: Notes something before the route does what cannot be undone.
    """

    name: str
    noted: Mapping[str, Any] | None = None
    note: Callable[[Mapping[str, Any]], None] = lambda noted: None


@dataclass(slots=True)
class Written:
    """What is written down of a request: what was noted, and where its answer is."""

    at: float
    log: SealedLog  # in which its last record is
    noted: dict[str, Any] = field(default_factory=dict)
    answer: int | None = None


class Answers:
    """What one tenant's requests were answered with, sealed, for the process to come. From any thread.

    A full disk keeps nothing, and nobody from anything: what is to be deleted, for instance.

    Args:
        folder: Where they are kept; made when the first is.
        keys: Seal them.
        files: How the disk is touched.
    """

    def __init__(self, folder: Path, keys: Keys, files: Files | None = None) -> None:
        self._folder, self._keys, self._files = folder, keys, files or Files()
        self._lock = threading.RLock()
        self._logs: list[SealedLog] = []  # the older one, and the one that is written
        self._known: dict[str, Written] = {}
        self._is_read = self._dirty = False

    def recall(self, name: str) -> tuple[Written | None, list[Message] | None]:
        """Return what is known of a request, and its answer if it has one."""
        with self._lock:
            self._read()
            known = self._known.get(name)
            if known is None or time.time() - known.at > KEPT_SECONDS:
                return None, None
            if known.answer is None:
                return known, None
            content = known.log[known.answer]
        head, body = unpacked(content)
        begin: Message = {
            "type": "http.response.start",
            "status": head["status"],
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in head["headers"]],
        }
        return known, [begin, {"type": "http.response.body", "body": body}]

    def begun(self, name: str) -> None:
        """Write down that a request is about to be carried out."""
        self._write({"name": name, "at": time.time(), "noted": {}})

    def note(self, name: str, noted: Mapping[str, Any]) -> None:
        """Write down what whoever does it again has to know."""
        self._write({"name": name, "at": time.time(), "noted": dict(noted)})

    def answered(self, name: str, said: list[Message]) -> None:
        """Write down an answer, before anybody gets it."""
        headers = [(key.decode("latin-1"), value.decode("latin-1")) for key, value in said[0]["headers"]]
        body = b"".join(message.get("body", b"") for message in said)
        self._write({"name": name, "at": time.time(), "status": said[0]["status"], "headers": headers}, body)

    def renew(self) -> None:
        """Seal what is kept with the present key: nothing needs the one before it any more."""
        with self._lock:
            self._read()
            old, self._logs = self._logs, []
            kept = [(log, number) for log in old for number in range(len(log))]
            self._known.clear()
            try:
                for log, number in kept:
                    head, body = unpacked(log[number])
                    if time.time() - head["at"] <= KEPT_SECONDS:
                        self._append(head, body, past=old)
            except (StorageError, DecryptionError) as error:
                logger.error("answers to requests that may be repeated are lost: %s", error)
            for log in old:
                log.remove()

    def sync(self) -> None:
        """Put everything on the disk."""
        with self._lock:
            if self._dirty and self._logs:
                self._dirty = False
                self._logs[-1].sync()

    def close(self) -> None:
        """Let go of the files; what comes after this is read anew."""
        with self._lock:
            for log in self._logs:
                log.close()
            self._logs, self._is_read = [], False
            self._known.clear()

    def _read(self) -> None:
        if self._is_read:
            return
        self._is_read, paths = True, sorted(self._folder.glob("answers-*.tsnj"))
        for path in paths[:-2]:
            path.unlink()
        try:
            for path in paths[-2:]:
                log = SealedLog(path, self._keys, files=self._files)
                contents, log.found = log.found, []
                self._logs.append(log)
                for number, content in enumerate(contents):
                    self._take(unpacked(content)[0], log, number)
        except DecryptionError as error:  # altered, or the key was forgotten since
            logger.error(
                "answers to requests that may be repeated cannot be read, and are given up: %s", error
            )
            self.close()
            self._is_read = True
            for path in paths:
                path.unlink(missing_ok=True)
        if self._logs and self._logs[-1].key_id != self._keys.primary_id():
            self.renew()

    def _take(self, head: Mapping[str, Any], log: SealedLog, number: int) -> None:
        known = self._known.setdefault(head["name"], Written(head["at"], log))
        known.at, known.log = head["at"], log
        if "status" in head:
            known.answer = number
        else:
            known.noted |= head["noted"]

    def _write(self, head: Mapping[str, Any], body: bytes = b"") -> None:
        with self._lock:
            try:
                self._read()
                self._append(head, body)
            except StorageError as error:
                logger.error("a request is not known to a process to come, should it be repeated: %s", error)

    def _append(self, head: Mapping[str, Any], body: bytes, past: "list[SealedLog] | None" = None) -> None:
        if not self._logs or len(self._logs[-1]) >= MOST_RECORDS or self._logs[-1].size >= MOST_BYTES:
            make_folder(self._files, self._folder)
            last = [*(past or []), *self._logs]
            number = 1 + (int(last[-1].path.stem.rpartition("-")[2]) if last else 0)
            path = self._folder / f"answers-{number:08}.tsnj"
            self._logs.append(SealedLog(path, self._keys, {"version": 1}, self._files))
        log = self._logs[-1]
        self._take(head, log, log.append(packed_record(head, body)))
        self._dirty = True
        if len(self._logs) > 2:
            gone = self._logs.pop(0)
            self._known = {name: known for name, known in self._known.items() if known.log is not gone}
            gone.remove()


def packed_record(head: Mapping[str, Any], body: bytes) -> bytes:
    """Return a record: its JSON on a line of its own, and bytes as they were sent."""
    return json.dumps(head, allow_nan=False, separators=(",", ":")).encode() + b"\n" + body


def unpacked(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Read what `packed_record` made."""
    head, _, body = content.partition(b"\n")
    return json.loads(head), body


class Once:
    """Carries out requests that bear a name once each; see above. What failed is not kept, but tried again.

    Args:
        app: Carries them out.
        answers_of: Returns what is kept of a tenant's; None keeps it in memory alone.
    """

    def __init__(self, app: App, answers_of: "Callable[[str], Answers] | None" = None) -> None:
        self._app, self._answers_of = app, answers_of
        self._answers: OrderedDict[tuple[str, str], asyncio.Future[list[Message]]] = OrderedDict()

    async def answer(
        self, tenant: str, name: str, scope: Message, receive: Receive, send: Send, *, lasting: bool
    ) -> None:
        """Answer a request: carry it out, or wait for whoever does.

        Args:
            tenant: Whose it is.
            name: As its client named it.
            scope: Of the request, as are the next two.
            receive: Reads it.
            send: Answers it.
            lasting: Let its answer outlive the process; a journal does not.
        """
        name = hashlib.sha256(f"{scope['method']} {scope['path']} {name}".encode()).hexdigest()[:32]
        place = tenant, name
        while place in self._answers:
            known = self._answers[place]
            await asyncio.wait([known])
            if not known.cancelled():  # else that try failed, and this one does it
                await sent(known.result(), send)
                return
        coming = self._answers[place] = asyncio.get_running_loop().create_future()
        asked = scope["state"]["asked"] = Asked(name)
        answers = self._answers_of(tenant) if self._answers_of is not None and lasting else None
        said: list[Message] = []
        whole: list[Message] | None = None
        is_kept = True

        async def keep(message: Message) -> None:
            nonlocal whole, is_kept
            if not is_kept:
                await send(message)
                return
            said.append(dict(message))
            if said[0]["status"] >= 400 or sum(len(one.get("body", b"")) for one in said) > MOST_KEPT_BYTES:
                is_kept = False
                await sent(said, send)
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                if answers is not None:
                    answers.answered(name, said)
                whole = said
                await sent(said, send)

        try:
            if answers is not None:
                earlier, found = await asyncio.to_thread(answers.recall, name)
                if found is not None:
                    whole = found
                    await sent(found, send)
                    return
                asked.noted = None if earlier is None else earlier.noted
                asked.note = lambda noted: answers.note(name, noted)
                if earlier is None:
                    answers.begun(name)
            await self._app(scope, receive, keep)
        finally:
            if whole is not None:
                coming.set_result(whole)
            else:
                coming.cancel()
                del self._answers[place]
            while len(self._answers) > MOST_KEPT and next(iter(self._answers.values())).done():
                self._answers.popitem(last=False)


async def sent(messages: list[Message], send: Send) -> None:
    """Send an answer."""
    for message in messages:
        await send(dict(message))
