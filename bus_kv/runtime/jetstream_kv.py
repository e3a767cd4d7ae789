"""JetStream's key-value store as any program has it from nats-py: what `bus-kv bench --jetstream` measures."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from nats.errors import Error as NatsError
from nats.js.api import KeyValueConfig, StorageType

from bus_kv.runtime.nats_bus import BusError, NatsBus

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from nats.js import JetStreamContext
    from nats.js.kv import KeyValue

    from bus_kv.runtime.connection import ConnectOptions

log = logging.getLogger("bus_kv.bus")

_CALL_TIMEOUT_S = 10.0
_CREATE_DEADLINE_S = 30.0
"""Servers that have just started elect a leader first."""
_CREATE_RETRY_S = 0.1
_CREATE_TIMEOUT_S = 2.0


class JetStreamKv:
    """A bucket. `put` and `get` are nats-py's own, with nothing around them; keys are text.

    A put is acknowledged when a majority of the replicas has it. A get asks whichever replica is at hand, as with the
    buckets that the `nats` command makes; that is JetStream's fastest way to read, and not linearizable.
    """

    def __init__(self, jetstream: JetStreamContext, bucket: str, kv: KeyValue) -> None:
        self._jetstream, self._bucket = jetstream, bucket
        self.put, self.get = kv.put, kv.get

    async def put_many(self, items: Iterable[tuple[str, bytes]]) -> None:
        """Publish all of them, then wait for their acknowledgements."""
        publish, prefix = self._jetstream.publish_async, f"$KV.{self._bucket}."
        async with asyncio.timeout(_CALL_TIMEOUT_S):
            acks = [await publish(f"{prefix}{key}", value) for key, value in items]
            await asyncio.gather(*acks)


@asynccontextmanager
async def jetstream_kv(
    options: ConnectOptions, bucket: str, unacknowledged_max: int
) -> AsyncIterator[JetStreamKv]:
    """Connect to a bucket that is there. Raises BusError for all that JetStream refuses, also within."""
    async with _connected(options) as bus:
        jetstream = bus.jetstream(_CALL_TIMEOUT_S, unacknowledged_max)
        yield JetStreamKv(jetstream, bucket, await jetstream.key_value(bucket))


async def create_bucket(options: ConnectOptions, bucket: str, replicas: int) -> None:
    """A bucket in files with one version per key. Raises BusError when there is none after 30 s."""
    config = KeyValueConfig(
        bucket, history=1, storage=StorageType.FILE, replicas=replicas, direct=True
    )
    async with _connected(options) as bus, asyncio.timeout(_CREATE_DEADLINE_S):
        while True:
            try:
                await bus.jetstream(_CREATE_TIMEOUT_S).create_key_value(config)
                return
            except NatsError as error:
                log.debug("bucket %s cannot be created yet: %r", bucket, error)
            await asyncio.sleep(_CREATE_RETRY_S)


@asynccontextmanager
async def _connected(options: ConnectOptions) -> AsyncIterator[NatsBus]:
    bus = NatsBus(options)
    await bus.open()
    try:
        yield bus
    except (NatsError, TimeoutError) as error:
        raise BusError(f"JetStream failed: {error or type(error).__name__}") from None
    finally:
        await bus.close()
