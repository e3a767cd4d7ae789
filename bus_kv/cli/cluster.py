"""Commands about the cluster: status, shards list, nodes list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from bus_kv.cli.command import Call, ask, command
from bus_kv.runtime.process import OK

if TYPE_CHECKING:
    from bus_kv.client.client import Client


def register(app: typer.Typer) -> None:
    command(app, "status")(status)
    shards = typer.Typer(no_args_is_help=True, help="The shards and where they are.")
    command(shards, "list")(shards_list)
    app.add_typer(shards, name="shards")
    nodes = typer.Typer(no_args_is_help=True, help="The nodes and how they are.")
    command(nodes, "list")(nodes_list)
    app.add_typer(nodes, name="nodes")


async def status(call: Call) -> int:
    """Tell whether the cluster is healthy, and what it holds.

    - `bus-kv status`
    - `bus-kv status --json`
    """
    health, stats = await ask(call.options, _health_and_stats)
    if call.out.as_json:
        call.out.document({"health": health, "stats": stats})
        return OK
    reasons = "; ".join(health["reasons"]) or "every shard is served"
    call.out.line(f"{health['status']}: {reasons}")
    fields = {
        "nodes": "total_nodes",
        "healthy": "healthy_nodes",
        "shards": "total_shards",
        "keys": "keys",
        "bytes": "bytes",
        "map version": "map_version",
        "latency ms": "average_latency_ms",
    }
    call.out.table([*fields], [[stats[name] for name in fields.values()]])
    return OK


async def _health_and_stats(db: Client) -> tuple[dict[str, Any], dict[str, Any]]:
    return await db.health(), await db.stats()


async def shards_list(call: Call) -> int:
    """List the shards in key order.

    Keys, bytes and load come with the heartbeats of the primaries; load counts the operations that
    the primary has answered since it started.
    """
    map, stats = await ask(call.options, _map_and_stats)
    reports = {report["id"]: report for report in stats["shards"]}
    shards = [shard | _shard_numbers(reports.get(shard["id"], {})) for shard in map["shards"]]
    if call.out.as_json:
        call.out.document({"shards": shards})
        return OK
    call.out.table(
        [
            "id",
            "keyspace",
            "start",
            "end",
            "state",
            "epoch",
            "primary",
            "members",
            "keys",
            "bytes",
            "load",
        ],
        [_shard_row(shard) for shard in shards],
    )
    return OK


def _shard_numbers(report: dict[str, Any]) -> dict[str, Any]:
    return {
        "keys": report.get("keys"),
        "bytes": report.get("bytes"),
        "load": report.get("operations"),
    }


def _shard_row(shard: dict[str, Any]) -> list[Any]:
    first = [
        shard[name] for name in ("id", "keyspace", "start", "end", "state", "epoch", "primary")
    ]
    return [*first, ",".join(shard["members"]), shard["keys"], shard["bytes"], shard["load"]]


async def nodes_list(call: Call) -> int:
    """List the nodes, with the replicas on each and the operations that these have answered."""
    map, stats = await ask(call.options, _map_and_stats)
    reports = {report["id"]: report for report in stats["nodes"]}
    nodes = [_with_report(node, reports.get(node["id"], {})) for node in map["nodes"]]
    if call.out.as_json:
        call.out.document({"nodes": nodes})
        return OK
    columns = ["id", "state", "zone", "weight", "replicas", "operations", "version", "incarnation"]
    call.out.table(columns, [[node[name] for name in columns] for node in nodes])
    return OK


def _with_report(node: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    return node | {name: report.get(name) for name in ("replicas", "operations", "version")}


async def _map_and_stats(db: Client) -> tuple[dict[str, Any], dict[str, Any]]:
    return await db.map(), await db.stats()
