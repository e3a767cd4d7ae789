"""Who gets which part in a shard, from the map and what nodes say about themselves."""

import pytest

from bus_kv.protocol.messages import Heartbeat, ReplicaReport
from bus_kv.protocol.shard_map import Keyspace, Member, Node, NodeState, Shard, ShardMap, ShardState
from coordinator.machine.plan import Heard
from coordinator.machine.roles import Roles, next_roles

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
