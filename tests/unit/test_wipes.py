"""Which copies a node throws away: those that an ACTIVE and complete configuration does without, after a while (R8)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bus_kv.core.machine import AppendCompleted, CutRow, Load, Mark
from bus_kv.knobs import SECOND_NS, Knobs
from bus_kv.protocol.shard_map import Keyspace, Member, Shard, ShardMap, ShardState
from bus_kv.subjects import Subjects
from nodes.machine.node import NodeConfig, NodeMachine
from nodes.machine.replica import Past
from nodes.machine.status import Status

A, B, C = Member("a", "i"), Member("b", "i"), Member("c", "i")
WITH = Shard("s1", "default", b"", None, 3, "t3", (A, B, C), "a", ShardState.ACTIVE)
WITHOUT = replace(WITH, epoch=4, token="t4", members=(A, B))
AFTER_S = 10


class Former:
    """Node c, which has followed epoch 3 of s1 up to seq 9, and reads a map."""

    def __init__(self) -> None:
        config = NodeConfig("c", "i", (1, "r"), Subjects("x"), 1 << 20)
        self.node = NodeMachine(config, Knobs(wipe_after_s=AFTER_S))
        self.now_ns = SECOND_NS
        replica = self.node.new_replica(WITH, Past(Mark(3, 9, 1, 1, 1, ((3, 1),))))
        replica.promise(3, "t3")
        self.node.is_running = True
        self.version = 0
        self.take_ready()

    def read_map(self, shard: Shard, factor: int = 2) -> None:
        self.version += 1
        keyspaces = {"default": Keyspace(replication_factor=factor)}
        self.node._adopt(ShardMap(self.version, shard.epoch, "w", keyspaces, {"s1": shard}))

    def pass_s(self, seconds: int) -> Any:
        """The log transaction of the turn that follows, if there is one with entries."""
        self.now_ns += seconds * SECOND_NS
        self.node.on_deadline(self.now_ns)
        return self.take_ready()

    def take_ready(self) -> Any:
        ready = self.node.take_ready(self.now_ns)
        return ready.append if ready.append and ready.append.entries else None

    @property
    def has_copy(self) -> bool:
        return self.node.replicas["s1"].folder.mark.last == 9


def test_a_copy_goes_after_a_while_first_the_log_then_the_state() -> None:
    former = Former()
    former.read_map(WITHOUT)
    assert former.pass_s(AFTER_S - 1) is None
    assert former.has_copy
    append = former.pass_s(1)
    assert append.entries == [CutRow("s1", 0, 4, keep=False)]
    (row,) = append.replicas
    assert (row.promised_epoch, row.promised_token, row.base_seq) == (4, "t4", 9), (
        "the promise stays"
    )
    assert loads(former) == [], "not before the log is gone for certain"
    former.node.step(AppendCompleted(append.ticket), former.now_ns)
    assert [(load.shard, load.table, load.mark) for load in loads(former)] == [("s1", "", None)]
    assert not former.has_copy
    former.read_map(replace(WITHOUT, epoch=5, token="t5"))
    assert former.pass_s(2 * AFTER_S) is None, "it is empty already"


def loads(former: Former) -> list[Load]:
    effects = former.node.take_ready(former.now_ns).effects
    return [effect for effect in effects if isinstance(effect, Load)]


@pytest.mark.parametrize(
    ("shard", "factor"),
    [
        (WITH, 2),
        (replace(WITHOUT, learners=(C,)), 2),
        (WITHOUT, 3),
        (replace(WITHOUT, state=ShardState.RECOVERING), 2),
    ],
    ids=["a member", "a learner", "a member is missing", "an attempt"],
)
def test_a_copy_that_may_be_needed_stays(shard: Shard, factor: int) -> None:
    former = Former()
    former.read_map(shard, factor)
    assert former.pass_s(2 * AFTER_S) is None
    assert former.has_copy


def test_a_copy_stays_where_something_newer_than_the_map_is_promised() -> None:
    former = Former()
    former.node.replicas["s1"].promise(5, "t5")
    former.read_map(WITHOUT)
    former.pass_s(2 * AFTER_S)
    assert former.has_copy


def test_who_comes_back_in_time_keeps_its_copy() -> None:
    former = Former()
    former.read_map(WITHOUT)
    former.pass_s(AFTER_S - 1)
    former.read_map(replace(WITHOUT, epoch=5, token="t5", learners=(C,)))
    former.pass_s(AFTER_S)
    former.read_map(replace(WITHOUT, epoch=6, token="t6"))
    former.pass_s(1)
    assert former.has_copy
    assert former.node.replicas["s1"].status is not Status.ACTIVE
