"""What a turn has left to be done after it: by the driver at once, or by the next turn."""

from __future__ import annotations

import pytest

from bus_kv.core.machine import Lookup
from bus_kv.knobs import SECOND_NS, Knobs
from bus_kv.subjects import Subjects
from nodes.machine.key_filter import KeyFilter
from nodes.machine.node import NodeConfig, NodeMachine
from nodes.machine.replicas import Replicas
from tests.support.trio import Trio


@pytest.fixture
def trio() -> Trio:
    trio = Trio()
    trio.serve()
    return trio


def reading(trio: Trio) -> Replicas:
    """The replicas of n1 after a turn in which it was asked for a key that may be on its disk."""
    replica, replicas = trio.nodes["n1"].replica, Replicas()
    replica.table.filter = KeyFilter(1, complete=False)
    replicas.put(replica)
    trio.get("n1", b"k")
    assert replicas.take_touched() == [replica]
    replica.end_turn()
    replicas.looked_at(replica)
    assert not replicas.are_settled
    return replicas


def asked_for(trio: Trio) -> list[list[bytes]]:
    return [query.whole for query, _ in trio.nodes["n1"].asked if isinstance(query, Lookup)]


def test_a_read_that_misses_memory_asks_the_disk_without_another_turn(trio: Trio) -> None:
    replicas = reading(trio)
    assert asked_for(trio) == []
    replicas.settle()
    assert replicas.are_settled
    assert asked_for(trio) == [[b"k"]]


def test_what_there_was_no_time_for_is_done_in_the_next_turn(trio: Trio) -> None:
    """That looks at other replicas: this one must not wait until somebody reaches for it."""
    replicas = reading(trio)
    (replica,) = replicas.take_touched()
    replica.end_turn()
    assert replicas.are_settled
    assert asked_for(trio) == [[b"k"]]


def test_a_node_says_when_what_was_done_after_a_turn_needs_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node = NodeMachine(NodeConfig("n1", "i", (1, "r"), Subjects("x"), 1 << 20), Knobs())
    assert not node.settle(SECOND_NS)
    question = Lookup(0, "s1", [], [b"k"], 1000)
    monkeypatch.setattr(node.replicas, "settle", lambda: node.ask(question, lambda *_: None))
    assert node.settle(SECOND_NS)
    assert node.take_ready(SECOND_NS).effects == [question]


def glanced(trio: Trio) -> Replicas:
    """The replicas of n1 in a turn in which the acknowledgement came that commits its entry."""
    replicas = Replicas()
    replicas.put(trio.nodes["n1"].replica)
    (replica,) = replicas.take_touched()
    replica.end_turn()
    replicas.looked_at(replica)
    replicas.end_turn()
    assert replicas.are_settled
    trio.put("n1", b"k", b"v")
    trio.turn("n1")
    assert replicas.glance("s1") is replica
    replica.commit_soon(replica.last[1])
    return replicas


def test_what_was_committed_at_a_glance_is_applied_after_the_turn(trio: Trio) -> None:
    replicas = glanced(trio)
    assert replicas.take_touched() == []
    replicas.end_turn()
    assert not replicas.are_settled
    replicas.settle()
    assert trio.nodes["n1"].replica.commit_seq == trio.nodes["n1"].replica.last[1]


def test_what_was_left_is_done_before_the_next_glance(trio: Trio) -> None:
    replicas = glanced(trio)
    replicas.end_turn()
    replica = replicas.glance("s1")
    assert replica is not None
    assert replica.is_settled
    assert replicas.take_touched() == [replica]
