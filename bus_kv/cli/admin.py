"""Commands that change who does what, asked of the active coordinator: failover run, shards transfer, config."""

from __future__ import annotations

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


def register(app: typer.Typer) -> None:
    failover = typer.Typer(no_args_is_help=True, help="Replace the primary of a shard.")
    command(failover, "run")(failover_run)
    app.add_typer(failover, name="failover")
    config = typer.Typer(no_args_is_help=True, help="The settings of a keyspace.")
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
    """Show the settings of a keyspace.

    - `bus-kv config get`
    - `bus-kv config get --keyspace logs --json`
    """
    settings = await ask(call.options, lambda db: _settings(db, keyspace))
    if call.out.as_json:
        call.out.document(settings)
    else:
        names = ("policy", *map(str, Setting))
        call.out.table(["name", "value"], [[name, str(settings[name])] for name in names])
    return OK


async def _settings(db: Client, keyspace: str) -> dict[str, Any]:
    """As `config set` replies, from the map: it can be read without a coordinator."""
    keyspaces = (await db.map())["keyspaces"]
    if keyspace not in keyspaces:
        known = ", ".join(keyspaces) or "none yet"
        raise KeyspaceUnknown(f"there is no keyspace {keyspace!r}; there are: {known}")
    return {"keyspace": keyspace, **keyspaces[keyspace]}


async def config_set(
    call: Call,
    name: Annotated[
        Setting,
        typer.Argument(metavar="NAME", help=" or ".join(Setting), show_default=False),
    ],
    value: Annotated[str, typer.Argument(metavar="VALUE", show_default=False)],
    keyspace: Keyspace = "default",
) -> int:
    """Change a setting of a keyspace.

    - consistency (one, quorum, all): of requests that name none; running clients follow
    - replication_factor (1 to 7): members of each shard; they come and go one by one afterwards, as
      bus-kv shards list shows

    - `bus-kv config set consistency one`
    - `bus-kv config set replication_factor 5 --keyspace default`
    """
    fields = {"keyspace": keyspace, str(name): _value(name, value)}
    settings = await ask(call.options, lambda db: db.admin("config", fields))
    if call.out.as_json:
        call.out.document(settings)
    else:
        call.out.line(f"{name} of keyspace {keyspace} is {settings[name]}")
    return OK


def _value(name: Setting, text: str) -> str | int:
    if name is Setting.CONSISTENCY:
        if text not in [*Level]:
            raise typer.BadParameter(f"{text!r} is no consistency: one, quorum or all")
        return text
    if not (text.isascii() and text.isdigit()):
        raise typer.BadParameter(f"{text!r} is no replication factor: write a whole number")
    return int(text)
