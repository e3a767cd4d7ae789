"""Answers every message on a subject with its own bytes: what a request costs at least."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from typing import Any

from bus_kv.runtime.connection import ConnectionConfigError, ConnectOptions
from bus_kv.runtime.nats_bus import NatsBus
from bus_kv.runtime.process import USAGE, run_process
from bus_kv.runtime.serve_options import add_connection, connection_of


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bus_kv.cli.echo", description=__doc__)
    parser.add_argument("--subject", required=True)
    add_connection(parser)
    arguments = parser.parse_args()
    try:
        options = connection_of(arguments, os.environ, "bus_kv echo")
    except ConnectionConfigError as error:
        print(f"bus-kv: {error}", file=sys.stderr)
        return USAGE
    return run_process(lambda stop: echo(options, arguments.subject, stop))


async def echo(options: ConnectOptions, subject: str, stop: asyncio.Event) -> int:
    bus = NatsBus(options)
    await bus.open()

    async def on_message(message: Any) -> None:
        await bus.publish(message.reply, message.data)

    try:
        await bus.subscribe(subject, on_message)
        await stop.wait()
    finally:
        await bus.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
