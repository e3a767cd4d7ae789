"""What every server process does around its driver: arguments, signals, exit codes, one clear line on failure."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from typing import TYPE_CHECKING

from bus_kv.runtime import collector
from bus_kv.runtime.connection import ConnectionConfigError
from bus_kv.runtime.nats_bus import BusError, BusUnreachable

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

log = logging.getLogger("bus_kv.process")

STOP_TRIES, STOP_TRY_S = 10, 0.2
OK, FAILED, USAGE, UNREACHABLE = 0, 1, 2, 3
"""Exit codes of every command."""


class ProcessError(Exception):
    """The process cannot go on; the message is for the operator."""


def run_process(main: Callable[[asyncio.Event], Coroutine[None, None, int]]) -> int:
    """Run `main(stop)` on uvloop; `stop` is set by SIGINT or SIGTERM. Returns the exit code."""
    import uvloop

    if not __debug__:
        sys.exit("bus_kv: do not run with -O: its assertions guard your data")
    # A commit's thread gets the interpreter back soon, also while a turn is busy.
    sys.setswitchinterval(0.0002)
    collector.begin()
    try:
        return uvloop.run(_with_signals(main))
    except BusUnreachable as error:
        return _fail(error, UNREACHABLE)
    except (BusError, ProcessError, ConnectionConfigError) as error:
        return _fail(error, FAILED)
    except KeyboardInterrupt:
        return OK
    except Exception as error:
        # A broken invariant: stop rather than serve on; the log at debug level says where.
        log.debug("internal failure", exc_info=True)
        return _fail(
            f"internal failure, this process stops: {error!r}; "
            "please report it with the output of BUS_KV_LOG=debug",
            FAILED,
        )
    finally:
        collector.end()


async def _with_signals(main: Callable[[asyncio.Event], Coroutine[None, None, int]]) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    return await main(stop)


async def unless_stopped(task: Coroutine[None, None, None], stop: asyncio.Event) -> bool:
    """Run `task` to its end, or until `stop`; False when it was stopped. Raises what the task raises."""
    work = asyncio.ensure_future(task)
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait([work, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if work.done():
        work.result()
        return True
    for _ in range(STOP_TRIES):
        # Once may not do: wait_for, by which nats-py connects, loses one that meets the end of what it waits for.
        work.cancel()
        if (await asyncio.wait([work], timeout=STOP_TRY_S))[0]:
            break
    return False


def _fail(error: Exception | str, code: int) -> int:
    print(f"bus-kv: {error}", file=sys.stderr, flush=True)
    return code
