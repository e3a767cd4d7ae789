"""The ordinary stories of replication as text: `python -m tests.simulator.traces` writes them anew.

They are what the production machines do in a quiet simulated cluster, one fault at one moment, and a test compares them
with the files; heartbeats, leases and map reads are left out.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bus_kv.client.session import Session
from bus_kv.errors import BusKVError
from bus_kv.knobs import Knobs
from bus_kv.protocol import batch as b
from bus_kv.protocol.codec import encode_json
from tests.simulator.cluster import Cluster
from tests.simulator.shape import Shape
from tests.simulator.world import MILLISECOND_NS, SECOND_NS, START_NS, World

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = Path(__file__).parent.parent / "simulation" / "traces"


class Story:
    """A cluster in which nothing fails by itself, and the lines of its trace."""

    def __init__(self, nodes: int = 3) -> None:
        knobs = Knobs(
            heartbeat_interval_s=1.0, layout_wait_s=0.5, lease_s=1.0, replication_factor=nodes,
            fold_interval_ms=60_000, remind_idle_ms=60_000,
        )  # fmt: skip
        self.world = World(1)
        self.cluster = Cluster(self.world, Shape(nodes, 1, 0, 0.0, 0.0, 0.0, SECOND_NS, knobs))
        self.lines: list[str] = []
        self.answers: list[Any] = []
        self.cluster.start()
        self.client = self.cluster.start_client("client", self._on_done)
        self.until(lambda: self.cluster.is_settled)
        self.world.run_until(self.world.now_ns + 2 * SECOND_NS)
        self.warm_up()

    def warm_up(self) -> None:
        """The client reads the map before the story begins."""
        self.get("none")
        self.until(lambda: bool(self.answers))
        self.answers.clear()
        self.world.run_until(self.world.now_ns + SECOND_NS)
        self.begin()

    def begin(self) -> None:
        self._started_ns = self.world.now_ns
        self.world.tell = self._on_line

    def _on_line(self, who: str, what: str) -> None:
        if any(word in what for word in ("heartbeat", "leader =", "event.suspect", ": beat")):
            return
        ms = (self.world.now_ns - self._started_ns) / MILLISECOND_NS
        self.lines.append(f"{ms:9.2f} ms  {who:<8} {what}")

    def say(self, text: str) -> None:
        self.lines += ["", f"# {text}"]

    def until(self, condition: Callable[[], bool], seconds: int = 60) -> None:
        self.world.run_until(self.world.now_ns + seconds * SECOND_NS, done=condition)
        assert condition(), "the story did not come to this point"

    def rest(self, ms: int = 300) -> None:
        self.world.run_until(self.world.now_ns + ms * MILLISECOND_NS)

    def put(self, key: str, value: str, level: str = "quorum") -> None:
        call = partial(self._session.write, b.PUT, key.encode(), value.encode())
        self._call(call, f"put {key}", level)

    def get(self, key: str, level: str = "quorum") -> None:
        self._call(partial(self._session.get, key.encode()), f"get {key}", level)

    def _call(self, call: Callable[..., None], name: str, level: str) -> None:
        self.world.note("client", f"calls {name} at {level.upper()}")
        call(name, self.client.now_ns, consistency=level)
        self.client.schedule()

    @property
    def _session(self) -> Session:
        assert isinstance(self.client.machine, Session)
        return self.client.machine

    def _on_done(self, tokens: Any, outcomes: Any) -> None:
        for token, outcome in zip(tokens, outcomes, strict=True):
            self.answers.append(outcome)
            if isinstance(outcome, BusKVError):
                text = outcome.code
            else:
                text = f"version {outcome.version}" if outcome.version else "absent"
            self.world.note("client", f"{token} = {text}")

    def answered(self, count: int = 1) -> None:
        """Wait for so many more answers."""
        wanted = len(self.answers) + count
        self.until(lambda: len(self.answers) >= wanted)

    def failover(self) -> None:
        body = encode_json({"shard": "s1"})
        self.cluster.bus.publish(self.client, "sim.admin.failover", body, "_INBOX.client.0.0")


def put_at_each_level() -> Story:
    story = Story()
    for level in ("one", "quorum", "all"):
        story.say(f"A put at {level.upper()}.")
        story.put("apple", level, level)
        story.answered()
        story.rest()
    story.say("A get at QUORUM: a confirm round that begins after it came.")
    story.get("apple")
    story.answered()
    return story


def takeover_with_three() -> Story:
    story = Story()
    story.say("A put, and then the primary is killed.")
    story.put("apple", "1")
    story.answered()
    story.rest()
    story.cluster.nodes[0].crash()
    story.say("An operator does not wait for three missed heartbeats.")
    story.failover()
    story.until(lambda: story.cluster.is_serving)
    story.say("What was acknowledged is there, under the new epoch.")
    story.get("apple")
    story.answered()
    return story


def takeover_with_two() -> Story:
    story = Story(nodes=2)
    story.say(
        "Two members: W is 2, one sealed is enough. The primary is killed; the survivor goes on alone."
    )
    story.put("apple", "1")
    story.answered()
    story.cluster.nodes[0].crash()
    story.failover()
    story.until(lambda: story.cluster.is_serving)
    story.put("apple", "2")
    story.answered()
    return story


def lagging_replica() -> Story:
    story = Story()
    story.say("n3 hears nothing for a while.")
    story.cluster.nodes[2].cut_in = True
    for i in range(3):
        story.put("apple", str(i))
        story.answered()
    story.cluster.nodes[2].cut_in = False
    story.say("It hears the primary's reminder, sees the gap, and fetches what it lacks.")
    replica = story.cluster.replica("n3", "s1")
    assert replica is not None
    end = story.cluster.replica("n1", "s1")
    assert end is not None
    story.until(lambda: replica.durable_seq == end.last[1])
    story.rest(5)
    return story


def returning_primary_is_cut() -> Story:
    story = Story()
    first = story.cluster.nodes[0]
    story.say("The primary is cut off; a put at ONE is durable there, and nowhere else.")
    story.put("apple", "1")
    story.answered()
    story.rest()
    for node in story.cluster.nodes[1:]:
        node.cut_in = True
    story.put("apple", "lost", "one")
    story.answered()
    first.crash()
    for node in story.cluster.nodes[1:]:
        node.cut_in = False
    story.failover()
    story.until(lambda: story.cluster.is_serving)
    story.put("apple", "2")
    story.answered()
    story.say(
        "It comes back as a learner: its entry of the old epoch is cut and kept aside; then it is a member again."
    )
    story.cluster.start_node(first)
    story.until(lambda: story.cluster.is_settled)
    return story


STORIES = {
    story.__name__: story
    for story in (
        put_at_each_level, takeover_with_three, takeover_with_two, lagging_replica,
        returning_primary_is_cut,
    )
}  # fmt: skip


def text_of(name: str) -> str:
    story = STORIES[name]()
    return "\n".join([f"{name.replace('_', ' ')}", *story.lines]) + "\n"


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    for name in STORIES:
        (FOLDER / f"{name}.txt").write_text(text_of(name))
        print(FOLDER / f"{name}.txt")
    return 0


if __name__ == "__main__":
    assert START_NS
    sys.exit(main())
