"""`bus-kv explain failover`: the last takeover as a story with times."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bus_kv.cli.command import Call, ask, command
from bus_kv.runtime.process import OK

if TYPE_CHECKING:
    from collections.abc import Iterator


def register(app: typer.Typer) -> None:
    explain = typer.Typer(no_args_is_help=True, help="Tell how something came about.")
    command(explain, "failover")(explain_failover)
    app.add_typer(explain, name="explain")


async def explain_failover(
    call: Call,
    shard: Annotated[
        str | None, typer.Argument(metavar="[SHARD]", help="its id", show_default=False)
    ] = None,
) -> int:
    """Tell the last takeover, of one shard or of any: who noticed what, who took over and why.

    Coordinators know the last five of each shard, and NATS keeps them in memory for those that
    start later; all of them with --json. While one happens: nats sub 'bkv.event.failover.>'

    - `bus-kv explain failover`
    - `bus-kv explain failover s1 --json`
    """
    fields = {} if shard is None else {"shard": shard}
    reply = await ask(call.options, lambda db: db.admin("failovers", fields))
    if call.out.as_json:
        call.out.document(reply)
    elif not reply["failovers"]:
        of_what = "any shard" if shard is None else f"shard {shard}"
        call.out.line(f"no takeover of {of_what} is known")
    else:
        for line in story_lines(reply["failovers"][0]):
            call.out.line(line)
    return OK


def story_lines(story: dict[str, Any]) -> Iterator[str]:
    """A takeover in words, a line for each step, with the time since its beginning."""
    times = story["times_ms"]
    begin_ms = min(times.values())
    began = datetime.fromtimestamp(begin_ms / 1000, UTC)
    yield (
        f"shard {story['shard']}: {story.get('new_primary')} took over from "
        f"{story['old_primary']} on {began:%Y-%m-%d at %H:%M:%S} UTC (epoch "
        f"{story['ended_epoch']} -> {story.get('epoch')})"
    )
    for name, tell in _STEPS.items():
        if times.get(name):
            yield f"{times[name] - begin_ms:>8,} ms  {tell(story)}"
    yield from _aftermath(story)


def _detecting(story: dict[str, Any]) -> str:
    suspected = story.get("suspected")
    if suspected is None or suspected["node"] != story["old_primary"]:
        return f"the last sign of life of {story['old_primary']}"
    return f"{suspected['by']} had no answer of {suspected['node']}: {suspected['reason']}"


def _recovering(story: dict[str, Any]) -> str:
    logs = ", ".join(f"{n} at {_place(end)}" for n, end in story.get("positions", {}).items())
    again = f", at attempt {story['attempts']}" if story.get("attempts", 1) > 1 else ""
    return (
        f"{story['coordinator']} gave {story['old_primary']} up: {story.get('cause')}. Logs as "
        f"heartbeats had told: {logs or 'none'}. {story.get('new_primary')} is to take over: "
        f"{story.get('choice')}{again}"
    )


def _sealed(story: dict[str, Any]) -> str:
    ends = ", ".join(f"{n} at {_place(end)}" for n, end in story.get("sealed", {}).items())
    return f"nothing more can be acknowledged under the old epoch; logs end: {ends or 'nowhere'}"


def _opened(story: dict[str, Any]) -> str:
    return f"{story['new_primary']} has the longest log, and a majority its opening entry"


def _completed(story: dict[str, Any]) -> str:
    return f"{story['new_primary']} serves; members {', '.join(story.get('members', ()))}"


_STEPS = {
    "detecting": _detecting, "recovering": _recovering, "sealed": _sealed, "opened": _opened,
    "completed": _completed,
}  # fmt: skip


def _place(position: Any) -> str:
    return f"({position[0]}, {position[1]})"


def _aftermath(story: dict[str, Any]) -> Iterator[str]:
    if story["state"] != "completed":
        yield "it is not finished; see `bus-kv status`"
    unknown = story.get("unknown_from_seq")
    if unknown is not None:
        yield (
            f"writes at ONE that {story['old_primary']} alone had are unknown from seq {unknown} "
            f"of epoch {story['longest'][0]}; nothing acknowledged at quorum or all is among them"
        )
    for node, last in story.get("cut", {}).items():
        yield (
            f"{node} came back and took what its log had behind seq {last} out of it; "
            "`bus-kv oplog --outcome rolled_back` lists that"
        )
