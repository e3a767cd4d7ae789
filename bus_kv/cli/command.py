"""What all commands share: the options that every one takes, how it runs, and its exit code.

A command is an async function `(call, its own parameters…) -> exit code`. `command` registers it
and appends the options of every command to its signature, so they are defined once, here.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import secrets
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from bus_kv.cli.output import Output
from bus_kv.errors import BusKVError
from bus_kv.knobs import Knobs
from bus_kv.runtime.connection import OPTIONS, ConnectionConfigError, ConnectOptions
from bus_kv.runtime.process import FAILED, UNREACHABLE, USAGE
from bus_kv.runtime.serve_options import HELP

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from bus_kv.client.client import Client

    Command = Callable[..., Coroutine[Any, Any, int]]

T = TypeVar("T")

NATS_DEADLINE_S = 3.0
"""A command gives up after this long without a NATS server."""
NODE_PATIENCE_S = 1.0
"""A command without an answer for this long asks whether any node is there,"""
NODE_DEADLINE_S = 1.0
"""and gives up when none has answered after this."""

_PANEL = "Connection (also BUS_KV_* in the environment, or --config)"


class CommandFailed(Exception):
    """A command cannot go on, for a reason that is no answer of the cluster's."""

    def __init__(self, code: str, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code
        self.exit_code = exit_code


@dataclass
class Call:
    """One run of a command: where it prints, and how it reaches the cluster."""

    out: Output
    flags: dict[str, str | None]
    config: Path | None

    @cached_property
    def options(self) -> ConnectOptions:
        """Raises ConnectionConfigError."""
        return ConnectOptions.load(config=self.config, env=os.environ, flags=self.flags)

    @property
    def names_nats(self) -> bool:
        """Whether the user named NATS servers, rather than leaving it to the default."""
        given = self.flags["nats"] or os.environ.get("BUS_KV_NATS")
        return bool(given) or self.options.servers != ConnectOptions().servers


def command(app: typer.Typer, name: str) -> Callable[[Command], Command]:
    """Register an async function as a command of `app`; its docstring is the help."""

    def register(body: Command) -> Command:
        def invoke(**arguments: Any) -> None:
            flags = {option: arguments.pop(option) for option in OPTIONS}
            call = Call(Output(arguments.pop("json")), flags, arguments.pop("config"))
            raise typer.Exit(_run(call, body(call, **arguments)))

        own = [*inspect.signature(body, eval_str=True).parameters.values()][1:]
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*own, *_shared())]
        invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        invoke.__annotations__ = {p.name: p.annotation for p in parameters}
        invoke.__doc__ = body.__doc__
        app.command(name)(invoke)
        return body

    return register


def _shared() -> list[inspect.Parameter]:
    """The options of every command, as typer reads them."""
    as_json = Annotated[bool, typer.Option("--json", help="print one JSON document")]
    config_help = "TOML file with the options below"
    config = Annotated[Path | None, typer.Option(help=config_help, rich_help_panel=_PANEL)]
    connection = {
        name: Annotated[str | None, typer.Option(help=HELP[name], rich_help_panel=_PANEL)]
        for name in OPTIONS
    }
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter("json", keyword, default=False, annotation=as_json),
        inspect.Parameter("config", keyword, default=None, annotation=config),
        *(inspect.Parameter(n, keyword, default=None, annotation=a) for n, a in connection.items()),
    ]


def _run(call: Call, work: Coroutine[Any, Any, int]) -> int:
    """Run a command to its exit code; every failure becomes one line or one document."""
    import uvloop

    from bus_kv.client.calls import NoCoordinator
    from bus_kv.runtime.nats_bus import BusError, BusUnreachable
    from bus_kv.runtime.nats_server import NatsServerError

    be_quiet()
    try:
        return uvloop.run(work)
    except NoCoordinator as error:
        return _fail(call, "UNREACHABLE", error, UNREACHABLE)
    except BusKVError as error:
        call.out.failure(error.to_body())
        return FAILED
    except CommandFailed as error:
        return _fail(call, error.code, error, error.exit_code)
    except BusUnreachable as error:
        return _fail(call, "UNREACHABLE", error, UNREACHABLE)
    except BusError as error:
        return _fail(call, "NATS_REFUSED", error, FAILED)
    except NatsServerError as error:
        return _fail(call, "NATS_SERVER", error, FAILED)
    except ConnectionConfigError as error:
        return _fail(call, "USAGE", error, USAGE)
    except (KeyboardInterrupt, asyncio.CancelledError):
        return _fail(call, "INTERRUPTED", "stopped before it was done", FAILED)


def _fail(call: Call, code: str, reason: Exception | str, exit_code: int) -> int:
    retry = exit_code == UNREACHABLE
    call.out.failure({"code": code, "message": str(reason), "retry": retry})
    return exit_code


def be_quiet() -> None:
    """A command tells its own outcome; what libraries log is shown when BUS_KV_LOG asks."""
    level = os.environ.get("BUS_KV_LOG", "").upper()
    if level in logging.getLevelNamesMapping():
        logging.basicConfig(level=level)
    else:
        logging.basicConfig(handlers=[logging.NullHandler()])


async def ask(options: ConnectOptions, work: Callable[[Client], Awaitable[T]]) -> T:
    """Connect, do `work(client)` and disconnect.

    Raises BusUnreachable without a NATS server, CommandFailed when no node of the cluster is there,
    BusKVError for every failure that the cluster answers with.
    """
    from bus_kv.client.client import Client

    db = Client(options, Knobs(), secrets.token_hex(8))
    await db.open(NATS_DEADLINE_S)
    try:
        return await _while_nodes_answer(options, db, work)
    finally:
        await db.close()


async def _while_nodes_answer(
    options: ConnectOptions, db: Client, work: Callable[[Client], Awaitable[T]]
) -> T:
    """The client retries for seconds: right for a shard that moves, wrong without a cluster."""
    task = asyncio.ensure_future(work(db))
    try:
        await asyncio.wait([task], timeout=NODE_PATIENCE_S)
        if not task.done() and not await _is_anybody_there(db):
            raise CommandFailed(
                "UNREACHABLE",
                f"NATS at {options.addresses} is there, but no node of a cluster with root "
                f"{options.root!r} answers: start one (bus-kv up, or bus-kv serve node) or "
                "correct --nats and --root",
                UNREACHABLE,
            )
        return await task
    finally:
        task.cancel()


async def _is_anybody_there(db: Client) -> bool:
    try:
        async with asyncio.timeout(NODE_DEADLINE_S):
            await db.health()
    except (TimeoutError, BusKVError):
        return False
    return True
