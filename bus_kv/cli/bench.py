"""`bus-kv bench`: throughput and latency of a cluster, beside the least that its parts can cost."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bus_kv.cli.command import Call, CommandFailed, ask, command
from bus_kv.cli.measure import Timing
from bus_kv.cli.workloads import MANY, Data, Distribution, Plan, Workload, in_parts, load, run
from bus_kv.runtime.interpreter import is_optimized
from bus_kv.runtime.process import OK, USAGE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from bus_kv.client.client import Client
    from bus_kv.runtime.connection import ConnectOptions


_FOLD, _JETSTREAM, _PROFILE = "--fold", "--jetstream", "--profile"
_EVERY: list[Workload] = [workload for workload in Workload if workload is not Workload.ALL]
_POSSIBLE = {_JETSTREAM: [Workload.PUT, Workload.GET, Workload.PUT_MANY]}
"""Workloads that can be measured; a bucket of JetStream has no scan."""
_USUAL = {_PROFILE: [Workload.PUT, Workload.PUT_MANY]}
"""Workloads that are measured unless one is named."""
_SLOW_PYTHON = (
    "this Python is built without optimizations (--enable-optimizations): with one that is, figures "
    "are a quarter to a half better"
)


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
    rounds: Annotated[
        int, typer.Option(min=1, max=100, help="rounds of --fold and --jetstream")
    ] = 5,
    fold: Annotated[
        bool, typer.Option("--fold", help="compare a node that folds with one that never does")
    ] = False,
    jetstream: Annotated[
        bool, typer.Option("--jetstream", help="compare with JetStream KV of three replicas")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="tell which process and thread takes the CPU")
    ] = False,
) -> int:
    """Measure puts, gets, put_many and scans: by one caller alone, and by many at once.

    With --nats it measures the cluster there, under keys of its own, which it deletes afterwards.
    Else it starts a private cluster and removes it. In the same run it measures two floors: an echo
    of the same bytes over NATS, one message per call, and a bare commit of the same bytes to a
    node's log on this machine's disk. "x echo" and "x log" are throughput in relation to them;
    calls made together share messages and commits, so it can exceed 1.

    --fold, --jetstream and --profile measure something else instead, always in a private cluster.
    --jetstream starts three nats-servers and takes turns, round by round, between this database and
    a JetStream KV bucket of three replicas on the same servers; JetStream acknowledges before
    anything is on disk, so a lone put is also compared with servers that are told to wait for it.
    Its figures are medians with (least–most), its ratio is ours / JetStream's: more is better for
    keys/s, less for ms. --profile, on Linux, divides the CPU time of every process and thread by
    the operations of many callers.

    - `bus-kv bench`
    - `bus-kv bench put --callers 64 --value-bytes 1000`
    - `bus-kv bench --distribution zipfian --json`
    - `bus-kv bench --fold --seconds 1`
    - `bus-kv bench --jetstream`
    - `bus-kv bench --profile`
    """
    from bus_kv.cli.local_cluster import ClusterError

    mode = _mode(call, {_FOLD: fold, _JETSTREAM: jetstream, _PROFILE: profile})
    chosen = _workloads(workload, mode)
    plan = Plan(chosen, callers, keys, value_bytes, distribution, Timing(warmup, seconds), rounds)
    _stop_on_sigterm()
    if not is_optimized():
        call.out.note(_SLOW_PYTHON)
    try:
        with _temporary(data) as folder:
            await _BENCHES[mode](call, plan, folder, nodes)
    except ClusterError as error:
        raise CommandFailed("CLUSTER", str(error)) from None
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


def _mode(call: Call, flags: dict[str, bool]) -> str:
    """Which of the flags was given; empty without one."""
    given = [flag for flag, is_given in flags.items() if is_given]
    if len(given) > 1:
        message = f"{' and '.join(given)} are given together: measure one after the other"
        raise CommandFailed("USAGE", message, USAGE)
    if given and call.names_nats:
        message = f"{given[0]} measures a cluster of its own: leave out --nats (also BUS_KV_NATS)"
        raise CommandFailed("USAGE", message, USAGE)
    return "".join(given)


def _workloads(workload: Workload, mode: str) -> list[Workload]:
    possible = _POSSIBLE.get(mode, _EVERY)
    if workload is Workload.ALL:
        return _USUAL.get(mode, possible)
    if workload not in possible:
        message = f"{mode} cannot measure {workload}: name one of {', '.join(possible)}"
        raise CommandFailed("USAGE", message, USAGE)
    return [workload]


def _stop_on_sigterm() -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


# ---- comparisons and the profile ----


async def _bench_fold(call: Call, plan: Plan, folder: Path, nodes: int) -> None:
    from bus_kv.cli.fold_ratio import measure_fold

    del nodes  # one of each kind
    results = await measure_fold(folder, plan, call.out.note)
    if call.out.as_json:
        call.out.document({"settings": _settings(call, plan), "fold": results})
    else:
        call.out.table([*results[0]], [[*result.values()] for result in results])


async def _bench_jetstream(call: Call, plan: Plan, folder: Path, nodes: int) -> None:
    from bus_kv.cli.jetstream_ratio import measure_jetstream

    shards, rows = await measure_jetstream(folder, plan, nodes, call.out.note)
    if call.out.as_json:
        call.out.document(
            {
                "settings": _settings(call, plan) | {"rounds": plan.rounds, "shards": shards},
                "jetstream": [asdict(row) for row in rows],
            }
        )
        return
    for shard in shards:
        call.out.line(f"shard {shard['id']} has the members {', '.join(shard['members'])}")
    columns = ["", "callers", "unit", "ours", "JetStream KV R3", "ratio"]
    call.out.table(
        columns, [[r.name, r.callers, r.unit, r.ours, r.jetstream, r.ratio] for r in rows]
    )


async def _bench_profile(call: Call, plan: Plan, folder: Path, nodes: int) -> None:
    from bus_kv.cli import cpu
    from bus_kv.cli.cpu_profile import measure_profile

    if not cpu.is_available():
        message = "--profile reads the CPU time of threads in /proc, which only Linux has"
        raise CommandFailed("UNSUPPORTED", message)
    profiles = await measure_profile(folder, plan, nodes, call.out.note)
    if call.out.as_json:
        profile_documents = [profile.to_json() for profile in profiles]
        call.out.document({"settings": _settings(call, plan), "profile": profile_documents})
        return
    for p in profiles:
        call.out.line(f"{p.workload}, {p.callers} callers: {p.operations_per_s:,.0f} keys/s")
        rows = [[x.process, x.role, x.thread, x.cpu_us, x.cores] for x in p.parts]
        rows += [["sum", None, None, p.cpu_us, p.cores]]
        call.out.table(["process", "role", "thread", "CPU us/key", "cores"], rows)


# ---- a cluster beside its floors ----


async def _bench(call: Call, plan: Plan, folder: Path, nodes: int) -> None:
    async with _cluster(call, folder, nodes) as options:
        document = await _measure(call, plan, folder, options)
    if call.out.as_json:
        call.out.document(document)
    else:
        _print(call, document)


@contextlib.asynccontextmanager
async def _cluster(call: Call, folder: Path, nodes: int) -> AsyncIterator[ConnectOptions]:
    """The cluster that was named, or a private one. Raises ClusterError."""
    from bus_kv.cli.local_cluster import LocalCluster

    if call.names_nats:
        yield call.options
        return
    call.out.note(f"starting a private cluster of {nodes} node(s) in {folder}")
    async with LocalCluster(folder, nodes=nodes, root=call.options.root) as cluster:
        await cluster.wait_healthy()
        yield cluster.connection


async def _measure(call: Call, plan: Plan, folder: Path, options: ConnectOptions) -> dict[str, Any]:
    data = plan.data(f"bench-{secrets.token_hex(4)}/")
    results = await ask(options, lambda db: _measure_all(call, db, plan, data))
    floor = await _measure_floor(call, plan, folder, options, len(data.keys[0]))
    return {
        "settings": _settings(call, plan),
        "floor": floor,
        "workloads": [_with_ratios(result, floor, plan) for result in results],
    }


def _settings(call: Call, plan: Plan) -> dict[str, Any]:
    return {"private_cluster": not call.names_nats, **plan.to_json()}


async def _measure_all(call: Call, db: Client, plan: Plan, data: Data) -> list[dict[str, Any]]:
    call.out.note(f"loading {plan.keys:,} keys")
    await load(db, data)
    results = []
    try:
        for workload in plan.workloads:
            for callers in dict.fromkeys([1, plan.callers_of(workload)]):
                call.out.note(f"measuring {workload} with {callers} caller(s)")
                result = await run(db, workload, data, callers, plan.timing)
                results.append({"workload": str(workload), **result.to_json()})
    finally:
        if call.names_nats:
            await in_parts(data.keys, db.delete_many)
    return results


# ---- the floors ----


async def _measure_floor(
    call: Call, plan: Plan, folder: Path, options: ConnectOptions, key_bytes: int
) -> dict[str, Any]:
    from bus_kv.cli.floor import FloorError, measure_echo, measure_log

    call.out.note("measuring the floors: NATS echo, log commit")
    body_bytes, callers = key_bytes + plan.value_bytes, [*dict.fromkeys([1, plan.callers])]
    entries = [*dict.fromkeys([1, plan.callers, MANY])]
    try:
        echo = await measure_echo(options, folder, body_bytes, callers, plan.timing)
        log = await measure_log(folder, key_bytes, plan.value_bytes, entries, plan.timing)
    except FloorError as error:
        raise CommandFailed("CLUSTER", str(error)) from None
    return {"echo": [result.to_json() for result in echo], "log": log}


def _with_ratios(result: dict[str, Any], floor: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Throughput in relation to the floors; None where a floor has no say."""
    name, callers = result["workload"], result["callers"]
    echo_callers = plan.callers if Workload(name).is_many else callers
    entry_operations = {Workload.PUT: callers, Workload.PUT_MANY: MANY}.get(name)
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


_BENCHES = {
    "": _bench, _FOLD: _bench_fold, _JETSTREAM: _bench_jetstream, _PROFILE: _bench_profile,
}  # fmt: skip
