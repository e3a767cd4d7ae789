"""The command line `bus-kv`. Each file beside this one registers the commands of one concern."""

from __future__ import annotations

import os
import sys

import typer

import bus_kv
from bus_kv.cli import (
    admin,
    bench,
    chaos,
    cluster,
    data,
    doctor,
    explain,
    load,
    oplog,
    query,
    serve,
    up,
)
from bus_kv.cli.command import Call, command
from bus_kv.runtime.process import FAILED, OK

app = typer.Typer(
    name="bus-kv",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""bus_kv: a distributed key-value database on NATS.

    Start a cluster with bus-kv up; then, in another terminal: bus-kv put apple fruit, bus-kv get
    apple.

    Exit codes: 0 done, 1 failed (also get of an absent key), 2 wrong usage, 3 cluster unreachable.
    """,
)


async def version(call: Call) -> int:
    """Print the version of bus_kv."""
    if call.out.as_json:
        call.out.document({"version": bus_kv.__version__})
    else:
        call.out.line(f"bus-kv {bus_kv.__version__}")
    return OK


for part in (up, serve, data, load, query, oplog, cluster, admin, explain, doctor, bench, chaos):
    part.register(app)
command(app, "version")(version)


def main() -> int:
    """Run the command line. Whatever goes wrong, the user sees a line and not a traceback."""
    try:
        app(prog_name="bus-kv")
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python must not complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if os.environ.get("BUS_KV_LOG", "").lower() == "debug":
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"bus-kv: INTERNAL: {reason}: set BUS_KV_LOG=debug to see where", file=sys.stderr)
        return FAILED
    return OK


if __name__ == "__main__":
    sys.exit(main())
