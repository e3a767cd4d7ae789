"""The one clock: nanoseconds since the Unix epoch that never go back within a process."""

from __future__ import annotations

import time


class Clock:
    """Wall time read once, then carried forward by the monotonic clock, which NTP slews but never steps."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def now_ns(self) -> int:
        return self._offset_ns + time.monotonic_ns()
