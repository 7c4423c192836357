"""The process of a server: it drains before it stops, while streams still tell what becomes of what runs."""

import socket

import uvicorn


class Server(uvicorn.Server):
    """A uvicorn whose application is drained at SIGTERM, before its connections are closed."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then shut down."""
        await self.drain()
        await super().shutdown(sockets)

    async def drain(self) -> None:
        """Finish what runs, refuse what is new, end the streams, write out the logs."""
        await self.config.app.state.service.drain()  # type: ignore[union-attr]
