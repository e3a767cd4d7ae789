"""The story of every takeover: told on the bus as it happens, and kept for whoever asks later.

Coordinators learn stories from the bus only, their own ones too. So a standby knows how far one had come when the
active coordinator died, and goes on with it: a story is known by its shard and the epoch that it puts an end to.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from bus_kv.knobs import MILLISECOND_NS
from bus_kv.protocol.shard_map import ShardState
from bus_kv.subjects import is_id

if TYPE_CHECKING:
    from bus_kv.protocol.shard_map import Shard
    from coordinator.machine.attempt import Attempt
    from coordinator.machine.detector import Outage, Suspicion
    from coordinator.machine.plan import Heard

    Story = dict[str, Any]

KEPT_PER_SHARD = 5
SHARDS_MAX = 10_000
CUTS_MAX = 16
STATES = ("normal", "detecting", "recovering", "completed")
PHASES = ("detecting", "recovering", "sealed", "opened", "completed")
"""When each of these began, or was done; what is between two of them is a phase."""


class Failovers:
    def __init__(self, coordinator: str) -> None:
        self._coordinator = coordinator
        self._told: dict[str, dict[int, Story]] = {}
        """Shard -> epoch that came to its end -> story."""

    # ---- what is known ----

    def on_event(self, shard: str, story: dict[str, Any]) -> None:
        """A coordinator tells a story, or a node how it goes on. What is neither is passed over."""
        if type(story.get("cut_behind")) is int:
            return self._on_cut(shard, story)
        if not (is_id(shard) and _is_story(story)):
            return None
        if shard not in self._told and len(self._told) >= SHARDS_MAX:
            return None
        stories, ended = self._told.setdefault(shard, {}), story["ended_epoch"]
        known = stories.get(ended)
        if story["state"] == "normal":
            if known is not None and known["state"] == "detecting":
                del stories[ended]
            return None
        if known is not None and _progress(story) < _progress(known):
            return None  # told before the newer part of it, and heard after
        stories[ended] = story
        while len(stories) > KEPT_PER_SHARD:
            del stories[min(stories)]
        return None

    def _on_cut(self, shard: str, cut: dict[str, Any]) -> None:
        """A node has taken entries out of its log that the chosen one does not have."""
        stories = self._told.get(shard)
        if not stories:
            return
        cuts = stories[max(stories)].setdefault("cut", {})
        if is_id(str(cut.get("node"))) and len(cuts) < CUTS_MAX:
            cuts[cut["node"]] = cut["cut_behind"]

    def known(self, shard: str | None) -> list[Story]:
        """Stories of takeovers, of one shard or of all, the newest first."""
        shards = self._told if shard is None else {shard: self._told.get(shard, {})}
        stories = [
            s for told in shards.values() for s in told.values() if s["state"] != "detecting"
        ]
        return sorted(stories, key=_began_ms, reverse=True)

    def is_recovering(self, shard: str) -> bool:
        """Whether a takeover of it is under way, as far as was told."""
        return any(s["state"] == "recovering" for s in self._told.get(shard, {}).values())

    def unfinished(self, shards: dict[str, Shard]) -> list[tuple[Story, Shard]]:
        """Stories whose shard is ACTIVE under a later epoch, with the shard."""
        return [
            (story, shard)
            for id, shard in shards.items()
            for ended, story in self._told.get(id, {}).items()
            if story["state"] == "recovering"
            and shard.state is ShardState.ACTIVE and shard.epoch > ended
        ]  # fmt: skip

    # ---- what happens ----

    def detecting(self, shard: Shard, suspicion: Suspicion, is_right: bool) -> Story:
        """The primary is suspected, or the suspicion was wrong."""
        fields = {
            "old_primary": shard.primary, "suspected": suspected(suspicion),
            "times_ms": {"detecting": suspicion.at_ns // MILLISECOND_NS},
        }  # fmt: skip
        return self._story(shard, shard.epoch, "detecting" if is_right else "normal", fields)

    def recovering(
        self, old: Shard, new: Shard, outage: Outage | None, cause: str, heard: Heard, now_ns: int
    ) -> Story | None:
        """Another configuration is being opened in place of one that cannot go on; None when none ever served."""
        ended = (
            old.epoch if old.state is ShardState.ACTIVE else getattr(old.last_active, "epoch", 0)
        )
        if not ended:
            return None
        known = self._told.get(new.id, {}).get(ended, {})
        if known.get("state") == "detecting":
            known = {}  # of whoever told that; it may be old
        since_ns = min(outage.since_ns, now_ns) if outage else now_ns
        times = {"detecting": since_ns // MILLISECOND_NS, **known.get("times_ms", {})}
        reports = [(m.node, heard.report(new.id, m)) for m in old.members]
        if outage is not None and outage.suspicion is not None:
            known = {**known, "suspected": suspected(outage.suspicion)}
        fields = {
            "old_primary": old.primary, **known, "cause": known.get("cause") or cause,
            "times_ms": {**times, "recovering": now_ns // MILLISECOND_NS},
            "positions": {node: [*r.last] for node, r in reports if r is not None},
            "new_primary": new.primary, "choice": _choice(new, heard),
            "members": [m.node for m in new.members], "epoch": new.epoch,
            "attempts": known.get("attempts", 0) + 1,
        }  # fmt: skip
        return self._story(new, ended, "recovering", fields)

    def completed(self, story: Story, shard: Shard, attempt: Attempt | None, now_ns: int) -> Story:
        """The shard serves again."""
        times = {**story["times_ms"], "completed": now_ns // MILLISECOND_NS}
        fields = {**story, "epoch": shard.epoch, "new_primary": shard.primary}
        if attempt is not None:
            times["sealed"] = attempt.sealed_ns // MILLISECOND_NS
            times["opened"] = attempt.opened_ns // MILLISECOND_NS
            fields |= _sealed(attempt, story.get("old_primary", ""))
        fields |= {"times_ms": times, "duration_ms": _durations(times)}
        return self._story(shard, story["ended_epoch"], "completed", fields)

    def _story(self, shard: Shard, ended: int, new_state: str, fields: Story) -> Story:
        return {
            **fields, "shard": shard.id, "state": new_state, "ended_epoch": ended,
            "coordinator": self._coordinator,
        }  # fmt: skip


def _is_story(story: dict[str, Any]) -> bool:
    times, cut = story.get("times_ms"), story.get("cut", {})
    return (
        story.get("state") in STATES
        and type(story.get("ended_epoch")) is int
        and type(story.get("attempts", 0)) is int
        and type(story.get("old_primary")) is str
        and type(times) is dict
        and all(name in PHASES and type(ms) is int for name, ms in times.items())
        and type(cut) is dict
    )


def _progress(story: Story) -> tuple[int, int]:
    return story.get("attempts", 0), STATES.index(story["state"])


def suspected(suspicion: Suspicion) -> dict[str, Any]:
    return {
        "node": suspicion.node, "by": suspicion.by, "reason": suspicion.reason,
        "probes": suspicion.probes,
    }  # fmt: skip


def _began_ms(story: Story) -> int:
    times = [ms for ms in story["times_ms"].values() if type(ms) is int]
    return min(times, default=0)


def _choice(shard: Shard, heard: Heard) -> str:
    """Why this primary."""
    if len(shard.members) == 1:
        return "it is the only member that is there"
    passed_over = [m.node for m in shard.members if m.node in heard.unproven]
    if passed_over and shard.primary not in passed_over:
        return f"it has the longest log of those that were not down lately ({', '.join(passed_over)} was)"
    return "it has the longest log, as far as heartbeats tell"


def _sealed(attempt: Attempt, old_primary: str) -> dict[str, Any]:
    """What the sealed logs say: where each ended, and from where on the former primary may have had more.

    Only writes at ONE can be there, or such that nobody was told of: its disk has the list when it comes back.
    """
    ends = {member.node: [*end] for member, end in _ends(attempt)}
    if not ends:
        return {}
    longest = max(ends.values())
    unknown = None if old_primary in ends else longest[1] + 1
    return {"sealed": ends, "longest": longest, "unknown_from_seq": unknown}


def _ends(attempt: Attempt) -> list[tuple[Any, tuple[int, int]]]:
    return sorted(attempt.sealed.items(), key=lambda item: item[0].node)


def _durations(times: dict[str, int]) -> dict[str, int]:
    """How long each phase took; `total` from the first sign to the last."""
    known = [name for name in PHASES if times.get(name)]
    durations = {
        _PHASE_NAMES[name]: max(times[after] - times[name], 0) for name, after in pairwise(known)
    }
    return {**durations, "total": max(times[known[-1]] - times[known[0]], 0)}


_PHASE_NAMES = {
    "detecting": "detecting", "recovering": "sealing", "sealed": "opening", "opened": "announcing",
}  # fmt: skip
