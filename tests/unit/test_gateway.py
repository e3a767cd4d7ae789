"""A gateway before a primary that is silent: whom it asks, how often, and what it says about it."""

from __future__ import annotations

from typing import Any

import pytest

from bus_kv.core.machine import Publish, Request
from bus_kv.knobs import MILLISECOND_NS, SECOND_NS, Knobs
from bus_kv.protocol import batch as b
from bus_kv.protocol.batch import Batch
from bus_kv.protocol.requests import DataRequest
from bus_kv.protocol.shard_map import Keyspace, Member, Shard, ShardMap, ShardState
from bus_kv.subjects import Subjects
from nodes.machine.node import NodeConfig, NodeMachine

MEMBERS = (Member("n1", "i"), Member("n2", "i"), Member("n3", "i"))
SHARD = Shard("s1", "default", b"", None, 2, "t2", MEMBERS, "n1", ShardState.ACTIVE)
PATIENCE_NS = Knobs().suspect_after_ms * MILLISECOND_NS


class Gateway:
    """Node n4, which has no shard of its own."""

    def __init__(self) -> None:
        config = NodeConfig("n4", "i", (1, "r"), Subjects(), 1 << 20)
        self.node = NodeMachine(config, Knobs())
        self.node.map = ShardMap(1, 2, "w", {"default": Keyspace()}, {"s1": SHARD})
        self.now_ns = SECOND_NS
        self.answers: list[Any] = []
        self.suspicions = 0
        self._number = 0

    def put(self, level: str) -> int:
        """How often the primary was asked for it at once."""
        self._number += 1
        batch = Batch(
            bytes([b.PUT]), [b"k"], [b"v"], client="c", numbers=[self._number], consistency=level
        )
        request = DataRequest("put", "default", level, ("c", self._number), batch)
        self.node.now_ns = self.now_ns
        self.node._gateway.start(request, self.now_ns, self.answers.append)
        return self._sent()

    def later(self, delay_ns: int) -> int:
        """How often the primary was asked meanwhile."""
        self.now_ns += delay_ns
        self.node.on_deadline(self.now_ns)
        return self._sent()

    def _sent(self) -> int:
        effects = self.node.take_ready(self.now_ns).effects
        self.suspicions += sum(isinstance(e, Publish) and "suspect" in e.subject for e in effects)
        return sum(isinstance(e, Request) and "shard.s1" in e.subject for e in effects)


def test_of_a_silent_primary_one_request_at_a_time_is_asked() -> None:
    gateway = Gateway()
    assert gateway.put("quorum") == 1
    assert gateway.later(PATIENCE_NS) == 0
    assert gateway.suspicions == 1
    assert [gateway.put("quorum") for _ in range(3)] == [0, 0, 0], "they wait"
    assert gateway.later(PATIENCE_NS) == 1, "a trial"


@pytest.mark.parametrize("level", ["quorum", "all"])
def test_only_at_all_is_silence_no_reason_to_ask_again_or_to_hold_others_back(level: str) -> None:
    gateway = Gateway()
    assert gateway.put(level) == 1
    gateway.later(PATIENCE_NS)
    assert gateway.suspicions == 1
    assert gateway.put("quorum") == (level == "all")
    asked = gateway.later(PATIENCE_NS)
    assert (asked > 0) == (level == "quorum")
