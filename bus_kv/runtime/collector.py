"""When a node collects garbage that reference counts do not free.

Python collects the young generation once so and so many objects more were made than freed. A node frees one record for
nearly every one that it makes, so that took long, and then tens of thousands of new ones were looked through at once:
pauses of ten milliseconds. Collected soon, while the processor still has them at hand, they cost less than that, a bit
at a time. A record is tracked until its first collection only. Collecting the oldest generation, which looks at
everything, is seldom, and left to Python.
"""

from __future__ import annotations

import gc
from time import perf_counter_ns

from bus_kv.knobs import MILLISECOND_NS

THRESHOLDS = (10_000, 10, 1000)
"""Python's own: for what is made between turns, as by other threads; and for the oldest generation."""
INTERVAL_NS = 5 * MILLISECOND_NS
OLDER_EVERY = 16
"""Of so many collections one takes the middle generation as well: what has outlived some."""


def begin() -> None:
    """What is there at the start of a process stays: it is never looked at."""
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)


def end() -> None:
    """Else what libraries hold is still there at the end, and they complain."""
    gc.unfreeze()


class Collector:
    """Collects after a turn, if the last time was a while ago."""

    def __init__(self) -> None:
        self._collected_ns = 0
        self._collections = 0

    def after_turn(self) -> None:
        now_ns = perf_counter_ns()
        if now_ns - self._collected_ns < INTERVAL_NS:
            return
        self._collected_ns = now_ns
        self._collections += 1
        gc.collect(1 if self._collections % OLDER_EVERY == 0 else 0)
