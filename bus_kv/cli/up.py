"""`bus-kv up`: a development cluster in the foreground."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bus_kv.cli.command import Call, CommandFailed, command
from bus_kv.runtime.process import OK

if TYPE_CHECKING:
    from bus_kv.cli.local_cluster import LocalCluster

DEFAULT_URL = "nats://127.0.0.1:4222"


def register(app: typer.Typer) -> None:
    command(app, "up")(up)


async def up(
    call: Call,
    nodes: Annotated[int, typer.Option(min=1, max=64, help="how many nodes")] = 3,
    data: Annotated[Path, typer.Option(help="directory for data and logs")] = Path("bus_kv-data"),
) -> int:
    """Run a development cluster in the foreground: nats-server, a coordinator, nodes.

    Ctrl-C ends it. With --nats it uses a server that is there already; else it starts one, on port
    4222 or the next free one. Data stay in --data and are there again when it is started again.
    With --json it prints one document when it is healthy.

    - `bus-kv up`
    - `bus-kv up --nodes 1 --data /tmp/try`
    - `bus-kv up --nats nats://127.0.0.1:4222`
    """
    from bus_kv.cli.local_cluster import ClusterError, LocalCluster
    from bus_kv.runtime.nats_server import next_free_port

    options = call.options
    if call.names_nats:
        cluster = LocalCluster(data, nodes=nodes, connection=options)
    else:
        cluster = LocalCluster(data, nodes=nodes, root=options.root, port=next_free_port())
    stop = _stop_on_signal()
    try:
        async with cluster:
            await _stay(call, cluster, stop)
            call.out.line("stopping")
    except ClusterError as error:
        raise CommandFailed("CLUSTER", str(error)) from None
    return OK


def _stop_on_signal() -> asyncio.Event:
    """Set by Ctrl-C or SIGTERM. A second one changes nothing: stopping has its own deadline."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    return stop


async def _stay(call: Call, cluster: LocalCluster, stop: asyncio.Event) -> None:
    """Until `stop`. What dies meanwhile is reported, and the rest goes on."""
    _introduce(call, cluster)
    loop = asyncio.get_running_loop()
    tasks = [
        loop.create_task(cluster.watch(call.out.warning)),
        loop.create_task(_announce_health(call, cluster)),
    ]
    try:
        await stop.wait()
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task


def _introduce(call: Call, cluster: LocalCluster) -> None:
    out, names = call.out, ", ".join(cluster.pids)
    own = "" if call.names_nats else " (started here)"
    out.line(f"NATS       {', '.join(_shown(cluster))}{own}")
    out.line(f"processes  {names}")
    out.line(f"data       {cluster.folder}")


def _shown(cluster: LocalCluster) -> list[str]:
    """The servers' URLs without what may be a password."""
    return [f"nats://{address}" for address in cluster.connection.addresses.split(", ")]


async def _announce_health(call: Call, cluster: LocalCluster) -> None:
    from bus_kv.cli.local_cluster import ClusterError

    try:
        health = await cluster.wait_healthy()
    except ClusterError as error:
        return call.out.warning(str(error))
    if call.out.as_json:
        return call.out.document(
            {
                "status": health["status"],
                "nats": _shown(cluster),
                "root": cluster.connection.root,
                "data": str(cluster.folder),
                "processes": cluster.pids,
            }
        )
    call.out.line(f"healthy    {health['nodes']} nodes, {health['shards']} shard(s)")
    return _suggest(call, cluster)


def _suggest(call: Call, cluster: LocalCluster) -> None:
    """Commands to try, as they have to be typed for this very cluster."""
    url, root = _shown(cluster)[0], cluster.connection.root
    flags = "" if url == DEFAULT_URL else f" --nats {url}"
    flags += "" if root == "bkv" else f" --root {root}"
    server = "" if url == DEFAULT_URL else f" -s {url}"
    call.out.line("\nTry in another terminal:")
    call.out.line(f"  bus-kv put apple fruit{flags}")
    call.out.line(f"  bus-kv get apple{flags}")
    call.out.line(f"""  nats{server} req {root}.put '{{"key":"pear","value":"fruit"}}'""")
    call.out.line(f"  bus-kv scan{flags}")
    call.out.line(f"  bus-kv status{flags}")
    call.out.line("\nCtrl-C ends it; the data stay.")
