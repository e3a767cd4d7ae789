"""Closed-loop load: so many callers, each with one call under way, and what their calls took."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    Round = Callable[[int], Awaitable["Result"]]
    """(number of the round, from 0) -> what it did."""

ZIPF_EXPONENT = 0.99
"""As YCSB has it: the hottest of 100,000 keys gets about a twelfth of the calls."""
PICKS = 1 << 16
"""Keys picked beforehand, for callers to go round in: picking must cost nothing while measuring."""


@dataclass(frozen=True, slots=True)
class Timing:
    warmup_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Result:
    """What one load did. An operation is a key, a call may hold many."""

    callers: int
    operations: int
    seconds: float
    latencies_ns: Sequence[int]
    """Of every call, ascending."""

    @property
    def operations_per_s(self) -> float:
        return self.operations / self.seconds

    def latency_ms(self, percentile: float) -> float:
        """By the nearest rank; 100 is the longest."""
        count = len(self.latencies_ns)
        rank = min(int(count * percentile / 100), count - 1)
        return self.latencies_ns[rank] / 1e6

    def to_json(self) -> dict[str, Any]:
        percentiles = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
        return {
            "callers": self.callers,
            "operations": self.operations,
            "seconds": round(self.seconds, 3),
            "operations_per_s": round(self.operations_per_s, 1),
            "latency_ms": {n: round(self.latency_ms(p), 3) for n, p in percentiles.items()},
        }


@dataclass(frozen=True, slots=True)
class Spread:
    """What several rounds of the same say."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(*(round(f(values), 3) for f in (median, min, max)))

    def __str__(self) -> str:
        digits = 0 if self.max >= 100 else 2
        return f"{self.median:,.{digits}f} ({self.min:,.{digits}f}–{self.max:,.{digits}f})"


async def in_turn(first: Round, second: Round, rounds: int) -> list[tuple[Result, Result]]:
    """So many rounds of both, whoever was last beginning the next: what drifts meets both alike."""
    results = []
    for i in range(rounds):
        if i % 2:
            after = await second(i)
            results.append((await first(i), after))
        else:
            results.append((await first(i), await second(i)))
    return results


def pick(count: int, distribution: str, seed: int, picks: int = PICKS) -> list[int]:
    """Indexes below `count`, "uniform" or "zipfian"; hot indexes lie anywhere, not side by side."""
    rng = random.Random(seed)
    indexes = [*range(count)]
    rng.shuffle(indexes)
    if distribution == "uniform":
        return rng.choices(indexes, k=picks)
    weights = accumulate(1 / rank**ZIPF_EXPONENT for rank in range(1, count + 1))
    return rng.choices(indexes, cum_weights=[*weights], k=picks)


async def run_callers(
    call: Callable[[Any], Awaitable[Any]], arguments: Sequence[Any], *, callers: int,
    timing: Timing, operations_per_call: int = 1,
) -> Result:  # fmt: skip
    """Run `call(argument)` from `callers` tasks; caller i starts at its own place in `arguments`.

    Calls that begin after the warm-up are counted, at least one of each caller, and the time runs
    until the last of them is done. Raises whatever a call raises.
    """
    begin_ns = perf_counter_ns() + int(timing.warmup_s * 1e9)
    end_ns = begin_ns + int(timing.seconds * 1e9)
    latencies: list[int] = []

    async def loop(place: int) -> None:
        clock, record, count = perf_counter_ns, latencies.append, len(arguments)
        started_ns = clock()
        while True:
            await call(arguments[place % count])
            ended_ns = clock()
            if started_ns >= begin_ns:
                record(ended_ns - started_ns)
                if ended_ns >= end_ns:
                    return
            started_ns = ended_ns
            place += 1

    stride = max(len(arguments) // callers, 1)
    try:
        async with asyncio.TaskGroup() as group:
            for i in range(callers):
                group.create_task(loop(i * stride))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    seconds = (perf_counter_ns() - begin_ns) / 1e9
    latencies.sort()
    return Result(callers, len(latencies) * operations_per_call, seconds, latencies)
