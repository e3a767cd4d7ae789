"""`bus-kv bench`: throughput and latency of a cluster, beside the least that its parts can cost."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import tempfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bus_kv.cli.command import Call, CommandFailed, ask, command
from bus_kv.cli.measure import Result, Timing, pick, run_callers
from bus_kv.runtime.process import OK

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

    from bus_kv.client.client import Client
    from bus_kv.runtime.connection import ConnectOptions

_MANY = 1000
"""Keys of one put_many, and of one scan."""
_MANY_CALLERS_MAX = 8
"""Calls of so many keys that are under way at once."""
_SEED = 1


class Workload(StrEnum):
    ALL = "all"
    PUT = "put"
    GET = "get"
    PUT_MANY = "put_many"
    SCAN = "scan"


class Distribution(StrEnum):
    UNIFORM = "uniform"
    ZIPFIAN = "zipfian"


@dataclass(frozen=True, slots=True)
class Plan:
    workloads: Sequence[Workload]
    callers: int
    keys: int
    value_bytes: int
    distribution: Distribution
    timing: Timing

    def callers_of(self, workload: Workload) -> list[int]:
        many = workload in (Workload.PUT_MANY, Workload.SCAN)
        return [*dict.fromkeys([1, min(self.callers, _MANY_CALLERS_MAX) if many else self.callers])]


def register(app: typer.Typer) -> None:
    command(app, "bench")(bench)


async def bench(
    call: Call,
    workload: Annotated[Workload, typer.Argument(help="what to measure")] = Workload.ALL,
    callers: Annotated[int, typer.Option(min=1, max=4096, help="calls under way at once")] = 256,
    keys: Annotated[
        int, typer.Option(min=1, max=10_000_000, help="keys loaded beforehand")
    ] = 100_000,
    value_bytes: Annotated[int, typer.Option(min=1, help="size of a value")] = 100,
    distribution: Annotated[
        Distribution, typer.Option(help="how keys are picked")
    ] = Distribution.UNIFORM,
    seconds: Annotated[float, typer.Option(min=0.05, help="measured time of each workload")] = 3.0,
    warmup: Annotated[float, typer.Option(min=0.0, help="seconds before it, not counted")] = 1.0,
    nodes: Annotated[int, typer.Option(min=1, max=64, help="nodes of the private cluster")] = 3,
    data: Annotated[
        Path, typer.Option(help="where temporary data go: a disk, not memory")
    ] = Path(),
    fold: Annotated[
        bool, typer.Option("--fold", help="compare a node that folds with one that never does")
    ] = False,
) -> int:
    """Measure puts, gets, put_many and scans: by one caller alone, and by many at once.

    With --nats it measures the cluster there, under keys of its own, which it deletes afterwards.
    Else it starts a private cluster and removes it. In the same run it measures two floors: an echo
    of the same bytes over NATS, one message per call, and a bare commit of the same bytes to a
    node's log on this machine's disk. "x echo" and "x log" are throughput in relation to them;
    calls made together share messages and commits, so it can exceed 1.

    - `bus-kv bench`
    - `bus-kv bench put --callers 64 --value-bytes 1000`
    - `bus-kv bench --distribution zipfian --json`
    - `bus-kv bench --fold --seconds 1`
    """
    every = workload is Workload.ALL
    chosen = [w for w in Workload if w is not Workload.ALL] if every else [workload]
    plan = Plan(chosen, callers, keys, value_bytes, distribution, Timing(warmup, seconds))
    with _temporary(data) as folder:
        if fold:
            return await _bench_fold(call, plan, folder)
        async with _cluster(call, folder, nodes) as options:
            document = await _measure(call, plan, folder, options)
    if call.out.as_json:
        call.out.document(document)
    else:
        _print(call, document)
    return OK


async def _bench_fold(call: Call, plan: Plan, folder: Path) -> int:
    from bus_kv.cli.fold_ratio import measure_fold
    from bus_kv.cli.local_cluster import ClusterError

    keys = [f"bench/{i:08d}".encode() for i in range(plan.keys)]
    value = b"v" * plan.value_bytes
    picked = [keys[i] for i in pick(plan.keys, plan.distribution, _SEED)]
    pairs = [(w, callers) for w in plan.workloads for callers in plan.callers_of(w)[-1:]]

    def run(db: Client, workload: Workload, callers: int) -> Awaitable[Result]:
        return _run(db, workload, picked, keys, value, callers, plan.timing)

    async def load(db: Client) -> None:
        await _in_parts(keys, lambda part: db.put_many([(key, value) for key in part]))

    try:
        results = await measure_fold(folder, pairs, load, run, call.out.note)
    except ClusterError as error:
        raise CommandFailed("CLUSTER", str(error)) from None
    if call.out.as_json:
        call.out.document({"settings": _settings(plan, call), "fold": results})
    else:
        call.out.table([*results[0]], [[*result.values()] for result in results])
    return OK


@contextlib.contextmanager
def _temporary(parent: Path) -> Iterator[Path]:
    """A folder on the disk that is to be measured; /tmp may be memory."""
    try:
        # Leftovers of children that are just being killed are no reason to fail.
        place = tempfile.TemporaryDirectory(".bus_kv", dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CommandFailed("FILE", f"--data {parent} cannot be written: {reason}") from None
    with place as name:
        yield Path(name).absolute()


@contextlib.asynccontextmanager
async def _cluster(call: Call, folder: Path, nodes: int) -> AsyncIterator[ConnectOptions]:
    """The cluster that was named, or a private one."""
    from bus_kv.cli.local_cluster import ClusterError, LocalCluster

    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    if call.names_nats:
        yield call.options
        return
    call.out.note(f"starting a private cluster of {nodes} node(s) in {folder}")
    try:
        async with LocalCluster(folder, nodes=nodes, root=call.options.root) as cluster:
            await cluster.wait_healthy()
            yield cluster.connection
    except ClusterError as error:
        raise CommandFailed("CLUSTER", str(error)) from None


async def _measure(call: Call, plan: Plan, folder: Path, options: ConnectOptions) -> dict[str, Any]:
    prefix = f"bench-{secrets.token_hex(4)}/"
    keys = [f"{prefix}{i:08d}".encode() for i in range(plan.keys)]
    results = await ask(options, lambda db: _measure_all(call, db, plan, keys))
    floor = await _measure_floor(call, plan, folder, options, len(keys[0]))
    return {
        "settings": _settings(plan, call),
        "floor": floor,
        "workloads": [_with_ratios(result, floor, plan) for result in results],
    }


def _settings(plan: Plan, call: Call) -> dict[str, Any]:
    return {
        "private_cluster": not call.names_nats,
        "callers": plan.callers,
        "keys": plan.keys,
        "value_bytes": plan.value_bytes,
        "distribution": str(plan.distribution),
        "seconds": plan.timing.seconds,
        "warmup_s": plan.timing.warmup_s,
    }


# ---- the workloads ----


async def _measure_all(
    call: Call, db: Client, plan: Plan, keys: list[bytes]
) -> list[dict[str, Any]]:
    value = b"v" * plan.value_bytes
    call.out.note(f"loading {plan.keys:,} keys")
    await _in_parts(keys, lambda part: db.put_many([(key, value) for key in part]))
    picked = [keys[i] for i in pick(plan.keys, plan.distribution, _SEED)]
    results = []
    try:
        for workload in plan.workloads:
            for callers in plan.callers_of(workload):
                call.out.note(f"measuring {workload} with {callers} caller(s)")
                result = await _run(db, workload, picked, keys, value, callers, plan.timing)
                results.append({"workload": str(workload), **result.to_json()})
    finally:
        if call.names_nats:
            await _in_parts(keys, db.delete_many)
    return results


async def _in_parts(keys: list[bytes], work: Callable[[list[bytes]], Awaitable[Any]]) -> None:
    parts = [keys[i : i + _MANY] for i in range(0, len(keys), _MANY)]
    for i in range(0, len(parts), _MANY_CALLERS_MAX):
        await asyncio.gather(*(work(part) for part in parts[i : i + _MANY_CALLERS_MAX]))


async def _run(
    db: Client, workload: Workload, picked: Sequence[bytes], keys: list[bytes], value: bytes,
    callers: int, timing: Timing,
) -> Result:  # fmt: skip
    match workload:
        case Workload.PUT:
            return await run_callers(
                lambda key: db.put(key, value), picked, callers=callers, timing=timing
            )
        case Workload.GET:
            return await run_callers(db.get, picked, callers=callers, timing=timing)
        case Workload.PUT_MANY:
            items = [(key, value) for key in picked]
            parts = [items[i : i + _MANY] for i in range(0, len(items) - _MANY, _MANY)]
            return await run_callers(
                db.put_many, parts, callers=callers, timing=timing, operations_per_call=_MANY
            )
        case _:
            return await _run_scan(db, keys, callers, timing)


async def _run_scan(db: Client, keys: list[bytes], callers: int, timing: Timing) -> Result:
    """Every call reads the next keys after its own place; the places are spread over all keys."""
    count = min(_MANY, len(keys))
    last = len(keys) - count
    places = [i * last // _MANY_CALLERS_MAX for i in range(_MANY_CALLERS_MAX)]

    async def read(start: bytes) -> None:
        left, fields = count, {"start": start}
        while left:
            page = await db.call("scan", {**fields, "limit": left})
            left -= len(page["items"])
            fields = {"start": start, "cursor": page["cursor"]}

    return await run_callers(
        read, [keys[i] for i in places], callers=callers, timing=timing, operations_per_call=count
    )


# ---- the floors ----


async def _measure_floor(
    call: Call, plan: Plan, folder: Path, options: ConnectOptions, key_bytes: int
) -> dict[str, Any]:
    from bus_kv.cli.floor import FloorError, measure_echo, measure_log

    call.out.note("measuring the floors: NATS echo, log commit")
    body_bytes, callers = key_bytes + plan.value_bytes, [*dict.fromkeys([1, plan.callers])]
    entries = [*dict.fromkeys([1, plan.callers, _MANY])]
    try:
        echo = await measure_echo(options, folder, body_bytes, callers, plan.timing)
        log = await measure_log(folder, key_bytes, plan.value_bytes, entries, plan.timing)
    except FloorError as error:
        raise CommandFailed("CLUSTER", str(error)) from None
    return {"echo": [result.to_json() for result in echo], "log": log}


def _with_ratios(result: dict[str, Any], floor: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Throughput in relation to the floors; None where a floor has no say."""
    name, callers = result["workload"], result["callers"]
    many = name in (Workload.PUT_MANY, Workload.SCAN)
    echo_callers = plan.callers if many else callers
    entry_operations = {Workload.PUT: callers, Workload.PUT_MANY: _MANY}.get(name)
    return {
        **result,
        "echo_ratio": _ratio(result, floor["echo"], "callers", echo_callers),
        "log_ratio": _ratio(result, floor["log"], "entry_operations", entry_operations),
    }


def _ratio(
    result: dict[str, Any], floors: list[dict[str, Any]], field: str, wanted: int | None
) -> float | None:
    rates = [f["operations_per_s"] for f in floors if f[field] == wanted]
    return round(result["operations_per_s"] / rates[0], 3) if rates else None


# ---- the table ----


def _print(call: Call, document: dict[str, Any]) -> None:
    floor = document["floor"]
    rows = [
        [r["workload"], *_row(r), r["echo_ratio"], r["log_ratio"]] for r in document["workloads"]
    ]
    rows += [["floor: echo", *_row(r), None, None] for r in floor["echo"]]
    rows += [
        [f"floor: log, {r['entry_operations']:,} per commit", *_row(r), None, None]
        for r in floor["log"]
    ]
    columns = [
        "workload",
        "callers",
        "keys/s",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "max ms",
        "x echo",
        "x log",
    ]
    call.out.table(columns, rows)


def _row(result: dict[str, Any]) -> list[Any]:
    return [result["callers"], round(result["operations_per_s"]), *result["latency_ms"].values()]
