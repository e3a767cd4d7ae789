"""The clients of `bus-kv chaos`: they write and read a few hot keys and remember all that they were told."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack, asynccontextmanager
from time import monotonic_ns
from typing import TYPE_CHECKING

import bus_kv
from bus_kv.cli.chaos_cluster import FAILURES
from bus_kv.cli.chaos_history import Call, Kind, Outcome, hot_key
from bus_kv.errors import BusKVError, ConsistencyNotMet, PreconditionFailed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bus_kv.client.client import Client
    from bus_kv.client.results import Entry, Receipt
    from bus_kv.protocol.batch import Version
    from bus_kv.runtime.connection import ConnectOptions

CLIENTS = 4
WORKERS_EACH = 22
"""At least; with more shards than that, so many that every shard has one that writes to it alone."""
ALL_WORKERS_EACH = 2
"""And so many that write at ALL: while a member is away each of their writes takes its full time."""
_SHARES = {"get": 40, "put": 36, "put if version": 12, "put if absent": 4, "delete": 8}
"""Of 100 calls."""
_SLOW_CALLS_PER_S = 480


class Load:
    """Workers that call until `stop`; `calls` is the history in the order of invocation."""

    def __init__(self, keys: int, shards: int, seed: str) -> None:
        self.calls: list[Call] = []
        self.is_slow = False
        """Whether workers pause between calls: there is always some load, but it should not outgrow its history."""
        self._keys = [*map(hot_key, range(keys))]
        self._shard_of = {key: min(i, shards - 1) for i, key in enumerate(self._keys)}
        self._keys_of: dict[int, list[bytes]] = {}
        for key, shard in self._shard_of.items():
            self._keys_of.setdefault(shard, []).append(key)
        self._workers_each = max(WORKERS_EACH, -(-len(self._keys_of) // CLIENTS))
        self._known: dict[bytes, Version] = {}
        """The newest version that any worker was told of."""
        self._seed = seed
        self._returned = 0
        self._has_returned = asyncio.Event()
        self._accepted_ns = dict.fromkeys(self._shard_of.values(), 0)
        """Shard -> when the youngest of its acknowledged writes was invoked."""
        self._everywhere_ns = 0
        """The same of those that were acknowledged at ALL."""
        self._stopping = asyncio.Event()

    @property
    def keys(self) -> list[bytes]:
        return self._keys

    @asynccontextmanager
    async def running(self, options: ConnectOptions) -> AsyncIterator[None]:
        """While this lasts there is load; at its end every call has returned, also after a failure of the cluster."""
        failure: Exception | None = None
        async with AsyncExitStack() as stack:
            names = [f"chaos-{i}" for i in range(CLIENTS)]
            clients = [
                await stack.enter_async_context(bus_kv.connect(options=options, client_id=name))
                for name in names
            ]
            async with asyncio.TaskGroup() as group:
                for first, (name, db) in enumerate(zip(names, clients, strict=True)):
                    for i in range(self._workers_each):
                        shard = (first * self._workers_each + i) % len(self._keys_of)
                        group.create_task(self._work(name, db, i, self._keys_of[shard], "quorum"))
                    for i in range(ALL_WORKERS_EACH):
                        work = self._work(name, db, self._workers_each + i, self._keys, "all")
                        group.create_task(work)
                try:
                    yield
                except FAILURES as error:
                    failure = error  # not here: the group would cancel the calls that are under way
                self._stopping.set()
        if failure is not None:
            raise failure

    def accepted_ns(self, after_ns: int) -> int | None:
        """When every shard had acknowledged a write since this moment; None: not all have.

        A write that was invoked after it, or that an epoch has taken which had taken none before.
        """
        writes = [call for call in self.calls if call.is_acknowledged_write]
        last_epoch = dict.fromkeys(self._keys_of, 0)
        for call in writes:
            if call.returned_ns is not None and call.returned_ns <= after_ns:
                shard = self._shard_of[call.key]
                last_epoch[shard] = max(last_epoch[shard], _epoch(call))
        first_ns: dict[int, int] = {}
        for call in writes:
            shard = self._shard_of[call.key]
            if call.invoked_ns > after_ns or _epoch(call) > last_epoch[shard] > 0:
                assert call.returned_ns is not None
                first_ns[shard] = min(first_ns.get(shard, call.returned_ns), call.returned_ns)
        return max(first_ns.values()) if first_ns.keys() == self._keys_of.keys() else None

    async def until_more(self, count: int) -> None:
        """Return when so many more calls have returned."""
        wanted = self._returned + count
        while self._returned < wanted:
            await self._next_return()

    async def until_accepted(self, after_ns: int) -> None:
        """Return when in every shard a write that was invoked after this moment has been acknowledged."""
        while min(self._accepted_ns.values()) <= after_ns:
            await self._next_return()

    async def until_everywhere(self, after_ns: int) -> None:
        """Return when a write that was invoked after this moment is on every member's disk."""
        while self._everywhere_ns <= after_ns:
            await self._next_return()

    async def _next_return(self) -> None:
        self._has_returned.clear()
        await self._has_returned.wait()

    # ---- one worker ----

    async def _work(
        self, name: str, db: Client, number: int, writes_to: list[bytes], level: str
    ) -> None:
        rng = random.Random(f"{self._seed}/{name}/{number}")
        count = 0
        while not self._stopping.is_set():
            count += 1
            value = f"{name}/{number}/{count}".encode()
            what = rng.choices([*_SHARES], [*_SHARES.values()])[0]
            if count % 2 and len(self._keys_of) > 1:
                what = "put"  # else it would take its only writer a while to find out that it is served
            call = self._choose(rng, what, name, level, value, writes_to)
            self.calls.append(call)
            await self._do(db, call)
            self._returned += 1
            self._has_returned.set()
            if self.is_slow:
                await asyncio.sleep(CLIENTS * self._workers_each / _SLOW_CALLS_PER_S)

    def _choose(
        self, rng: random.Random, what: str, name: str, level: str, value: bytes,
        writes_to: list[bytes],
    ) -> Call:  # fmt: skip
        key = rng.choice(self._keys if what == "get" else writes_to)
        now_ns = monotonic_ns()
        known = self._known.get(key)
        if what == "get":
            return Call(name, Kind.GET, key, now_ns)
        if what == "delete":
            condition = known if rng.random() < 0.5 else None
            return Call(name, Kind.DELETE, key, now_ns, level, if_version=condition)
        condition = known if what == "put if version" else None
        return Call(
            name, Kind.PUT, key, now_ns, level, value,
            if_absent=what == "put if absent", if_version=condition,
        )  # fmt: skip

    async def _do(self, db: Client, call: Call) -> None:
        try:
            answer = await _send(db, call)
        except BusKVError as error:
            self._take_failure(call, error)
        else:
            call.outcome, call.version = Outcome.DONE, answer.version
            call.found = answer.found
            call.read = getattr(answer, "value", None)
        call.returned_ns = monotonic_ns()
        if call.version is not None:
            self._known[call.key] = max(call.version, self._known.get(call.key, call.version))
        if call.is_acknowledged_write:
            shard = self._shard_of[call.key]
            self._accepted_ns[shard] = max(self._accepted_ns[shard], call.invoked_ns)
            if call.level == "all" and call.code is None:
                self._everywhere_ns = max(self._everywhere_ns, call.invoked_ns)

    def _take_failure(self, call: Call, error: BusKVError) -> None:
        call.code = error.code
        if isinstance(error, PreconditionFailed):
            call.outcome = Outcome.UNMET
        elif isinstance(error, ConsistencyNotMet) and error.detail.get("met") == "quorum":
            # Committed, so it counts; only not every member has it.
            epoch, seq = error.detail["version"]
            call.outcome, call.version = Outcome.DONE, (epoch, seq)
        elif error.definite:
            call.outcome = Outcome.REFUSED


def _epoch(call: Call) -> int:
    return call.version[0] if call.version is not None else 0


async def _send(db: Client, call: Call) -> Receipt | Entry:
    match call.kind:
        case Kind.GET:
            return await db.get(call.key)
        case Kind.DELETE:
            return await db.delete(call.key, consistency=call.level, if_version=call.if_version)
        case Kind.PUT:
            assert call.value is not None
            return await db.put(
                call.key, call.value, consistency=call.level, if_absent=call.if_absent,
                if_version=call.if_version,
            )  # fmt: skip
