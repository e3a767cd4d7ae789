"""Named deadlines of a machine."""

from __future__ import annotations

NEVER_NS = 2**62
"""Later than any deadline."""


class Timers:
    """A deadline per name; the earliest tells the driver when to wake the machine."""

    def __init__(self) -> None:
        self._deadlines_ns: dict[str, int] = {}
        self.next_ns = NEVER_NS
        """The earliest: it is asked for much more often than it changes."""

    def start(self, name: str, deadline_ns: int) -> None:
        self._deadlines_ns[name] = deadline_ns
        self._changed()

    def start_once(self, name: str, deadline_ns: int) -> None:
        """Start it unless it runs already."""
        if name not in self._deadlines_ns:
            self.start(name, deadline_ns)

    def stop(self, name: str) -> None:
        if self._deadlines_ns.pop(name, None) is not None:
            self._changed()

    def runs(self, name: str) -> bool:
        return name in self._deadlines_ns

    def _changed(self) -> None:
        self.next_ns = min(self._deadlines_ns.values(), default=NEVER_NS)

    def pop_due(self, now_ns: int) -> list[str]:
        """Names whose deadline has passed, in the order in which they were started."""
        due = [name for name, deadline_ns in self._deadlines_ns.items() if deadline_ns <= now_ns]
        for name in due:
            del self._deadlines_ns[name]
        if due:
            self._changed()
        return due
