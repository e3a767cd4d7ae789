"""What a coordinator knows of takeovers from what was told on the bus, in whatever order it hears that."""

from typing import Any

from coordinator.machine.failovers import KEPT_PER_SHARD, Failovers


def story(ended: int, state: str) -> dict[str, Any]:
    return {
        "shard": "s1", "state": state, "ended_epoch": ended, "old_primary": "n1", "attempts": 1,
        "times_ms": {"detecting": 1000 * ended, "recovering": 1000 * ended + 1},
    }  # fmt: skip


def test_a_takeover_that_goes_on_is_not_forgotten_for_older_ones() -> None:
    """A coordinator that has just started hears those of the past behind what happens now."""
    failovers = Failovers("c1")
    failovers.on_event("s1", story(100, "recovering"))
    for ended in range(1, KEPT_PER_SHARD + 2):
        failovers.on_event("s1", story(ended, "completed"))
    assert failovers.is_recovering("s1")
    assert [s["ended_epoch"] for s in failovers.known("s1")] == [100, 6, 5, 4, 3]


def test_what_a_node_cuts_belongs_to_the_newest_takeover() -> None:
    failovers = Failovers("c1")
    failovers.on_event("s1", story(7, "completed"))
    failovers.on_event("s1", story(3, "completed"))
    failovers.on_event("s1", {"shard": "s1", "node": "n1", "cut_behind": 42})
    assert [s.get("cut") for s in failovers.known("s1")] == [{"n1": 42}, None]


def test_what_is_no_story_is_passed_over() -> None:
    failovers = Failovers("c1")
    for told in ({}, {"cut_behind": 1}, {**story(1, "completed"), "times_ms": {"never": 1}}):
        failovers.on_event("s1", told)
    assert failovers.known(None) == []
