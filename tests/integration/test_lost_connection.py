"""What is sent on a connection that has just been lost is dropped, and nothing else comes of it."""

from __future__ import annotations

import asyncio

import uvloop

from bus_kv.runtime.connection import ConnectOptions
from bus_kv.runtime.nats_bus import NatsBus

DEADLINE_S = 20.0


def test_a_message_on_a_lost_connection_is_dropped_and_the_next_one_arrives(nats_url: str) -> None:
    uvloop.run(_lose_and_send(nats_url))


async def _lose_and_send(nats_url: str) -> None:
    restored, heard = asyncio.Event(), asyncio.Event()
    bus = NatsBus(ConnectOptions(servers=(nats_url,)), restored.set)
    await bus.open()

    async def on_message(message: object) -> None:
        del message
        heard.set()

    await bus.subscribe("lost.connection", on_message)
    transport = bus._client._transport
    assert transport is not None
    transport._io_writer.transport.abort()  # type: ignore[attr-defined]
    for _ in range(20):  # at every moment of its going down
        await bus.publish("lost.connection.other", b"x")
        bus.send()
        await asyncio.sleep(0)
    async with asyncio.timeout(DEADLINE_S):
        await restored.wait()
        await bus.flush()
        await bus.publish("lost.connection", b"x")
        bus.send()
        await heard.wait()
    await bus.close()
