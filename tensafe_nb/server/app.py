"""A server over the embedded core, as an ASGI application: what `ServiceClient(base_url)` speaks, and curl can."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import PlainTextResponse, Response

from tensafe_nb.server.answers import PREFIX, VERSION, Json, add_error_handlers
from tensafe_nb.server.artifacts import artifact_routes
from tensafe_nb.server.guard import Guard
from tensafe_nb.server.operations import client_routes
from tensafe_nb.server.service import Limits, Service
from tensafe_nb.server.tokens import Tokens
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
    root_path: str = "",
) -> FastAPI:
    """Return the server as an ASGI application.

    Args:
        home: Where everything is kept.
        tokens: Who may enter.
        models: The folder whose models are offered, by their names beneath it; the process works in that folder.
        hub_models: Ids of hub models that may be loaded.
        hosts: Names by which it is called, besides loopback ones.
        limits: Of each tenant.
        root_path: The path under which a proxy offers it.
    """
    service = Service(home, models, hub_models, limits or Limits())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
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
        root_path=root_path,
        default_response_class=Json,
    )
    app.state.service = service
    app.add_middleware(Guard, tokens=tokens, hosts=hosts)
    add_error_handlers(app)
    for routes in (probes(service), client_routes(service), artifact_routes(service)):
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

    @routes.get("/metrics")
    async def metrics() -> PlainTextResponse:
        """Return figures of the whole server, for Prometheus."""
        return PlainTextResponse(figures(service))

    return routes


def figures(service: Service) -> str:
    """Return what Prometheus reads."""
    clients = service.live_clients()
    lags = [lag for client in clients for lag in client.lags]
    found = {
        "training_clients gauge": ("Training clients that are not closed.", len(clients)),
        "queue_depth gauge": (
            "Operations that wait or run.",
            sum(client.channel.info().queue_depth for client in clients),
        ),
        "operations_total counter": (
            "Operations that have been carried out, of clients that are not closed.",
            sum(client.operations for client in clients),
        ),
        "operation_seconds_total counter": (
            "How long they took.",
            round(sum(client.seconds for client in clients), 6),
        ),
        "held_submissions gauge": (
            "Submissions that wait for one before them.",
            sum(client.held for client in clients),
        ),
        "streams gauge": ("Streams that are read.", len(lags)),
        "stream_lag_events gauge": ("Events that the slowest reader is behind.", max(lags, default=0)),
    }
    lines = []
    for key, (words, value) in found.items():
        name, kind = key.split()
        lines += [f"# HELP tensafe_nb_{name} {words}", f"# TYPE tensafe_nb_{name} {kind}"]
        lines.append(f"tensafe_nb_{name} {value}")
    return "\n".join(lines) + "\n"
