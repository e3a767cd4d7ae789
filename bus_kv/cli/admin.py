"""Commands that change who does what, asked of the active coordinator: failover run, shards transfer, config."""

from __future__ import annotations

import contextlib
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bus_kv.cli.command import Call, ask, command
from bus_kv.cli.data import Level
from bus_kv.errors import KeyspaceUnknown
from bus_kv.runtime.process import OK

if TYPE_CHECKING:
    from bus_kv.client.client import Client

ShardId = Annotated[str, typer.Argument(metavar="SHARD", help="its id", show_default=False)]
Keyspace = Annotated[str, typer.Option(help="whose settings")]


class Setting(StrEnum):
    CONSISTENCY = "consistency"
    REPLICATION_FACTOR = "replication_factor"
    HEARTBEAT_INTERVAL_S = "heartbeat_interval_s"
    HEARTBEAT_MISSES_MAX = "heartbeat_misses_max"
    HEARTBEAT_GOOD_MIN = "heartbeat_good_min"
    AUTO_FAILOVER = "auto_failover"


OF_KEYSPACE = (Setting.CONSISTENCY, Setting.REPLICATION_FACTOR)
"""The others hold for the whole cluster."""


def register(app: typer.Typer) -> None:
    failover = typer.Typer(no_args_is_help=True, help="Replace the primary of a shard.")
    command(failover, "run")(failover_run)
    app.add_typer(failover, name="failover")
    config = typer.Typer(
        no_args_is_help=True, help="The settings of a keyspace and of the cluster."
    )
    command(config, "get")(config_get)
    command(config, "set")(config_set)
    app.add_typer(config, name="config")


async def failover_run(call: Call, shard: ShardId) -> int:
    """Have another member of a shard take over, as if its primary were lost.

    The old primary leaves, and comes back as a learner, then as a member. Nothing that was
    acknowledged at quorum is lost. To choose who takes over: bus-kv shards transfer.

    - `bus-kv failover run s1`
    - `bus-kv failover run s1 --json`
    """
    reply = await ask(call.options, lambda db: db.admin("failover", {"shard": shard}))
    _tell_shard(call, reply)
    return OK


async def shards_transfer(
    call: Call,
    shard: ShardId,
    to: Annotated[
        str, typer.Option(metavar="NODE", help="the member that takes over", show_default=False)
    ],
) -> int:
    """Make a member of a shard its primary; the old one stays a member.

    - `bus-kv shards transfer s1 --to n2`
    """
    reply = await ask(call.options, lambda db: db.admin("transfer", {"shard": shard, "to": to}))
    _tell_shard(call, reply)
    return OK


def _tell_shard(call: Call, shard: dict[str, Any]) -> None:
    if call.out.as_json:
        return call.out.document(shard)
    roles = f"members {', '.join(shard['members'])}"
    if shard["learners"]:
        roles += f"; learners {', '.join(shard['learners'])}"
    served = f"shard {shard['id']} is served by {shard['primary']} under epoch {shard['epoch']}"
    return call.out.line(f"{served}; {roles}")


async def config_get(call: Call, keyspace: Keyspace = "default") -> int:
    """Show the settings of a keyspace, and those of the whole cluster.

    - `bus-kv config get`
    - `bus-kv config get --keyspace logs --json`
    """
    settings = await ask(call.options, lambda db: _settings(db, keyspace))
    if call.out.as_json:
        call.out.document(settings)
    else:
        names = ("policy", *map(str, Setting))
        call.out.table(["name", "value"], [[name, _text(settings.get(name))] for name in names])
    return OK


async def _settings(db: Client, keyspace: str) -> dict[str, Any]:
    """As `config set` replies, from the map: it can be read without a coordinator."""
    map = await db.map()
    keyspaces = map["keyspaces"]
    if keyspace not in keyspaces:
        known = ", ".join(keyspaces) or "none yet"
        raise KeyspaceUnknown(f"there is no keyspace {keyspace!r}; there are: {known}")
    return {"keyspace": keyspace, **keyspaces[keyspace], **map.get("settings", {})}


def _text(value: Any) -> str | None:
    if isinstance(value, bool):
        return "on" if value else "off"
    return None if value is None else str(value)


async def config_set(
    call: Call,
    name: Annotated[
        Setting,
        typer.Argument(metavar="NAME", help=" or ".join(Setting), show_default=False),
    ],
    value: Annotated[str, typer.Argument(metavar="VALUE", show_default=False)],
    keyspace: Keyspace = "default",
) -> int:
    """Change a setting of a keyspace or of the cluster, while it runs.

    - consistency (one, quorum, all): of requests that name none; running clients follow
    - replication_factor (1 to 7): members of each shard; they come and go one by one afterwards, as
      bus-kv shards list shows
    - heartbeat_interval_s, heartbeat_misses_max, heartbeat_good_min (whole cluster): how often nodes
      beat, how many beats may be missing, and how many it takes before a node is preferred again
    - auto_failover (on or off, whole cluster): off, another node becomes primary only by
      bus-kv failover run

    - `bus-kv config set consistency one`
    - `bus-kv config set replication_factor 5 --keyspace default`
    """
    fields = {"keyspace": keyspace, str(name): _value(name, value)}
    settings = await ask(call.options, lambda db: db.admin("config", fields))
    if call.out.as_json:
        call.out.document(settings)
    else:
        whose = f"keyspace {keyspace}" if name in OF_KEYSPACE else "the cluster"
        call.out.line(f"{name} of {whose} is {_text(settings[name])}")
    return OK


def _value(name: Setting, text: str) -> str | float | bool:
    if name is Setting.CONSISTENCY:
        if text not in [*Level]:
            raise typer.BadParameter(f"{text!r} is no consistency: one, quorum or all")
        return text
    if name is Setting.AUTO_FAILOVER:
        if text not in ("on", "off"):
            raise typer.BadParameter(f"{text!r} is neither on nor off")
        return text == "on"
    if name is Setting.HEARTBEAT_INTERVAL_S:
        with contextlib.suppress(ValueError):
            return float(text)
        raise typer.BadParameter(f"{text!r} is no number of seconds")
    if not (text.isascii() and text.isdigit()):
        what = str(name).replace("_", " ")
        raise typer.BadParameter(f"{text!r} is no {what}: write a whole number")
    return int(text)
