"""`bus-kv doctor`: what is wrong with a cluster, and what to do about it."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bus_kv.cli.command import Call, CommandFailed, ask, command
from bus_kv.client.calls import NoCoordinator
from bus_kv.errors import BusKVError, OutcomeUnknown
from bus_kv.runtime.process import FAILED, OK

if TYPE_CHECKING:
    from bus_kv.client.client import Client

COORDINATOR_WAIT_S = 3.0
"""An active coordinator answers at once; a standby never."""
_QUESTION = (
    "Make the newest map that nodes remember the map again? Do this only when the map's store has "
    "lost what it had, with as many nodes running as there are."
)


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    ok: bool
    found: str
    advice: str | None = None


def register(app: typer.Typer) -> None:
    command(app, "doctor")(doctor)


async def doctor(
    call: Call,
    restore_map: Annotated[
        bool,
        typer.Option("--restore-map", help="have the nodes' newest map in force again"),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="without asking")] = False,
) -> int:
    """Look for what is wrong with the cluster and say what to do. Exit code 1 if anything is.

    When the store of the shard map has lost it, or holds an older one, nodes go on serving and
    nothing can be changed; --restore-map puts the newest map that any node remembers in force.

    - `bus-kv doctor`
    - `bus-kv doctor --restore-map`
    """
    if restore_map:
        return await _restore_map(call, yes)
    findings = await ask(call.options, _examine)
    if call.out.as_json:
        call.out.document({"checks": [asdict(finding) for finding in findings]})
    else:
        rows = [[f.check, "ok" if f.ok else "PROBLEM", f.found, f.advice] for f in findings]
        call.out.table(["check", "result", "found", "advice"], rows)
    return OK if all(finding.ok for finding in findings) else FAILED


async def _restore_map(call: Call, yes: bool) -> int:
    if not yes and not _is_confirmed():
        raise CommandFailed("NOT_CONFIRMED", "nothing was changed; --yes confirms in advance")
    reply = await ask(call.options, lambda db: db.admin("restore", {}))
    if call.out.as_json:
        call.out.document(reply)
    else:
        call.out.line(f"restored: map version {reply['map_version']} is in force")
    return OK


def _is_confirmed() -> bool:
    """Ask on stderr: stdout may be read by a program."""
    print(f"{_QUESTION} [y/N]: ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        print(file=sys.stderr)
    return answer.strip().lower() in ("y", "yes")


async def _examine(db: Client) -> list[Finding]:
    health, stats = await db.health(), await db.stats()
    return [_nodes(stats), *await _coordinator(db), _serving(health), _members(stats)]


def _nodes(stats: dict[str, Any]) -> Finding:
    lost = [node for node in stats["nodes"] if node["state"] in ("suspect", "down")]
    away = [f"{node['id']} is {node['state']}" for node in lost]
    found = f"{stats['healthy_nodes']} of {stats['total_nodes']} are up"
    if not away:
        return Finding("nodes", True, found)
    return Finding("nodes", False, f"{found}; {', '.join(away)}", "start it: bus-kv serve node")


async def _coordinator(db: Client) -> list[Finding]:
    try:
        async with asyncio.timeout(COORDINATOR_WAIT_S):
            told = await db.admin("check", {})
    except (NoCoordinator, OutcomeUnknown, TimeoutError):
        advice = "start one: bus-kv serve coordinator; if one runs, see that JetStream answers"
        found = "none is active: reads and writes go on, no shard changes hands"
        return [Finding("coordinator", False, found, advice)]
    except BusKVError as error:
        return [Finding("coordinator", False, error.message, "look again in a moment")]
    active = Finding("coordinator", True, "one is active")
    version = f"version {told['map_version']}"
    if not told["is_behind"]:
        return [active, Finding("map", True, version)]
    found = f"the store has {version}, and nodes remember a newer one"
    return [active, Finding("map", False, found, "bus-kv doctor --restore-map")]


def _serving(health: dict[str, Any]) -> Finding:
    if health["status"] == "ok":
        return Finding("service", True, "every shard is served")
    advice = "nodes that are away: start them; disks that are full: make room"
    return Finding("service", False, "; ".join(health["reasons"]), advice)


def _members(stats: dict[str, Any]) -> Finding:
    short = [shard for shard in stats["shards"] if shard["under_replicated"]]
    if not short:
        return Finding("members", True, "every shard has as many as it should")
    names = ", ".join(shard["id"] for shard in short[:10])
    found = f"too few in {len(short)} of {stats['total_shards']} shards: {names}"
    advice = "they come back while nodes are up: see bus-kv shards list"
    return Finding("members", False, found, advice)
