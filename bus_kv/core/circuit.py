"""Which nodes are silent at the moment, so that not every request has to find out for itself.

Only silence counts: what nobody listens to is told at once, costs nothing, and may be heard in the next moment.
"""

from __future__ import annotations


class Circuit:
    """Of a node that has failed, one request at a time is let through: a trial."""

    def __init__(self, trial_ns: int) -> None:
        self._trial_ns = trial_ns
        self._trials_ns: dict[str, int] = {}
        """Node that failed -> when the next trial may go."""

    def fail(self, node: str, now_ns: int) -> None:
        self._trials_ns[node] = now_ns + self._trial_ns

    def succeed(self, node: str) -> None:
        self._trials_ns.pop(node, None)

    def lets_through(self, node: str, now_ns: int) -> bool:
        """Whether a request may go to the node; if it is a trial, the next one has to wait."""
        at_ns = self._trials_ns.get(node)
        if at_ns is not None and now_ns < at_ns:
            return False
        if at_ns is not None:
            self.fail(node, now_ns)
        return True
