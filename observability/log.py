"""Log lines of a server process: on stderr, one line each, with the process they come from."""

from __future__ import annotations

import logging
import os
import sys


def set_up_logging(name: str) -> None:
    """Log to stderr as `time name level message`. `BUS_KV_LOG` sets the level: debug, info (default), warning."""
    level = os.environ.get("BUS_KV_LOG", "info").upper()
    logging.basicConfig(
        level=logging.getLevelNamesMapping().get(level, logging.INFO),
        stream=sys.stderr,
        format=f"%(asctime)s {name} %(levelname)s %(message)s",
    )
    # The library reports each failed attempt to reconnect with a traceback; nats_bus says it in one line.
    logging.getLogger("nats").setLevel(logging.CRITICAL)
