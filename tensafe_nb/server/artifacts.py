"""The routes of a server's artifacts, sealed as they are, and of its audit log."""

import asyncio
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response
from starlette.background import BackgroundTask

from tensafe_nb.errors import StorageError
from tensafe_nb.protocol.codec import encode
from tensafe_nb.server.answers import ERRORS, PREFIX, of_type, packed
from tensafe_nb.server.service import Service, Tenant
from tensafe_nb.store.disk import disk_errors
from tensafe_nb.transports.embedded import EmbeddedTransport

R = TypeVar("R")


def artifact_routes(service: Service) -> APIRouter:
    """Offer artifacts and the audit log."""
    routes = APIRouter(prefix=PREFIX, responses=ERRORS)
    artifacts = "/artifacts"

    def tenant_of(request: Request) -> Tenant:
        return service.tenant(request.state.tenant)

    def transport_of(request: Request) -> EmbeddedTransport:
        return tenant_of(request).transport

    async def aside(request: Request, work: Callable[..., R], *arguments: Any) -> R:
        return await tenant_of(request).aside(work, *arguments)

    @routes.get(artifacts)
    async def list_artifacts(request: Request, training_client_id: str | None = None) -> list[Any]:
        """List the stored artifacts, newest first."""
        found = await aside(request, transport_of(request).list_artifacts, training_client_id)
        return [encode(artifact) for artifact in found]

    @routes.put(artifacts, status_code=201)
    async def push(request: Request) -> Response:
        """Take in a sealed file."""
        room, came = await aside(request, tenant_of(request).room), 0
        with disk_errors("take in what was sent"), tempfile.NamedTemporaryFile(suffix=".tsnb") as file:
            async for chunk in request.stream():
                came += len(chunk)
                if room is not None and came > room:
                    raise StorageError(
                        f"This takes more than the {room:,} bytes that this tenant may still store. Delete something "
                        f"first: service.delete_artifact(…)."
                    )
                await asyncio.to_thread(file.write, chunk)
            file.flush()
            pushed = await aside(request, transport_of(request).push_artifact, Path(file.name))
            tenant_of(request).stored.add(came)
            return packed(pushed, 201)

    @routes.get(artifacts + "/{artifact_id}")
    async def get_artifact(request: Request, artifact_id: str) -> Response:
        """Return what is known of one, by id or name."""
        return packed(await aside(request, transport_of(request).get_artifact, artifact_id))

    @routes.delete(artifacts + "/{artifact_id}", status_code=204)
    async def delete_artifact(request: Request, artifact_id: str) -> None:
        """Delete one for good."""
        transport, asked = transport_of(request), request.state.asked
        if asked is None:
            await aside(request, transport.delete_artifact, artifact_id)
            tenant_of(request).stored.forget()
            return
        meant = None if asked.noted is None else asked.noted.get("artifact_id")
        if meant is None:
            meant = await aside(request, transport.vault.artifacts.resolve, artifact_id)
            asked.note({"artifact_id": meant})  # by its name, another one would be meant the next time
        elif not await aside(request, transport.vault.artifacts.holds, meant):
            return  # an earlier try has deleted it
        await aside(request, transport.delete_artifact, meant)
        tenant_of(request).stored.forget()

    @routes.get(artifacts + "/{artifact_id}/config")
    async def config_of(request: Request, artifact_id: str) -> Response:
        """Return the configuration of the client that saved it."""
        return packed(await aside(request, transport_of(request).config_of, artifact_id))

    binary = "application/octet-stream"

    @routes.get(
        artifacts + "/{artifact_id}/content",
        response_class=Response,
        responses={**of_type(binary), **of_type(binary, status=206)},
    )
    async def content(request: Request, artifact_id: str) -> FileResponse:
        """Return the sealed file, in ranges if asked for."""
        with disk_errors("copy the artifact"), left_to_be_sent(".tsnb") as (copy, _):
            await aside(request, transport_of(request).pull_artifact, artifact_id, copy)
        return FileResponse(
            copy, media_type="application/octet-stream", background=BackgroundTask(copy.unlink)
        )

    @routes.get(
        artifacts + "/{artifact_id}/export",
        response_class=Response,
        responses=of_type("application/x-tar"),
    )
    async def export(request: Request, artifact_id: str, merged: bool = False) -> FileResponse:
        """Return one in the clear, as a tar archive of a folder that PEFT and transformers read."""
        service.refuse_if_kept()
        made = await aside(request, exported, transport_of(request), artifact_id, merged)
        return FileResponse(made, media_type="application/x-tar", background=BackgroundTask(made.unlink))

    @routes.post("/keys/rotate")
    async def rotate(request: Request) -> dict[str, int]:
        """Make a new key, and rewrap this tenant's artifacts with it."""
        tenant, asked = tenant_of(request), request.state.asked
        vault = tenant.transport.vault
        noted = {} if asked is None or asked.noted is None else asked.noted
        if asked is not None and not noted:
            stored = await aside(request, vault.artifacts.list)
            asked.note({"key_id": vault.keys.primary_id(), "artifacts": len(stored)})
        rewrapped = await aside(request, lambda: vault.rotate(instead_of=noted.get("key_id")))
        await aside(request, tenant.answers.renew)
        return {"rewrapped": noted.get("artifacts", rewrapped)}

    @routes.get("/audit_logs")
    async def audit_logs(
        request: Request,
        training_client_id: str | None = None,
        operation: str | None = None,
        limit: Annotated[int, Query(ge=0, le=10_000)] = 100,
        offset: Annotated[int, Query(ge=0)] = 0,
    ) -> list[Any]:
        """Return records of the audit log, newest first."""
        logs = transport_of(request).audit_logs
        return [
            encode(entry)
            for entry in await aside(request, logs, training_client_id, operation, limit, offset)
        ]

    @routes.get("/audit_logs/verify")
    async def verify(request: Request, anchor: Annotated[list[str], Query(default_factory=list)]) -> Response:
        """Check the audit log from its first record to its last."""
        return packed(await aside(request, transport_of(request).verify_audit_log, tuple(anchor)))

    return routes


@contextmanager
def left_to_be_sent(suffix: str) -> Iterator[tuple[Path, IO[bytes]]]:
    """Give a file to write that whoever sends it removes; where it cannot be written nothing is left of it."""
    with tempfile.NamedTemporaryFile(suffix=suffix, delete=False) as file:
        path = Path(file.name)
        try:
            yield path, file
            file.flush()
        except BaseException:
            path.unlink()
            raise


def exported(transport: EmbeddedTransport, artifact_id: str, merged: bool) -> Path:
    """Export an artifact into an archive that whoever sends it removes."""
    with disk_errors("write the archive"), tempfile.TemporaryDirectory() as folder:
        written = transport.export_adapter(artifact_id, Path(folder) / "exported", merged)
        with left_to_be_sent(".tar") as (path, archive), tarfile.open(fileobj=archive, mode="w") as tar:
            for part in sorted(written.iterdir()):
                tar.add(part, part.name)
        return path
