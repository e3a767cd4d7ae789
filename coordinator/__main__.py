"""`python -m coordinator`: one coordinator process. `bus-kv serve coordinator` starts it; options are the same."""

from __future__ import annotations

import argparse
import os
import sys

from bus_kv.runtime.connection import ConnectionConfigError
from bus_kv.runtime.process import FAILED, USAGE, run_process
from bus_kv.runtime.serve_options import add_connection, add_knobs, connection_of, knobs_of
from bus_kv.subjects import is_id
from coordinator.host import CoordinatorOptions, serve_coordinator
from observability.log import set_up_logging


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bus-kv serve coordinator", description="Run one coordinator."
    )
    parser.add_argument(
        "--id", required=True, help="name of the coordinator, unique in the cluster"
    )
    add_connection(parser)
    add_knobs(parser)
    arguments = parser.parse_args()
    if not is_id(arguments.id):
        print("bus-kv: --id has 1 to 64 letters, digits, '-' and '_'", file=sys.stderr)
        return USAGE
    set_up_logging(arguments.id)
    try:
        connection = connection_of(arguments, os.environ, f"bus_kv coordinator {arguments.id}")
        options = CoordinatorOptions(arguments.id, connection, knobs_of(arguments))
    except (ConnectionConfigError, ValueError) as error:
        print(f"bus-kv: {error}", file=sys.stderr)
        return FAILED
    return run_process(lambda stop: serve_coordinator(options, stop))


if __name__ == "__main__":
    sys.exit(main())
