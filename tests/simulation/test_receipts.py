"""Receipts under faults: what was told of a write's fate is not contradicted later, by any node, and the log agrees."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from bus_kv.client.results import Receipt
from bus_kv.client.session import Session
from bus_kv.knobs import Knobs
from bus_kv.protocol import batch as b
from nodes.machine.replica import Replica
from tests.simulator import checkers
from tests.simulator.cluster import Cluster
from tests.simulator.faults import Faults
from tests.simulator.run import LIVENESS_NS
from tests.simulator.shape import Shape, draw_shape
from tests.simulator.world import MILLISECOND_NS, SECOND_NS, START_NS, Violation, World

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.simulator.process import Process

COMMITTED = ("quorum", "all")


@dataclass(slots=True)
class Told:
    version: tuple[int, int]
    asked_ns: int
    answered_ns: int = 0
    state: str = ""


@dataclass(slots=True)
class Put:
    version: tuple[int, int] | None = None


class BearableFaults(Faults):
    """Every disk comes back: the log has what was committed."""

    def lose_disk(self, process: Process) -> None:
        self.crash(process)


@dataclass
class Writer:
    """Puts at ONE, one after the other, and asks again and again what became of the last ones."""

    world: World
    cluster: Cluster
    name: str
    told: list[Told] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)
    stopped: bool = False

    def __post_init__(self) -> None:
        self.random = self.world.random(f"receipts/{self.name}")
        self.process = self.cluster.start_client(self.name, self.done)
        self.put()

    @property
    def session(self) -> Session:
        assert isinstance(self.process.machine, Session)
        return self.process.machine

    def put(self) -> None:
        if not self.stopped:
            key, value = self.random.choice([b"a", b"b"]), self.name.encode()
            now_ns = self.process.now_ns
            self.session.write(b.PUT, key, value, Put(), now_ns, consistency="one")
            self.process.schedule()

    def ask(self, version: tuple[int, int]) -> None:
        self.inquire(version)

    def inquire(self, version: tuple[int, int]) -> Told:
        """Ask; what is returned is filled in with the answer."""
        told = Told(version, self.world.now_ns)
        self.call(told)
        return told

    def call(self, told: Told) -> None:
        fields = {"shard": "s1", "version": [*told.version]}
        self.session.call("receipt", fields, told, self.process.now_ns)
        self.process.schedule()

    def done(self, tokens: Any, outcomes: Any) -> None:
        for token, outcome in zip(tokens, outcomes, strict=True):
            if isinstance(token, Told):
                self.on_told(token, outcome)
            else:
                self.on_put(outcome)

    def on_told(self, told: Told, outcome: Any) -> None:
        if isinstance(outcome, dict):
            told.answered_ns, told.state = self.world.now_ns, outcome["state"]
            self.told.append(told)
        elif self.stopped:
            self.call(told)  # a takeover may have begun in the moment of healing

    def on_put(self, outcome: Any) -> None:
        if isinstance(outcome, Receipt) and outcome.version is not None:
            self.versions.append(outcome.version)
        for version in self.versions[-3:]:
            # At once, before the others have it, or later.
            pause_ms = self.random.choice([0, self.random.randint(0, 400)])
            self.world.after(pause_ms * MILLISECOND_NS, partial(self.ask, version))
        self.world.after(self.random.randint(0, 50) * MILLISECOND_NS, self.put)


def run(seed: int) -> list[Told]:
    """All that was told, the last of it after healing. Raises Violation."""
    world = World(seed)
    shape = replace(draw_shape(world), bounds=None, safety_ns=2 * SECOND_NS)
    cluster = Cluster(world, shape)
    faults = BearableFaults(cluster)
    cluster.start()
    writers = [Writer(world, cluster, f"w{i}") for i in range(2)]
    world.run_until(START_NS + SECOND_NS, done=lambda: cluster.is_serving)
    faults.begin()
    world.run_until(world.now_ns + shape.safety_ns)
    faults.heal()
    for writer in writers:
        writer.stopped = True
    world.run_until(world.now_ns + LIVENESS_NS, done=lambda: cluster.is_settled)
    last = [writers[0].inquire(v) for writer in writers for v in writer.versions]
    world.run_until(world.now_ns + LIVENESS_NS, done=lambda: all(one.state for one in last))
    told = [told for writer in writers for told in writer.told]
    check(seed, told)
    check_last(seed, cluster, last)
    return told


def check(seed: int, told: list[Told]) -> None:
    """What was told before a question was asked holds for its answer."""
    final: dict[tuple[int, int], Told] = {}
    for one in sorted(told, key=lambda t: t.answered_ns):
        before = final.get(one.version)
        if before is not None and before.answered_ns < one.asked_ns and _differ(before, one):
            raise Violation(f"seed {seed}: first {before}, then {one}")
        if one.state in (*COMMITTED, "rolled_back") and before is None:
            final[one.version] = one


def _differ(before: Told, after: Told) -> bool:
    return (before.state in COMMITTED) != (after.state in COMMITTED) or (
        before.state not in COMMITTED and before.state != after.state
    )


def check_last(seed: int, cluster: Cluster, told: list[Told]) -> None:
    primary = cluster.replica(cluster.map().shards["s1"].primary, "s1")
    assert primary is not None
    log = {op.version for op in checkers.read_log(cluster.log("s1", primary.tail.base))}
    for one in told:
        if one.state not in (*COMMITTED, "rolled_back") or (
            (one.state in COMMITTED) is not (one.version in log)
        ):
            raise Violation(f"seed {seed}: {one}, in the log: {one.version in log}")


@pytest.mark.timeout(300)
def test_what_was_told_of_a_write_holds() -> None:
    told = [told for seed in range(1, 21) for told in run(seed)]
    assert {"primary", "quorum", "all"} <= {one.state for one in told}


def cut_between(cluster: Cluster, *, name: str) -> None:
    """No message passes between this node and the other servers; clients reach all of them."""
    deliver, clients = cluster.bus._deliver, ("client", "server")

    def with_cut(sender: str, process: Process, life: int, event: Any) -> None:
        is_cut = name in (sender, process.name) and sender != process.name
        if not is_cut or {sender, process.name} & {*clients}:
            deliver(sender, process, life, event)

    cluster.bus._deliver = with_cut  # type: ignore[method-assign]


def story() -> list[str]:
    """What is told, many times over, of a write that only a primary has that was cut off and replaced."""
    knobs = Knobs(heartbeat_interval_s=0.5, layout_wait_s=0.5, lease_s=0.3)
    cluster = Cluster(World(1), Shape(3, 1, 0, 0.0, 0.0, 0.0, SECOND_NS, knobs))
    world = cluster.world
    cluster.start()
    world.run_until(START_NS + 10 * SECOND_NS, done=lambda: cluster.is_settled)
    client = Writer(world, cluster, "client")
    client.stopped = True
    cut_between(cluster, name=cluster.map().shards["s1"].primary)
    world.run_until(world.now_ns + SECOND_NS)
    (version,) = client.versions
    world.run_until(world.now_ns + 20 * SECOND_NS, done=lambda: cluster.map().last_epoch > 1)
    world.run_until(world.now_ns + SECOND_NS, done=lambda: cluster.is_serving)
    asked = [client.inquire(version) for _ in range(20)]
    world.run_until(world.now_ns + 20 * SECOND_NS)
    return [one.state for one in asked]


def test_a_write_of_a_primary_that_was_cut_off_is_told_as_rolled_back_by_every_node() -> None:
    assert story() == ["rolled_back"] * 20


def test_a_primary_that_tells_without_confirmation_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would go on telling of a write that others have said to be rolled back."""
    honest = Replica.answer_read

    def answer(
        self: Replica, consistency: str, deadline_ns: int, respond: Callable[[Any], None],
        reply: Any, seq: int, is_read: bool = True, round: int = 0,
    ) -> None:  # fmt: skip
        if reply is None:
            return respond(None)
        return honest(self, consistency, deadline_ns, respond, reply, seq, is_read, round)

    monkeypatch.setattr(Replica, "answer_read", answer)
    assert {*story()} == {"rolled_back", "primary"}


def test_a_primary_that_gives_up_writes_too_soon_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not committed yet is taken for lost."""
    fate = Replica.fate

    def hasty(self: Replica, version: tuple[int, int]) -> str:
        state = fate(self, version)
        return "rolled_back" if state == "primary" else state

    monkeypatch.setattr(Replica, "fate", hasty)
    with pytest.raises(Violation, match="first Told"):
        [run(seed) for seed in range(1, 21)]
