"""The line to a server: operations go out in order, events and outcomes come back on one stream per training client.

All of it runs on one thread of its own, so that a notebook's cells neither block nor are needed for it. Nothing here
needs torch. The routes are in `server/`.
"""

import asyncio
import shutil
import tarfile
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from tensafe_nb.config import TrainingConfig
from tensafe_nb.display import as_given
from tensafe_nb.errors import (
    ArtifactNotFoundError,
    ServerConnectionError,
    StorageError,
    TrainingClientNotFoundError,
    ValidationError,
)
from tensafe_nb.futures import FutureHandle
from tensafe_nb.protocol import wire
from tensafe_nb.protocol.codec import decode, encode
from tensafe_nb.protocol.operations import SampleFrom
from tensafe_nb.protocol.results import (
    AuditLogEntry,
    AuditVerification,
    ClientStatus,
    SampleResult,
    SaveStateResult,
    StateSource,
    TrainingClientInfo,
)
from tensafe_nb.store.home import Home
from tensafe_nb.transports.base import Channel
from tensafe_nb.transports.http_channel import HttpChannel
from tensafe_nb.transports.http_requests import PATIENCE, Requests, check_answer, is_servers, quoted

CHUNK = 1 << 20  # bytes of a file that are read or written at a time


class HttpTransport:
    """Training clients and artifacts of a server.

    Args:
        base_url: Of the server, such as "http://127.0.0.1:8000".
        api_key: The bearer token; it is sent to this server only.
        home: Where the mirrors of its training clients' event logs are kept.
        patience: Seconds without an answer until what waits fails.

    Raises:
        ServerConnectionError: Nothing answers there.
        AuthenticationError: It takes no such token.
    """

    def __init__(self, base_url: str, api_key: str | None, home: Home, patience: float = PATIENCE) -> None:
        self._home = home
        self._channels: weakref.WeakValueDictionary[str, HttpChannel] = weakref.WeakValueDictionary()
        self._requests = Requests(base_url, api_key, patience)
        weakref.finalize(self, self._requests.close)

    # training clients

    def create(self, config: TrainingConfig, source: StateSource | None = None) -> Channel:
        # the key tells a repetition, where the answer was lost on its way, from a second client
        body = {"config": encode(config), "source": encode(source), "key": uuid.uuid4().hex}
        return self._channel(self._requests.call("POST", "/training_clients", json=body).json())

    def attach(self, training_client_id: str) -> Channel:
        known = self._channels.get(training_client_id)
        if known is not None and known.attach():
            return known
        made = self._requests.get(f"/training_clients/{quoted(training_client_id)}")
        if made["info"]["status"] == ClientStatus.TERMINATED:
            raise TrainingClientNotFoundError(f"The training client {training_client_id!r} is closed.")
        return self._channel(made)

    def _channel(self, made: Mapping[str, Any]) -> HttpChannel:
        info, config = decode(made["info"], TrainingClientInfo), decode(made["config"], TrainingConfig)
        channel = HttpChannel(self._requests, info, config, self._home)
        self._channels[channel.training_client_id] = channel
        return channel

    def list_training_clients(self) -> list[TrainingClientInfo]:
        if self._requests.closed:
            return []
        return [decode(info, TrainingClientInfo) for info in self._requests.get("/training_clients")]

    # artifacts

    def sample(self, request: SampleFrom) -> FutureHandle[SampleResult]:
        media_type, body = wire.pack(request)
        made = self._requests.call(
            "POST", "/samples", content=lambda: body, headers={"content-type": media_type}
        ).json()
        return self._requests.follow(made["future_id"], request.sample.verb, made["weights"], SampleResult)

    def list_artifacts(self, training_client_id: str | None) -> list[SaveStateResult]:
        options = {} if training_client_id is None else {"training_client_id": training_client_id}
        found = self._requests.get("/artifacts", params=options)
        return [decode(artifact, SaveStateResult) for artifact in found]

    def _part(self, artifact_id: str) -> str:
        """Return an id or a name as a part of a path; of a name with a slash, which no path can hold, the id."""
        if "/" not in artifact_id:
            return quoted(artifact_id)
        for found in self.list_artifacts(None):  # newest first
            if found.name == artifact_id:
                return quoted(found.artifact_id)
        raise ArtifactNotFoundError(f"There is no artifact {as_given(artifact_id)}.")

    def get_artifact(self, artifact_id: str) -> SaveStateResult:
        return self._requests.record("GET", f"/artifacts/{self._part(artifact_id)}", SaveStateResult)

    def config_of(self, artifact_id: str) -> TrainingConfig:
        return self._requests.record("GET", f"/artifacts/{self._part(artifact_id)}/config", TrainingConfig)

    def pull_artifact(self, artifact_id: str, to: Path | None) -> bytes | Path:
        path = f"/artifacts/{self._part(artifact_id)}/content"
        if to is None:
            return self._requests.call("GET", path).content
        self._download(path, {}, to)
        return to

    def _download(self, path: str, params: Mapping[str, Any], to: Path) -> None:
        self._requests.refuse_if_gone()
        part = to.with_name(f".{to.name}-{uuid.uuid4().hex[:8]}.part")
        try:
            self._requests.io.call(self._fill(part, path, params))
            part.replace(to)
        except OSError as error:
            raise StorageError(f"{to} cannot be written ({error.strerror}).") from error
        finally:
            part.unlink(missing_ok=True)

    async def _fill(self, part: Path, path: str, params: Mapping[str, Any]) -> None:
        """Write an answer to a file; where it is cut off, the rest is asked for."""
        lost: float | None = None
        while True:
            have = part.stat().st_size if part.exists() else 0  # noqa: ASYNC240  # a moment
            headers = {"range": f"bytes={have}-"} if have else {}
            try:
                async with self._requests.stream(path, headers, params) as answer:
                    if not (answer.is_success and is_servers(answer)):
                        await answer.aread()
                        check_answer(answer)
                    goes_on = answer.status_code == httpx.codes.PARTIAL_CONTENT
                    with part.open("ab" if goes_on else "wb") as file:
                        async for chunk in answer.aiter_raw(CHUNK):
                            file.write(chunk)
                            lost = None
                return
            except (httpx.RequestError, ServerConnectionError) as error:
                lost = lost or time.monotonic()
                if time.monotonic() - lost > self._requests.patience:
                    raise self._requests.unreachable(error) from error
                await asyncio.sleep(0.5)

    def push_artifact(self, path: Path) -> SaveStateResult:
        if not path.is_file():
            raise StorageError(f"{path} cannot be read: there is no such file.")
        # an argument of httpx is a stream; it is made anew for every try
        return self._requests.record(
            "PUT", "/artifacts", SaveStateResult, content=chunks_of(path), timeout=600.0
        )

    def delete_artifact(self, artifact_id: str) -> None:
        self._requests.call("DELETE", f"/artifacts/{self._part(artifact_id)}")

    def export_adapter(self, artifact_id: str, path: Path, merged: bool) -> Path:
        target = path.expanduser().resolve()
        if target.exists() and (not target.is_dir() or any(target.iterdir()) or target == Path.cwd()):
            raise ValidationError(
                f"export_adapter: {path} exists and is not an empty folder, or is the one you are in. Choose another "
                f"one."
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        archive = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}.tar")
        address = f"/artifacts/{self._part(artifact_id)}/export"
        try:
            self._download(address, {"merged": str(merged).lower()}, archive)
            extract(archive, target)
        finally:
            archive.unlink(missing_ok=True)
        return path

    def rotate_keys(self) -> int:
        return int(self._requests.call("POST", "/keys/rotate").json()["rewrapped"])

    def audit_logs(
        self, training_client_id: str | None, operation: str | None, limit: int, offset: int
    ) -> Sequence[AuditLogEntry]:
        options = {
            "training_client_id": training_client_id,
            "operation": operation,
            "limit": limit,
            "offset": offset,
        }
        params = {name: value for name, value in options.items() if value is not None}
        return [decode(entry, AuditLogEntry) for entry in self._requests.get("/audit_logs", params=params)]

    def verify_audit_log(self, anchors: Sequence[str]) -> AuditVerification:
        params = {"anchor": list(anchors)}
        return self._requests.record("GET", "/audit_logs/verify", AuditVerification, params=params)

    def close(self) -> None:
        """Leave: training clients that were not closed live on, on the server."""
        for channel in list(self._channels.values()):
            channel.hang_up()
        self._requests.close()


def chunks_of(path: Path) -> Callable[[], AsyncIterator[bytes]]:
    """Return a function that reads a file from its beginning, piece by piece."""

    async def read() -> AsyncIterator[bytes]:
        with path.open("rb") as file:
            while chunk := await asyncio.to_thread(file.read, CHUNK):
                yield chunk

    return read


def extract(archive: Path, folder: Path) -> None:
    """Unpack a tar archive of plain files into a new folder, whole or not at all."""
    draft = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    draft.mkdir(parents=True, mode=0o700)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(draft, filter="data")
        if folder.exists():
            folder.rmdir()
        draft.replace(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
