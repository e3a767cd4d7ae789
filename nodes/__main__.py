"""`python -m nodes`: one node process. `bus-kv serve node` starts it; options are the same."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from bus_kv.runtime.connection import ConnectionConfigError
from bus_kv.runtime.process import FAILED, USAGE, run_process
from bus_kv.runtime.serve_options import add_connection, add_knobs, connection_of, knobs_of
from bus_kv.subjects import is_id
from nodes.host import NodeOptions, serve_node
from observability.log import set_up_logging


def main() -> int:
    parser = argparse.ArgumentParser(prog="bus-kv serve node", description="Run one node.")
    parser.add_argument("--id", required=True, help="name of the node, unique in the cluster")
    parser.add_argument("--data", required=True, type=Path, help="directory for its log")
    parser.add_argument("--zone", help="where it runs, for placement")
    parser.add_argument("--weight", type=int, default=1, help="share of the load, relative")
    parser.add_argument(
        "--cache-mb", type=int, help="bound of the values held in memory (default 256)"
    )
    parser.add_argument(
        "--rebuild", action="store_true",
        help="set the state (state.duckdb) aside and build it again from the log",
    )  # fmt: skip
    add_connection(parser)
    add_knobs(parser)
    arguments = parser.parse_args()
    if not is_id(arguments.id):
        print("bus-kv: --id has 1 to 64 letters, digits, '-' and '_'", file=sys.stderr)
        return USAGE
    if arguments.cache_mb is not None and arguments.cache_mb < 1:
        print("bus-kv: --cache-mb is 1 or more", file=sys.stderr)
        return USAGE
    if arguments.weight < 1 or arguments.zone == "":
        print("bus-kv: --weight is 1 or more, --zone has a name", file=sys.stderr)
        return USAGE
    set_up_logging(arguments.id)
    try:
        connection = connection_of(arguments, os.environ, f"bus_kv node {arguments.id}")
        knobs = knobs_of(arguments)
        if arguments.cache_mb is not None:
            knobs = replace(knobs, cache_bytes=arguments.cache_mb << 20)
        options = NodeOptions(
            arguments.id, arguments.data, connection, knobs, arguments.zone, arguments.weight,
            arguments.rebuild,
        )  # fmt: skip
    except (ConnectionConfigError, ValueError) as error:
        print(f"bus-kv: {error}", file=sys.stderr)
        return FAILED
    return run_process(lambda stop: serve_node(options, stop))


if __name__ == "__main__":
    sys.exit(main())
