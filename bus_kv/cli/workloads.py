"""What the callers of `bus-kv bench` do: the workloads, the keys they pick, and a plan of how long."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from bus_kv.cli.measure import Result, Timing, pick, run_callers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from bus_kv.client.client import Client

MANY = 1000
"""Keys of one put_many, and of one scan."""
MANY_CALLERS_MAX = 8
"""Calls of so many keys that are under way at once."""
_SEED = 1


class Workload(StrEnum):
    ALL = "all"
    PUT = "put"
    GET = "get"
    PUT_MANY = "put_many"
    SCAN = "scan"

    @property
    def is_many(self) -> bool:
        return self in (Workload.PUT_MANY, Workload.SCAN)


class Distribution(StrEnum):
    UNIFORM = "uniform"
    ZIPFIAN = "zipfian"


class Store(Protocol):
    """What is measured: our client, or whoever offers these three under the same names."""

    @property
    def put(self) -> Callable[[Any, bytes], Awaitable[Any]]: ...
    @property
    def get(self) -> Callable[[Any], Awaitable[Any]]: ...
    @property
    def put_many(self) -> Callable[[Any], Awaitable[Any]]: ...


@dataclass(frozen=True, slots=True)
class Plan:
    workloads: Sequence[Workload]
    callers: int
    keys: int
    value_bytes: int
    distribution: Distribution
    timing: Timing
    rounds: int

    def callers_of(self, workload: Workload) -> int:
        return min(self.callers, MANY_CALLERS_MAX) if workload.is_many else self.callers

    def data(self, prefix: str) -> Data:
        keys = [f"{prefix}{i:08d}".encode() for i in range(self.keys)]
        picked = [keys[i] for i in pick(self.keys, self.distribution, _SEED)]
        return Data(keys, picked, b"v" * self.value_bytes)

    def to_json(self) -> dict[str, Any]:
        return {
            "callers": self.callers,
            "keys": self.keys,
            "value_bytes": self.value_bytes,
            "distribution": str(self.distribution),
            "seconds": self.timing.seconds,
            "warmup_s": self.timing.warmup_s,
        }


@dataclass(frozen=True, slots=True)
class Data:
    """All keys, in order; those that callers go round in; and the one value."""

    keys: Sequence[Any]
    picked: Sequence[Any]
    value: bytes

    def with_text_keys(self) -> Data:
        """For a store that does not take bytes."""
        return Data([k.decode() for k in self.keys], [k.decode() for k in self.picked], self.value)


async def load(db: Store, data: Data) -> None:
    await in_parts(data.keys, lambda part: db.put_many([(key, data.value) for key in part]))


async def in_parts(keys: Sequence[Any], work: Callable[[Any], Awaitable[Any]]) -> None:
    parts = [keys[i : i + MANY] for i in range(0, len(keys), MANY)]
    for i in range(0, len(parts), MANY_CALLERS_MAX):
        await asyncio.gather(*(work(part) for part in parts[i : i + MANY_CALLERS_MAX]))


async def run(db: Client, workload: Workload, data: Data, callers: int, timing: Timing) -> Result:
    if workload is Workload.SCAN:
        return await _run_scan(db, data.keys, callers, timing)
    return await run_on(db, workload, data, callers, timing)


async def run_on(db: Store, workload: Workload, data: Data, callers: int, timing: Timing) -> Result:
    """Every workload but scan."""
    picked, value = data.picked, data.value
    match workload:
        case Workload.PUT:
            put = db.put
            return await run_callers(
                lambda key: put(key, value), picked, callers=callers, timing=timing
            )
        case Workload.GET:
            return await run_callers(db.get, picked, callers=callers, timing=timing)
        case Workload.PUT_MANY:
            items = [(key, value) for key in picked]
            parts = [items[i : i + MANY] for i in range(0, len(items) - MANY, MANY)]
            return await run_callers(
                db.put_many, parts, callers=callers, timing=timing, operations_per_call=MANY
            )
        case _:
            raise AssertionError(workload)


async def _run_scan(db: Client, keys: Sequence[bytes], callers: int, timing: Timing) -> Result:
    """Every call reads the next keys after its own place; the places are spread over all keys."""
    count = min(MANY, len(keys))
    last = len(keys) - count
    places = [i * last // MANY_CALLERS_MAX for i in range(MANY_CALLERS_MAX)]

    async def read(start: bytes) -> None:
        left, fields = count, {"start": start}
        while left:
            page = await db.call("scan", {**fields, "limit": left})
            left -= len(page["items"])
            fields = {"start": start, "cursor": page["cursor"]}

    return await run_callers(
        read, [keys[i] for i in places], callers=callers, timing=timing, operations_per_call=count
    )
