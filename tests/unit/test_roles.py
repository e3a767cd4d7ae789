"""Who gets which part in a shard, from the map and what nodes say about themselves."""

from itertools import permutations

import pytest

from bus_kv.protocol.messages import Heartbeat, ReplicaReport
from bus_kv.protocol.shard_map import (
    Configuration,
    Keyspace,
    Member,
    Node,
    NodeState,
    Shard,
    ShardMap,
    ShardState,
)
from coordinator.machine.plan import Heard
from coordinator.machine.roles import Roles, next_roles, whom_to_ask

N1, N2 = Member("n1", "i1"), Member("n2", "i2")
EPOCH, TOKEN = 5, "t"


def heard(**last: tuple[int, int]) -> Heard:
    """Nodes that follow the epoch, each with a log that ends there; n1 is the primary."""
    beats = {}
    for node, end in last.items():
        status = "active" if node == "n1" else "following"
        report = ReplicaReport("s1", EPOCH, TOKEN, status, end, end[1], 0, 0, 0, 0)
        beats[node] = Heartbeat(node, f"i{node[1:]}", (1, "r"), shards=[report])
    return Heard(beats)


@pytest.mark.parametrize(
    ("last", "joins"),
    [((5, 900), True), ((5, 501), True), ((4, 899), False), ((1, 1), False), ((0, 0), False)],
)
def test_a_learner_becomes_a_member_once_its_log_has_joined_the_primarys(
    last: tuple[int, int], joins: bool
) -> None:
    """However little it lacks: what it lacks may be nowhere any more."""
    shard = Shard(
        "s1", "default", b"", None, EPOCH, TOKEN, (N1,), "n1", ShardState.ACTIVE, learners=(N2,)
    )
    nodes = {m.node: Node(m.node, m.incarnation, NodeState.UP) for m in (N1, N2)}
    map = ShardMap(1, EPOCH, "", {"default": Keyspace()}, {"s1": shard}, nodes)
    roles = next_roles(shard, map, heard(n1=(5, 900), n2=last))
    assert roles == (Roles((N1, N2), "n1") if joins else None)


def test_a_member_that_is_down_leaves_once_all_others_were_heard_since() -> None:
    """They may have died together: then nobody could open another epoch, and this one would be sealed for nothing."""
    n3 = Member("n3", "i3")
    shard = Shard("s1", "default", b"", None, EPOCH, TOKEN, (N1, N2, n3), "n1", ShardState.ACTIVE)
    nodes = {m.node: Node(m.node, m.incarnation, NodeState.UP) for m in shard.members}
    map = ShardMap(1, EPOCH, "", {"default": Keyspace()}, {"s1": shard}, nodes)
    known = heard(n1=(5, 9), n2=(5, 9), n3=(5, 9))
    heard_ns = {"n1": 120, "n2": 50, "n3": 90}
    known.silent, known.fell_ns, known.heard_ns = {"n2"}, lambda _: 100, heard_ns.__getitem__
    assert (next_roles(shard, map, known), whom_to_ask(map, known)) == (None, {"n3"})
    heard_ns["n3"] = 110
    assert next_roles(shard, map, known) == Roles((N1, n3), "n1")
    assert whom_to_ask(map, known) == set()


@pytest.mark.parametrize("order", [*permutations(("n1", "n2", "n3"))])
def test_a_coordinator_that_has_just_started_takes_nobody_for_dead(order: tuple[str, ...]) -> None:
    """Heartbeats come in any order; a primary whose own is not the first was replaced for nothing."""
    n3 = Member("n3", "i3")
    shard = Shard("s1", "default", b"", None, EPOCH, TOKEN, (N1, N2, n3), "n1", ShardState.ACTIVE)
    nodes = {m.node: Node(m.node, m.incarnation, NodeState.UP) for m in shard.members}
    map = ShardMap(1, EPOCH, "", {"default": Keyspace()}, {"s1": shard}, nodes)
    for count in range(len(order)):
        known = heard(**dict.fromkeys(order[:count], (5, 9)))
        assert next_roles(shard, map, known) is None
        assert whom_to_ask(map, known) == {*order[count:]}
    # Nobody listens where the primary was asked.
    known = heard(n2=(5, 9), n3=(5, 9))
    known.silent = {"n1"}
    assert next_roles(shard, map, known) == Roles((N2, n3), "n2")


def test_of_an_attempt_that_nobody_drives_all_former_members_are_asked() -> None:
    """A coordinator that starts with the whole cluster would else go on with the first two it hears."""
    n3 = Member("n3", "i3")
    members = (N1, N2, n3)
    shard = Shard(
        "s1", "default", b"", None, EPOCH + 1, "new", (N1, N2), "n1", ShardState.RECOVERING,
        last_active=Configuration(EPOCH, TOKEN, members),
    )  # fmt: skip
    nodes = {m.node: Node(m.node, m.incarnation, NodeState.UP) for m in members}
    map = ShardMap(1, EPOCH + 1, "", {"default": Keyspace()}, {"s1": shard}, nodes)
    assert whom_to_ask(map, heard(n1=(5, 9))) == {"n2", "n3"}
