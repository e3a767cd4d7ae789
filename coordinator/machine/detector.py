"""Which nodes are there: from their heartbeats, and from probes when somebody says that a node does not answer.

A node is down after too many intervals without a heartbeat, or at once when it is suspected and answers no probe. It is
there again with its first sign of life, but *unproven* until it has beaten some times in a row: others are preferred as
primaries. One that goes down again and again is also *held*, for longer each time: it is given nothing new to learn.

All of this is about speed. A node that is taken for dead and is not loses its part by the map, like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bus_kv.core.timers import NEVER_NS
from bus_kv.knobs import MILLISECOND_NS, SECOND_NS

if TYPE_CHECKING:
    from bus_kv.knobs import Knobs
    from bus_kv.protocol.messages import Heartbeat, Run
    from bus_kv.protocol.shard_map import Settings

OUTAGES_WINDOW = 60
"""Intervals for which an outage is remembered."""
HOLD_MAX = 2
"""Intervals that a flapping node is held at most: a shard without its third member is the greater risk."""
TOLD_PROBES = 2
"""A suspicion is told of with this probe: most of those who are busy and not gone answer the first."""
LATE_NS = SECOND_NS // 2
"""Who comes so late to a deadline of its own has been away itself, and has heard nobody meanwhile."""
DEAF_NS = 2 * SECOND_NS
"""After that the others get so much time to be back, too."""


@dataclass(slots=True)
class Suspicion:
    """Somebody had no answer of a node."""

    node: str
    by: str
    reason: str
    at_ns: int
    probes: int = 0
    due_ns: int = 0
    """When the next probe is sent, or the last one given up."""


@dataclass(slots=True)
class Outage:
    """A node went down."""

    node: str
    at_ns: int
    since_ns: int
    """When it was heard last, or when it was suspected."""
    cause: str
    suspicion: Suspicion | None = None


@dataclass(slots=True)
class _Seen:
    waited_ns: int
    """Since when the next heartbeat is waited for."""
    heard_ns: int = 0
    run: Run | None = None
    good: int = 0
    """Heartbeats in a row since it was down."""
    good_ns: int = 0
    outages_ns: list[int] = field(default_factory=list)
    held_until_ns: int = 0


class Detector:
    def __init__(self, knobs: Knobs, settings: Settings) -> None:
        self._knobs = knobs
        self.settings = settings
        self.down: set[str] = set()
        self.unproven: set[str] = set()
        self.held: set[str] = set()
        self.outages: dict[str, Outage] = {}
        """The last one of each node that has had one."""
        self.suspicions: dict[str, Suspicion] = {}
        """Nodes that are being probed."""
        self._seen: dict[str, _Seen] = {}
        self._probes: list[str] = []
        self._news: list[tuple[Suspicion, bool]] = []
        self._deaf_until_ns = 0

    @property
    def _interval_ns(self) -> int:
        return int(self.settings.heartbeat_interval_s * SECOND_NS)

    @property
    def _patience_ns(self) -> int:
        return self._interval_ns * self.settings.heartbeat_misses_max

    def heard_ns(self, node: str) -> int:
        """When it gave a sign of life last; 0 never."""
        seen = self._seen.get(node)
        return seen.heard_ns if seen else 0

    def fell_ns(self, node: str) -> int:
        """When it went down last; 0 never."""
        outage = self.outages.get(node)
        return outage.at_ns if outage else 0

    # ---- signs of life ----

    def expect(self, node: str, now_ns: int) -> None:
        """The map has this node: it is waited for from now on, unless it was heard before."""
        self._seen.setdefault(node, _Seen(now_ns, good=self.settings.heartbeat_good_min))

    def on_heartbeat(self, beat: Heartbeat, now_ns: int, asked: bool = False) -> None:
        """A heartbeat, or the answer to a question for one, which proves no more than that the node is there."""
        self.expect(beat.node, now_ns)
        seen = self._seen[beat.node]
        self._clear(beat.node)
        if seen.run not in (None, beat.run) and beat.node not in self.down:
            self._fall(beat.node, "it has restarted", seen.heard_ns, now_ns)
        seen.run = beat.run
        if beat.leaving:
            self._fall(beat.node, "it has said goodbye", now_ns, now_ns, is_orderly=True)
            return
        if beat.node in self.down:
            self._come_back(beat.node, seen, now_ns)
        if not asked and now_ns - seen.good_ns >= self._interval_ns // 2:
            seen.good, seen.good_ns = seen.good + 1, now_ns
        seen.heard_ns = seen.waited_ns = now_ns
        self._prove(beat.node, seen, now_ns)

    def _come_back(self, node: str, seen: _Seen, now_ns: int) -> None:
        self.down.discard(node)
        window_ns = OUTAGES_WINDOW * self._interval_ns
        seen.outages_ns = [at_ns for at_ns in seen.outages_ns if now_ns - at_ns < window_ns]
        count = len(seen.outages_ns)
        if count > 1:
            intervals = min(2 ** min(count - 2, 10), HOLD_MAX)
            seen.held_until_ns = now_ns + intervals * self._interval_ns

    def _prove(self, node: str, seen: _Seen, now_ns: int) -> None:
        is_held = now_ns < seen.held_until_ns
        is_proven = seen.good >= self.settings.heartbeat_good_min and not is_held
        (self.held.add if is_held else self.held.discard)(node)
        (self.unproven.discard if is_proven else self.unproven.add)(node)

    def _fall(
        self, node: str, cause: str, since_ns: int, now_ns: int, is_orderly: bool = False
    ) -> None:
        seen = self._seen[node]
        self.down.add(node)
        self.unproven.add(node)
        self.held.discard(node)
        seen.good = 0
        if not is_orderly:
            seen.outages_ns.append(now_ns)
        suspicion = self.suspicions.pop(node, None)
        self.outages[node] = Outage(node, now_ns, since_ns, cause, suspicion)

    # ---- suspicions ----

    def on_suspicion(self, node: str, by: str, reason: str, now_ns: int) -> None:
        """Somebody says that a node does not answer: probe it, if it is one that should."""
        known = node in self._seen and node not in self.down
        if not known or node in self.suspicions or now_ns < self._deaf_until_ns:
            return
        suspicion = Suspicion(node, by, reason, now_ns)
        self.suspicions[node] = suspicion
        self._probe(suspicion, now_ns)

    def _probe(self, suspicion: Suspicion, now_ns: int) -> None:
        suspicion.probes += 1
        if suspicion.probes == TOLD_PROBES:
            self._news.append((suspicion, True))
        is_last = suspicion.probes >= self._knobs.probes_max
        wait_ns = self._knobs.probe_wait_ms * MILLISECOND_NS
        suspicion.due_ns = now_ns + (2 * wait_ns if is_last else wait_ns)
        self._probes.append(suspicion.node)

    def on_no_responders(self, node: str, now_ns: int) -> None:
        """Nobody listens where the node was probed: no need to wait for the rest of the time."""
        suspicion = self.suspicions.get(node)
        if suspicion is None:
            return
        if suspicion.probes >= self._knobs.probes_max:
            return self._give_up(suspicion, now_ns)
        pause_ns = self._knobs.probe_wait_ms * MILLISECOND_NS // 3
        suspicion.due_ns = min(suspicion.due_ns, now_ns + pause_ns)
        return None

    def _give_up(self, suspicion: Suspicion, now_ns: int) -> None:
        cause = f"it has answered none of {suspicion.probes} probes"
        self._fall(suspicion.node, cause, suspicion.at_ns, now_ns)

    def _clear(self, node: str) -> None:
        suspicion = self.suspicions.pop(node, None)
        if suspicion is not None and suspicion.probes >= TOLD_PROBES:
            self._news.append((suspicion, False))

    def take_probes(self) -> list[str]:
        """Nodes to be asked for a heartbeat now."""
        probes, self._probes = self._probes, []
        return probes

    def take_news(self) -> list[tuple[Suspicion, bool]]:
        """Suspicions that are worth telling (True), and those of them that have turned out to be wrong (False)."""
        news, self._news = self._news, []
        return news

    # ---- time ----

    def was_away(self, now_ns: int) -> None:
        """This process heard nobody for a while, by its own fault: everybody's time begins anew."""
        self._deaf_until_ns = now_ns + DEAF_NS
        for node in [*self.suspicions]:
            self._clear(node)
        for seen in self._seen.values():
            seen.waited_ns = now_ns

    def next_deadline_ns(self) -> int:
        candidates = [suspicion.due_ns for suspicion in self.suspicions.values()]
        for node, seen in self._seen.items():
            if node not in self.down:
                candidates.append(seen.waited_ns + self._patience_ns)
            if node in self.held:
                candidates.append(seen.held_until_ns)
        return min(candidates, default=NEVER_NS)

    def on_deadline(self, now_ns: int) -> None:
        deadline_ns = self.next_deadline_ns()
        if now_ns < deadline_ns:
            return
        if now_ns - deadline_ns > LATE_NS:
            self.was_away(now_ns)
        for suspicion in [s for s in self.suspicions.values() if s.due_ns <= now_ns]:
            if suspicion.probes < self._knobs.probes_max:
                self._probe(suspicion, now_ns)
            else:
                self._give_up(suspicion, now_ns)
        for node, seen in self._seen.items():
            if node not in self.down and now_ns - seen.waited_ns >= self._patience_ns:
                misses = self.settings.heartbeat_misses_max
                self._fall(node, f"{misses} heartbeats are missing", seen.waited_ns, now_ns)
            elif node in self.held and node not in self.down:
                self._prove(node, seen, now_ns)
