"""The routes of encrypted adapters: ciphertexts in, ciphertexts out, and an adapter that stays where it is.

A body is bounded by what its parameters make of it, which are known by name, before a byte of it is parsed.
"""

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from tensafe_nb.errors import TGTinkerError, ValidationError
from tensafe_nb.privacy.encrypted.packing import MOST_RANK, MOST_WIDTH
from tensafe_nb.server.answers import ERRORS, PREFIX, of_type, packed
from tensafe_nb.server.clients import ended
from tensafe_nb.server.operations import ONE, Id, client_of, tenant_of
from tensafe_nb.server.service import Service

BINARY = "application/octet-stream"
BYTES = {
    "requestBody": {"required": True, "content": {BINARY: {"schema": {"type": "string", "format": "binary"}}}}
}
CONNECTION = ONE + "/encrypted/{connection_id}"

Number = Annotated[int, Query(ge=-4096, lt=4096)]
Layers = Annotated[list[Number], Query(default_factory=lambda: [-1], min_length=1, max_length=64)]
Modules = Annotated[list[Annotated[str, Query(max_length=200)]], Query(default_factory=list, max_length=64)]


async def body_within(request: Request, most: int) -> bytes:
    """Read a body whole that may have so many bytes.

    Raises:
        TGTinkerError: It has more, or says so.
    """
    parts, came = [], int(request.headers.get("content-length", "0"))
    if came <= most:
        came = 0
        async for chunk in request.stream():
            came += len(chunk)
            if came > most:
                break
            parts.append(chunk)
    if came > most:
        raise TGTinkerError(
            f"This has at least {came:,} bytes; with its parameters it has at most {most:,}. It was not parsed.",
            code="too_large",
        )
    return b"".join(parts)


def encrypted_routes(service: Service) -> APIRouter:
    """Offer encrypted calls of a training client's adapter."""
    routes = APIRouter(prefix=PREFIX, responses=ERRORS)

    @routes.get(ONE + "/encrypted")
    async def offer(request: Request, training_client_id: Id, layers: Layers, modules: Modules) -> Response:
        """Say which adapters of some layers can be applied to ciphertexts: shapes, and the version of the weights."""
        client = client_of(service, request, training_client_id)
        client.used_at = time.monotonic()
        await ended(client.channel.ready())
        line = client.channel.encrypted
        return packed(await tenant_of(service, request).aside(line.offer, layers, modules or None))

    @routes.post(ONE + "/encrypted", status_code=201, openapi_extra=BYTES)
    async def open_connection(
        request: Request,
        training_client_id: Id,
        layers: Layers,
        modules: Modules,
        shape: Annotated[list[int], Query(min_length=3, max_length=3)],
        params: Annotated[str, Query(max_length=64)] = "n8192-d2",
        tokens: Annotated[str, Query(max_length=8)] = "auto",
    ) -> Response:
        """Open a connection for the adapters of one shape; the body is a client's bundle, with rotation keys."""
        client, tenant = client_of(service, request, training_client_id), tenant_of(service, request)
        service.refuse_if_draining()
        client.used_at = time.monotonic()
        line, packing = client.channel.encrypted, packing_of(tokens)
        d_in, d_out, rank = shape
        if not (0 < d_in <= MOST_WIDTH and 0 < d_out <= MOST_WIDTH and 0 < rank <= MOST_RANK):
            raise ValidationError(f"No adapter has the shape {tuple(shape)}: width in, width out, rank.")
        most = await asyncio.to_thread(line.most_of_bundle, (d_in, d_out, rank), params, packing)
        async with tenant.opening_encrypted():
            bundle = await body_within(request, most)
            await ended(client.channel.ready())
            opened = await tenant.aside(
                line.open, layers, modules or None, (d_in, d_out, rank), params, packing, bundle
            )
        return packed(opened, 201)

    @routes.post(
        CONNECTION + "/apply", response_class=Response, responses=of_type(BINARY), openapi_extra=BYTES
    )
    async def apply(request: Request, training_client_id: Id, connection_id: Id) -> Response:
        """Apply an adapter to encrypted activations; the body is a client's request, the answer its reply."""
        client, tenant = client_of(service, request, training_client_id), tenant_of(service, request)
        service.refuse_if_draining()
        line = client.channel.encrypted
        most = await asyncio.to_thread(line.most_of_request, connection_id)
        body = await body_within(request, most)
        began, reply = time.perf_counter(), b""
        try:
            reply = await tenant.aside(line.apply, connection_id, body)
        finally:
            service.figures.count_encrypted(len(body), len(reply), time.perf_counter() - began)
        return Response(reply, media_type=BINARY)

    @routes.post(CONNECTION + "/refresh")
    async def refresh(request: Request, training_client_id: Id, connection_id: Id) -> Response:
        """Serve the weights as they are now, under the same keys."""
        client = client_of(service, request, training_client_id)
        client.used_at = time.monotonic()
        line = client.channel.encrypted
        return packed(await tenant_of(service, request).aside(line.refresh, connection_id))

    @routes.delete(CONNECTION, status_code=204)
    async def close_connection(request: Request, training_client_id: Id, connection_id: Id) -> None:
        """Drop the keys of a connection."""
        client = client_of(service, request, training_client_id)
        client.channel.connections.find(connection_id)  # an id that is not there is 404, here as elsewhere
        client.channel.encrypted.close(connection_id)

    return routes


def packing_of(tokens: str) -> Any:
    """Return how many tokens share a ciphertext, as it stands in an address."""
    return int(tokens) if tokens.isdecimal() else tokens
