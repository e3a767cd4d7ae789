"""Commands about the cluster: status, shards, nodes list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from bus_kv.cli.admin import shards_transfer
from bus_kv.cli.command import Call, ask, command
from bus_kv.runtime.process import OK

if TYPE_CHECKING:
    from bus_kv.client.client import Client

STATUS_SHARDS_MAX = 20


def register(app: typer.Typer) -> None:
    command(app, "status")(status)
    shards = typer.Typer(no_args_is_help=True, help="The shards and where they are.")
    command(shards, "list")(shards_list)
    command(shards, "transfer")(shards_transfer)
    app.add_typer(shards, name="shards")
    nodes = typer.Typer(no_args_is_help=True, help="The nodes and how they are.")
    command(nodes, "list")(nodes_list)
    app.add_typer(nodes, name="nodes")


async def status(call: Call) -> int:
    """Tell whether the cluster is healthy, what it holds, and which shards need attention.

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
    _show_replicas(call, stats["shards"])
    for suspect in stats["suspects"]:
        ago_s = suspect["age_ms"] / 1000
        call.out.line(
            f"suspected: {suspect['node']}, by {suspect['by']} {ago_s:,.1f} s ago: {suspect['reason']}"
        )
    return OK


async def _health_and_stats(db: Client) -> tuple[dict[str, Any], dict[str, Any]]:
    return await db.health(), await db.stats()


def _show_replicas(call: Call, shards: list[dict[str, Any]]) -> None:
    """A row for each shard, those with too few members or with learners first."""
    calm = [s for s in shards if not (s["under_replicated"] or _in_role(s, "learner"))]
    needy = [shard for shard in shards if shard not in calm]
    rows = [_replicas_row(shard) for shard in [*needy, *calm][:STATUS_SHARDS_MAX]]
    if rows:
        call.out.line()
        call.out.table(["shard", "primary", "members", "learners", "missing", "lag"], rows)
    if len(shards) > STATUS_SHARDS_MAX:
        call.out.note(f"of {len(shards)} shards; all of them: bus-kv shards list")


def _replicas_row(report: dict[str, Any]) -> list[Any]:
    members = [replica["node"] for replica in report["replicas"] if replica["role"] != "learner"]
    missing = max(report["members_wanted"] - len(members), 0)
    learners = ",".join(_in_role(report, "learner")) or None
    return [
        report["id"], report["primary"], ",".join(members), learners, missing, _lag_text(report),
    ]  # fmt: skip


def _in_role(report: dict[str, Any], role: str) -> list[str]:
    return [replica["node"] for replica in report["replicas"] if replica["role"] == role]


def _lag_text(report: dict[str, Any]) -> str | None:
    """Who lags behind the primary, and by how many operations; None when nobody does, as far as is known."""
    lags = [f"{r['node']} {r['lag']:,}" for r in report.get("replicas", ()) if r["lag"]]
    return ", ".join(lags) or None


async def shards_list(call: Call) -> int:
    """List the shards in key order.

    What is told of replicas, keys, bytes and load comes with heartbeats; load counts the operations
    that the primary has answered since it started, lag those that a replica is behind it, missing
    the members that are too few.

    - `bus-kv shards list`
    - `bus-kv shards list --json`
    """
    map, stats = await ask(call.options, _map_and_stats)
    reports = {report["id"]: report for report in stats["shards"]}
    shards = [shard | _shard_numbers(reports.get(shard["id"], {})) for shard in map["shards"]]
    if call.out.as_json:
        call.out.document({"shards": shards})
        return OK
    columns = [
        "id", "keyspace", "start", "end", "state", "epoch", "primary", "members", "learners",
        "missing", "lag", "keys", "bytes", "load",
    ]  # fmt: skip
    call.out.table(columns, [_shard_row(shard) for shard in shards])
    return OK


def _shard_numbers(report: dict[str, Any]) -> dict[str, Any]:
    numbers = {name: report.get(name) for name in ("keys", "bytes", "members_wanted")}
    return numbers | {
        "load": report.get("operations"),
        "under_replicated": report.get("under_replicated"),
        "replicas": report.get("replicas", []),
    }


def _shard_row(shard: dict[str, Any]) -> list[Any]:
    names = ("id", "keyspace", "start", "end", "state", "epoch", "primary")
    wanted, members = shard["members_wanted"], shard["members"]
    missing = None if wanted is None else max(wanted - len(members), 0)
    roles = [",".join(members), ",".join(shard["learners"]) or None, missing, _lag_text(shard)]
    return [*(shard[n] for n in names), *roles, shard["keys"], shard["bytes"], shard["load"]]


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
