"""When Python looks for garbage that reference counts do not free.

Left alone it looks once so and so many objects more were made than freed. A node frees one record for nearly every one
that it makes, so that took long, and then tens of thousands of new ones were looked through at once: pauses of ten
milliseconds. Looked at soon, while the processor still has them at hand, they cost a third of that, a bit at a time.
Records that were looked at once are never looked at again, but with all else, which is seldom: that is left to Python.
"""

from __future__ import annotations

import gc
from time import perf_counter_ns

from bus_kv.knobs import MILLISECOND_NS

THRESHOLDS = (10_000, 10, 1000)
"""For what happens between turns, as in other threads; and for the oldest objects, which are many."""
INTERVAL_NS = 5 * MILLISECOND_NS
OLDER_EVERY = 16
"""So many looks at what is new, then one at what outlived them."""


def begin() -> None:
    """What is there at the start of a process stays: it is never looked at."""
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)


def end() -> None:
    """Else what libraries hold is still there at the end, and they complain."""
    gc.unfreeze()


class Collector:
    """Looks after a turn, if the last look was some time ago."""

    def __init__(self) -> None:
        self._looked_ns = 0
        self._looks = 0

    def after_turn(self) -> None:
        now_ns = perf_counter_ns()
        if now_ns - self._looked_ns < INTERVAL_NS:
            return
        self._looked_ns = now_ns
        self._looks += 1
        gc.collect(1 if self._looks % OLDER_EVERY == 0 else 0)
