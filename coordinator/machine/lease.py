"""Which coordinator is the active one: a record in the store that its holder keeps renewing.

The lease makes one coordinator act at a time, for economy; safety never rests on it, since every change of the map is
a compare-and-set. Nobody compares clocks: a record that stood still for `lease_s` on one's own clock may be taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bus_kv.core.machine import StoreCas, StoreGet
from bus_kv.core.timers import Timers
from bus_kv.knobs import SECOND_NS

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.core.machine import Effect, Stored

KEY = "leader"


class Lease:
    def __init__(
        self, holder: str, nonce: str, lease_s: float, next_correlation: Callable[[], int]
    ):
        self.active = False
        self.holder = ""
        """Who holds the lease, as far as is known; empty when nobody does."""
        self._record: dict[str, Any] = {"holder": holder, "nonce": nonce, "count": 0}
        self._lease_ns = int(lease_s * SECOND_NS)
        self._next_correlation = next_correlation
        self._pending = 0
        self._seen: tuple[int, dict[str, Any] | None] = (0, None)
        """(revision, record) as last read or written."""
        self._still_since_ns = 0
        self._timers = Timers()

    def start(self, now_ns: int) -> list[Effect]:
        return self._read(now_ns)

    def next_deadline_ns(self) -> int:
        return self._timers.next_ns

    def on_deadline(self, now_ns: int) -> list[Effect]:
        """Renew, look again, or give up on an answer."""
        if not self._timers.pop_due(now_ns):
            return []
        return self._write(now_ns) if self.active and not self._pending else self._read(now_ns)

    def owns(self, correlation: int) -> bool:
        return correlation == self._pending

    def on_stored(self, stored: Stored, now_ns: int) -> list[Effect]:
        """Take an answer of the store; `active` may have changed."""
        self._pending = 0
        if stored.failure is not None:
            return self._read(now_ns) if stored.conflict else self._later(now_ns)
        if self._seen[1] != stored.document:
            self._still_since_ns = now_ns
        self._seen = (stored.revision, stored.document)
        mine = stored.document is not None and stored.document["nonce"] == self._record["nonce"]
        self.holder = stored.document["holder"] if stored.document else ""
        self.active = mine
        free = not self.holder or now_ns - self._still_since_ns >= self._lease_ns
        return self._write(now_ns) if free and not mine else self._later(now_ns)

    def release(self) -> list[Effect]:
        """Let the next coordinator take over at once."""
        if not self.active:
            return []
        self.active = False
        return [
            StoreCas(self._next_correlation(), KEY, self._seen[0], {**self._record, "holder": ""})
        ]

    def _later(self, now_ns: int) -> list[Effect]:
        self._timers.start("look", now_ns + self._lease_ns // 3)
        return []

    def _read(self, now_ns: int) -> list[Effect]:
        self._later(now_ns)
        self._pending = self._next_correlation()
        return [StoreGet(self._pending, KEY)]

    def _write(self, now_ns: int) -> list[Effect]:
        self._later(now_ns)
        self._pending = self._next_correlation()
        self._record = {**self._record, "count": self._record["count"] + 1}
        return [StoreCas(self._pending, KEY, self._seen[0], self._record)]
