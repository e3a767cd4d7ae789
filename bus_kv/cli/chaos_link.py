"""A TCP proxy between one process and the bus, whose two directions can be cut, each alone.

A cut link loses no bytes and closes nothing: it stands still, as TCP does while packets are lost, and when it is mended
what was on its way arrives late. So old messages reach a cluster that has gone on without their sender.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

_PIECE_BYTES = 1 << 16
_CONNECT_DEADLINE_S = 2.0


class Link:
    """Forwards connections to `host:port`. `start` it before its `url` is used."""

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._to_bus, self._from_bus = asyncio.Event(), asyncio.Event()
        self._server: asyncio.Server | None = None
        self._pumps: set[asyncio.Task[None]] = set()
        self.mend()

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"nats://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    def cut(self, *, to_bus: bool = True, from_bus: bool = True) -> None:
        """What the process says reaches nobody, what others say does not reach it, or both."""
        if to_bus:
            self._to_bus.clear()
        if from_bus:
            self._from_bus.clear()

    def mend(self) -> None:
        self._to_bus.set()
        self._from_bus.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_CONNECT_DEADLINE_S):
                bus_reader, bus_writer = await asyncio.open_connection(*self._target)
        except (OSError, TimeoutError):
            writer.close()
            return
        for pump in (
            self._pump(reader, bus_writer, self._to_bus),
            self._pump(bus_reader, writer, self._from_bus),
        ):
            task = asyncio.create_task(pump)
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_open: asyncio.Event
    ) -> None:
        """Until one side closes, and then the other is closed too; but a cut hides that as well."""
        with suppress(OSError):
            while piece := await reader.read(_PIECE_BYTES):
                await is_open.wait()
                writer.write(piece)
                await writer.drain()
        await is_open.wait()
        writer.close()
