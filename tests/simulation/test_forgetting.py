"""When what must not be forgotten is: the map's store is an older copy (R10), or a disk comes back empty (R8)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bus_kv.core.machine import AppendCompleted, Publish, Received
from bus_kv.knobs import Knobs
from bus_kv.protocol.codec import decode_cbor, encode_cbor, encode_json
from bus_kv.protocol.messages import Heartbeat, ReplicaReport
from bus_kv.protocol.shard_map import (
    Configuration,
    Keyspace,
    Member,
    Shard,
    ShardMap,
    ShardState,
    shard_to_document,
)
from bus_kv.subjects import Subjects
from coordinator.machine import plan
from coordinator.machine.plan import Heard, next_map
from coordinator.machine.roles import Roles
from nodes.machine.node import NodeConfig, NodeMachine
from tests.simulation import test_planted_replication as planted
from tests.simulator.faults import Faults
from tests.simulator.traces import Story
from tests.simulator.world import SECOND_NS, Violation


def order(story: Story, verb: str) -> None:
    subject = story.cluster.subjects.admin(verb)
    story.cluster.bus.publish(story.client, subject, encode_json({}), "_INBOX.client.0.0")


def test_a_store_that_forgot_a_takeover_is_noticed_and_restored() -> None:
    """The new epoch's primary dies, and no coordinator is left that remembers: replicas refuse what the old map
    asks."""
    story = Story()
    cluster, store = story.cluster, story.cluster.store
    story.put("apple", "before")
    story.answered()
    story.failover()
    story.until(lambda: cluster.map().shards["s1"].epoch > 1 and cluster.is_settled)
    story.put("apple", "after")
    story.answered()
    count = 1
    while (document := store.before("map", count)) and document["shards"]["s1"]["epoch"] > 1:
        count += 1
    store.forget("map", count)
    primary = cluster.peers["n2"]
    for process in (primary, *cluster.coordinators):
        process.crash()
    cluster.start_coordinator(cluster.coordinators[0])
    cluster.world.run_until(cluster.world.now_ns + 20 * SECOND_NS)
    assert not cluster.is_serving
    cluster.start_node(primary)
    while not cluster.is_settled:
        order(story, "restore")
        cluster.world.run_until(cluster.world.now_ns + 2 * SECOND_NS)
    story.get("apple")
    story.answered()
    assert story.answers[-1].value == b"after"


def test_that_an_attempt_became_active_may_be_what_one_replica_alone_knows() -> None:
    """It was told directly, and the announcement was lost: the restored map has to bear it out, or the replica refuses
    every seal for ever (found by a seed)."""
    shard = Shard(
        "s1", "default", b"", None, 9, "t9", (Member("n1", "i1"),), "n1", ShardState.RECOVERING
    )
    map = ShardMap(5, 9, "w", {"default": Keyspace(replication_factor=1)}, {"s1": shard})
    active = replace(shard, state=ShardState.ACTIVE)
    heard = Heard(
        beats={"n1": Heartbeat("n1", "i1", (1, "r"), map_version=5)}, forgotten={"s1"},
        restoring=True, newest=map, records={"s1": active},
    )  # fmt: skip
    restored = next_map(map, heard, Knobs(), lambda: "token")
    assert restored.shards["s1"] == active
    assert restored.map_version == 6


def tried_anew() -> tuple[ShardMap, tuple[Member, ...]]:
    """The store has forgotten what followed epoch 5, and a coordinator has begun epoch 8 from there."""
    members = tuple(Member(f"n{i}", f"i{i}") for i in (1, 2, 3))
    active = Shard("s1", "default", b"", None, 5, "t5", members, "n1", ShardState.ACTIVE)
    tried = plan.reconfigured(active, Roles(members[1:], "n2"), 8, "t8")
    return ShardMap(5, 8, "w", {"default": Keyspace()}, {"s1": tried}), members


def told_by(map: ShardMap, *promises: tuple[str, int, str], **fields: Any) -> Heard:
    """What a coordinator has heard that restores this map; each node has promised an epoch of s1."""
    zeros = dict.fromkeys(("commit_seq", "folded", "keys", "bytes", "operations"), 0)
    beats = {
        node: Heartbeat(
            node, f"i{node[1:]}", (1, "r"), map_version=map.map_version,
            shards=[ReplicaReport("s1", epoch, token, "promised", (5, 9), **zeros)],
        )
        for node, epoch, token in promises
    }  # fmt: skip
    return Heard(beats, forgotten={"s1"}, restoring=True, newest=map, **fields)


def test_a_forgotten_attempt_is_restored_although_a_later_one_was_begun_without_it() -> None:
    """Who has promised it refused every seal for ever (found by seed 2644)."""
    map, _ = tried_anew()
    heard = told_by(map, ("n2", 7, "t7"), ("n3", 8, "t8"))
    restored = next_map(map, heard, Knobs(), lambda: "token").shards["s1"]
    assert restored.last_active == map.shards["s1"].last_active
    assert {*restored.attempts, (restored.epoch, restored.token)} == {
        (7, "t7"), (8, "t8"), (9, "token"),
    }  # fmt: skip


def test_what_served_and_was_forgotten_is_what_has_to_be_sealed() -> None:
    """However late an attempt was begun that does not know of it."""
    map, members = tried_anew()
    served = Shard("s1", "default", b"", None, 7, "t7", members[:2], "n2", ShardState.ACTIVE)
    heard = told_by(map, ("n2", 7, "t7"), ("n3", 8, "t8"), records={"s1": served})
    restored = next_map(map, heard, Knobs(), lambda: "token").shards["s1"]
    assert restored.last_active == Configuration(7, "t7", members[:2])
    assert restored.attempts == ((8, "t8"),)
    assert restored.epoch == 9


@pytest.mark.parametrize(
    ("promised", "answer"), [((5, "t5"), "sealed"), ((6, "t6"), "sealed"), ((7, "t7"), "refused")]
)
def test_a_replica_refuses_a_map_that_does_not_know_what_it_has_promised(
    promised: tuple[int, str], answer: str
) -> None:
    assert sealed_after(promised)["type"] == answer


def test_a_replica_that_does_not_notice_seals_for_a_map_that_has_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planted.forgetting_is_not_noticed(monkeypatch)
    assert sealed_after((7, "t7"))["type"] == "sealed"


def sealed_after(promised: tuple[int, str]) -> dict[str, Any]:
    """What a replica with this promise answers to epoch 8 after 5 was active and 6 was tried."""
    node = NodeMachine(NodeConfig("n1", "i1", (1, "r"), Subjects("x"), 1 << 20), Knobs())
    members = tuple(Member(f"n{i}", f"i{i}") for i in (1, 2, 3))
    active = Shard("s1", "default", b"", None, 5, "t5", members, "n1", ShardState.ACTIVE)
    node.new_replica(active).promise(*promised)
    tried = plan.reconfigured(active, Roles(members, "n2"), 6, "t6")
    record = shard_to_document(plan.reconfigured(tried, Roles(members, "n2"), 8, "t8"))
    seal = encode_cbor({"type": "seal", "record": record, "incarnation": "i1"})
    node.step(Received("node", "n1", seal, "reply"), SECOND_NS)
    ready = node.take_ready(SECOND_NS)
    if ready.append is not None:
        node.step(AppendCompleted(ready.append.ticket), SECOND_NS)
        ready.effects += node.take_ready(SECOND_NS).effects
    (told,) = [e for e in ready.effects if isinstance(e, Publish) and e.subject == "reply"]
    return decode_cbor(told.body)


# ---- a disk that is lost ----


def lose_two_of_three() -> Story:
    """One member lags, one loses its disk, and then the primary dies: what they acknowledged is on its disk alone."""
    story = Story()
    primary, wiped, lagging = story.cluster.nodes
    faults = Faults(story.cluster)
    lagging.cut_in = True
    story.put("apple", "1")
    story.answered()
    faults.lose_disk(wiped)
    primary.crash()
    lagging.cut_in = False
    if not wiped.alive:
        story.cluster.start_node(wiped)
    story.cluster.world.run_until(story.cluster.world.now_ns + 20 * SECOND_NS)
    story.cluster.start_node(primary)
    story.until(lambda: story.cluster.is_settled)
    story.get("apple")
    story.answered()
    return story


def test_a_node_whose_disk_is_lost_does_not_count_as_the_member_that_it_was() -> None:
    assert lose_two_of_three().answers[-1].value == b"1"


def test_a_wiped_node_that_keeps_its_incarnation_loses_what_was_acknowledged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planted.wiped_node_keeps_its_incarnation(monkeypatch)
    with pytest.raises(Violation, match="R3"):
        lose_two_of_three()
