"""A server over the embedded core, as an ASGI application: what `ServiceClient(base_url)` speaks, and curl can."""

import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import PlainTextResponse, Response

from tensafe_nb.core.engines import MakesEngines
from tensafe_nb.server.answers import ERRORS, PREFIX, VERSION, Json, add_error_handlers, hide
from tensafe_nb.server.artifacts import artifact_routes
from tensafe_nb.server.door.guard import Guard, WhoIs
from tensafe_nb.server.door.limits import Limits, Quotas
from tensafe_nb.server.door.tokens import Tokens
from tensafe_nb.server.encrypted import encrypted_routes
from tensafe_nb.server.openai.routes import openai_routes
from tensafe_nb.server.operations import client_routes
from tensafe_nb.server.service import Service
from tensafe_nb.store.home import Home

THREADS = 64  # that may wait for an operation, a model or a disk at a time


def create_app(
    home: Home,
    tokens: Tokens,
    *,
    models: Path | None = None,
    hub_models: Sequence[str] = (),
    hosts: Sequence[str] = (),
    limits: Limits | None = None,
    losses: Sequence[str] = (),
    root_path: str = "",
    identity: WhoIs | None = None,
    idle_after: float | None = None,
    exports: bool = True,
    engines: MakesEngines | None = None,
    api_keys: bool = False,
) -> FastAPI:
    """Return the server as an ASGI application.

    Args:
        home: Where everything is kept.
        tokens: Who may enter.
        models: The folder whose models are offered, by their names beneath it; the process works in that folder.
        hub_models: Ids of hub models that may be loaded.
        hosts: Names by which it is called, besides loopback ones.
        limits: Of a tenant for whom the tokens say nothing else.
        losses: Dotted paths of losses that may be used all the same: "pkg.mod:attr".
        root_path: The path under which a proxy offers it.
        identity: Who says whose a token is; without one, the tokens do.
        idle_after: Seconds after which a training client that nobody uses is put away; None keeps it in memory.
        exports: Weights may leave in the clear; False keeps them here.
        engines: Makes the engines of training clients: a cluster's; None computes in this process.
        api_keys: Tokens may also come as the Tinker SDK sends them.
    """
    hide(home.root, models, tempfile.gettempdir(), Path.home(), Path.cwd(), sys.prefix)
    quotas = Quotas(limits or Limits(), tokens.limits)
    service = Service(home, models, hub_models, quotas, losses, idle_after, exports=exports, engines=engines)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # makes the routes, which else the first request does. FastAPI silences warnings of its own as it makes them,
        # and which are silent is one setting of all threads: also of those on which models of old clients load
        app.openapi()
        with ThreadPoolExecutor(THREADS, thread_name_prefix="server") as threads:
            asyncio.get_running_loop().set_default_executor(threads)
            await asyncio.to_thread(service.resume)
            house = asyncio.create_task(service.keep_house())
            yield
            house.cancel()
            await service.drain()

    app = FastAPI(
        title="tensafe_nb",
        version=VERSION,
        lifespan=lifespan,
        default_response_class=Json,
        redirect_slashes=False,
    )
    app.state.service = service
    app.add_middleware(
        Guard,
        identity=identity or tokens,
        quotas=quotas,
        hosts=hosts,
        root_path=root_path,
        answers_of=lambda name: service.tenant(name).answers,
        api_keys=api_keys,
    )
    add_error_handlers(app)
    offered = (
        client_routes(service),
        encrypted_routes(service),
        artifact_routes(service),
        openai_routes(service),
    )
    for routes in (probes(service), *offered):
        app.include_router(routes)
    return app


def probes(service: Service) -> APIRouter:
    """Say how the server does; no secrets, and nothing of single tenants."""
    routes, started = APIRouter(), time.time()

    @routes.get("/health")
    @routes.get("/live")
    async def live() -> dict[str, Any]:
        """Say that the server answers."""
        return {"status": "ok", "seconds": round(time.time() - started)}

    @routes.get("/ready")
    async def ready() -> Response:
        """Say whether it takes requests; 503 once it is about to stop."""
        return Json({"ready": not service.draining}, 503 if service.draining else 200)

    @routes.get("/version")
    async def version() -> dict[str, str]:
        """Say what it is."""
        return {"name": "tensafe_nb", "version": VERSION, "api": PREFIX}

    @routes.get("/metrics", response_class=PlainTextResponse, responses=ERRORS)
    async def metrics() -> PlainTextResponse:
        """Return figures of the whole server, for Prometheus."""
        return PlainTextResponse(
            service.figures.text(service.live_clients(), service.quotas.rejected, service.stored())
        )

    return routes
