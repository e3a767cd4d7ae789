"""Which primaries a node suspects by itself: those that remind none of their backups any more."""

import json
from typing import TYPE_CHECKING

from bus_kv.knobs import MILLISECOND_NS, SECOND_NS, Knobs
from bus_kv.protocol.shard_map import Member, Shard, ShardMap, ShardState
from bus_kv.subjects import Subjects
from nodes.machine.node import NodeConfig, NodeMachine
from nodes.machine.status import Status

if TYPE_CHECKING:
    from bus_kv.core.machine import Publish

MEMBERS = (Member("n1", "i1"), Member("n2", "i2"))
PATIENCE_NS = 3 * Knobs().remind_idle_ms * MILLISECOND_NS


def node_with(*shards: str) -> NodeMachine:
    """n2, a backup of these shards, which n1 has just reminded."""
    node = NodeMachine(NodeConfig("n2", "i2", (1, "r"), Subjects(), 1 << 20), Knobs())
    records = {
        id: Shard(id, "default", b"", None, 1, "t", MEMBERS, "n1", ShardState.ACTIVE)
        for id in shards
    }
    node.map = ShardMap(1, 1, "w", {}, records)
    node.now_ns = SECOND_NS
    for record in records.values():
        replica = node.new_replica(record)
        replica.promise(1, "t")
        replica.status = Status.FOLLOWING
        replica.backup.primary, replica.backup.heard_ns = "n1", SECOND_NS
    return node


def suspected(node: NodeMachine, at_ns: int) -> list[str]:
    node.now_ns = at_ns
    said: list[Publish] = node.suspicions.listen()
    assert {json.loads(publish.body)["by"] for publish in said} <= {"n2"}
    return [publish.subject for publish in said]


def test_a_primary_that_reminds_is_not_suspected() -> None:
    assert suspected(node_with("s1"), SECOND_NS + PATIENCE_NS - 1) == []


def test_a_primary_is_suspected_once_for_all_its_shards() -> None:
    node = node_with("s1", "s2")
    assert suspected(node, SECOND_NS + PATIENCE_NS) == ["bkv.event.suspect.n1"]


def test_a_primary_that_reminds_of_one_shard_is_there() -> None:
    node = node_with("s1", "s2")
    node.replicas["s2"].backup.heard_ns = 2 * SECOND_NS
    assert suspected(node, SECOND_NS + PATIENCE_NS) == []


def test_who_is_no_longer_the_primary_is_not_waited_for() -> None:
    node = node_with("s1")
    node.replicas["s1"].backup.primary = "n3"
    assert suspected(node, SECOND_NS + PATIENCE_NS) == []
