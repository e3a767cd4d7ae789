"""How a learner takes a snapshot when epochs change under it (both found by review)."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any
from zlib import crc32

import pytest

from bus_kv.core.machine import (
    Answered,
    AppendCompleted,
    Fold,
    Load,
    Mark,
    Received,
    Trim,
)
from bus_kv.knobs import SECOND_NS, Knobs
from bus_kv.protocol.codec import encode_cbor
from bus_kv.protocol.shard_map import Keyspace, Member, Shard, ShardMap, ShardState
from bus_kv.subjects import Subjects
from nodes.machine.node import NodeConfig, NodeMachine
from nodes.machine.status import Status
from tests.support.trio import Trio

A, B, C = Member("a", "i"), Member("b", "i"), Member("c", "i")
SHARD = Shard("s1", "default", b"", None, 1, "t1", (A, B), "a", ShardState.ACTIVE, learners=(C,))
CHUNK = b"rows"


class Learner:
    """Node c, a learner of s1, and what it asks other nodes."""

    def __init__(self, **knobs: int) -> None:
        config = NodeConfig("c", "i", (1, "r"), Subjects("x"), 1 << 20)
        self.node = NodeMachine(config, Knobs(**knobs))
        self.node.map = ShardMap(1, 1, "w", {"default": Keyspace()})
        self.node.now_ns = SECOND_NS
        self.calls: list[tuple[str, dict[str, Any], Any]] = []
        self.node.links.call = self._note_call  # type: ignore[method-assign]
        self.node.follow(SHARD)
        self.replica = self.node.replicas["s1"]
        self.replica.status = Status.FOLLOWING
        assert self.replica.is_learner

    def _note_call(self, node: str, fields: dict[str, Any], then: Any) -> None:
        self.calls.append((node, fields, then))

    def ask_for_snapshot(self) -> Any:
        self.node.snapshots.start(self.node.replicas["s1"], A)
        to, fields, then = self.calls.pop()
        assert (to, fields["type"]) == ("a", "snapshot")
        return then

    def enter_epoch(self, epoch: int, primary: Member) -> None:
        """Another primary is heard, and the map says that it is ACTIVE."""
        self.node.replicas["s1"].promise(epoch, f"t{epoch}")
        later = replace(SHARD, epoch=epoch, token=f"t{epoch}", primary=primary.node)
        self.node.follow(later)


def chunk() -> dict[str, Any]:
    return {
        "type": "chunk", "mark": asdict(Mark(1, 10, 1, 1, 1, ((1, 1),))), "table": "kv",
        "chunk": CHUNK, "checksum": crc32(CHUNK), "place": ["kv", 1, 2, None],
    }  # fmt: skip


def test_a_chunk_that_comes_after_the_epoch_has_changed_changes_nothing() -> None:
    learner = Learner()
    answered = learner.ask_for_snapshot()
    learner.node.replicas["s1"].promise(2, "t2")
    answered(chunk())
    assert learner.node.replicas["s1"] is learner.replica, "its log is still there"


def test_in_the_next_epoch_the_new_primary_is_asked() -> None:
    learner = Learner()
    learner.ask_for_snapshot()(chunk())
    learner.enter_epoch(2, B)
    learner.node.snapshots.start(learner.node.replicas["s1"], B)
    assert learner.calls[-1][0] == "b"
    assert learner.calls[-1][1]["place"] is None, "from the beginning"


def test_a_learner_begins_anew_after_a_chunk_that_its_disk_refuses() -> None:
    learner = Learner()
    learner.ask_for_snapshot()(chunk())
    node = learner.node
    append = node.take_ready(node.now_ns).append
    assert append is not None
    node.step(AppendCompleted(append.ticket), node.now_ns)
    loads = loads_in(node)
    assert [load.table for load in loads] == [""]
    node.step(Answered(loads[0].ticket), node.now_ns)
    loads = loads_in(node)
    assert [load.table for load in loads] == ["kv"]
    node.step(Answered(loads[0].ticket, failure="a key is there twice"), node.now_ns)
    assert [(load.table, load.mark) for load in loads_in(node)] == [("", None)]
    learner.ask_for_snapshot()
    assert node.replicas["s1"].is_learner


@pytest.mark.parametrize("base_seq", [2, 0])
def test_after_a_restart_a_snapshot_is_not_read_before_the_log_has_filled_its_holes(
    base_seq: int,
) -> None:
    trio = Trio()
    trio.serve()
    for key in (b"a", b"b", b"c"):
        trio.put("n1", key, b"1")
        trio.settle()
    node = trio.nodes["n3"]
    assert node.row is not None
    node.row = replace(node.row, base_seq=base_seq)
    node.log = node.log[:3]
    trio.restart("n3")
    assert trio["n3"].is_whole is not bool(base_seq)
    trio.deliver(trio.remind("n1"), "n3")
    assert trio["n3"].status is Status.FOLLOWING
    assert trio["n3"].is_whole is not bool(base_seq)
    trio.settle()
    assert trio["n3"].commit_seq == 4
    assert trio["n3"].is_whole


@pytest.mark.parametrize("type", ["fetch", "snapshot"])
def test_the_log_stays_for_who_keeps_asking_and_goes_when_he_stops(type: str) -> None:
    node = Learner(log_keep_bytes=0, log_bytes_max=1).node
    replica = node.replicas["s1"]
    if type == "snapshot":
        replica.status = Status.ACTIVE
    for seq in (1, 2, 3):
        replica.folder.add([], [], Mark(1, seq), 10, node.now_ns)

    def trims(after_s: int) -> list[Trim]:
        node.replicas.touch("s1")
        effects = node.take_ready(node.now_ns + after_s * SECOND_NS).effects
        for fold in [effect for effect in effects if isinstance(effect, Fold)]:
            node.step(Answered(fold.ticket), node.now_ns)
        return [effect for effect in effects if isinstance(effect, Trim)]

    epoch, token = replica.promised
    question = encode_cbor(
        {
            "type": type, "shard": "s1", "epoch": epoch, "token": token, "incarnation": "i",
            "after": (0, 0), "last": None, "place": None,
        }
    )  # fmt: skip
    for _ in range(10):
        node.step(Received("node", "c", question, "reply"), node.now_ns)
        assert trims(after_s=3) == []
    assert replica.folder.mark.last == 3, "nothing else holds the log"
    assert trims(after_s=60) == [Trim("s1", 2)]


def loads_in(node: NodeMachine) -> list[Load]:
    return [effect for effect in node.take_ready(node.now_ns).effects if isinstance(effect, Load)]
