"""What waits is bounded in bytes, and what was read ahead is used whatever the limit of a page."""

from __future__ import annotations

from typing import Any

from bus_kv.core.machine import Lookup, Mark, RangeRead
from bus_kv.errors import BusKVError, Overloaded
from bus_kv.knobs import SECOND_NS, Knobs
from bus_kv.protocol import batch as b
from bus_kv.protocol.batch import Batch
from bus_kv.protocol.requests import DataRequest, ScanRequest
from bus_kv.protocol.shard_map import Keyspace, Member, Shard, ShardMap, ShardState
from bus_kv.protocol.sizes import Sizes
from bus_kv.subjects import Subjects
from nodes.machine.node import NodeConfig, NodeMachine
from nodes.machine.replica import Past, Ports, Replica
from tests.support.trio import LATE_NS

SHARD = Shard(
    "s1", "default", b"", None, 2, "t2", (Member("n1", "i"),), "n1", ShardState.RECOVERING
)  # fmt: skip
KEYS = 1000


class Cold:
    """A replica that serves a shard of which all is on disk; `asked` are its questions to the disk."""

    def __init__(self, **knobs: Any) -> None:
        self.asked: list[tuple[Any, Any]] = []
        past = Past(Mark(1, KEYS, 1, KEYS, KEYS * 1000, ((1, 0),)))
        ports = Ports(lambda query, then: self.asked.append((query, then)), lambda: SECOND_NS)
        self.replica = Replica(SHARD, "n1", "i", Knobs(**knobs), Sizes(1 << 17), past, ports)
        self.replica.open(SHARD, 0)
        self.turn()
        self.replica.activate(SHARD)
        self.turn()

    def turn(self) -> None:
        rows, row = self.replica.take_rows()
        if rows or row:
            self.replica.on_durable()
        self.replica.end_turn()

    def take(self, kind: type) -> tuple[Any, Any]:
        [item] = [item for item in self.asked if isinstance(item[0], kind)]
        self.asked.remove(item)
        return item

    def put(self, key: bytes, value: bytes) -> list[Any]:
        answers: list[Any] = []
        batch = Batch(bytes([b.PUT]), [key], [value])
        self.replica.writer.submit(batch, batch.encode(), 2, LATE_NS, answers.append)
        return answers


def test_requests_that_wait_for_the_disk_are_bounded_in_bytes() -> None:
    cold = Cold(parked_bytes_max=100_000)
    waiting = [cold.put(b"%d" % i, b"v" * 30_000) for i in range(5)]
    assert [len(answers) for answers in waiting] == [0, 0, 0, 1, 1]
    assert isinstance(waiting[3][0], Overloaded)
    cold.turn()
    query, then = cold.take(Lookup)
    then([0], None)
    assert query.heads == [b"0", b"1", b"2"]
    cold.turn()
    assert all(not isinstance(answers[0], BusKVError) for answers in waiting[:3])
    assert cold.put(b"9", b"v" * 30_000) == [], "there is room again"


def test_requests_that_wait_at_a_gateway_are_bounded_in_bytes() -> None:
    config = NodeConfig("n2", "i", (1, "r"), Subjects("x"), 1 << 20)
    node = NodeMachine(config, Knobs(parked_bytes_max=100_000))
    node.map = ShardMap(1, 2, "w", {"default": Keyspace()}, {"s1": SHARD})
    node.now_ns = SECOND_NS
    answers: list[Any] = []
    for i in range(5):
        batch = Batch(bytes([b.PUT]), [b"%d" % i], [b"v" * 40_000], client="c", numbers=[i])
        node._gateway.start(
            DataRequest("put", "default", "quorum", ("c", i), batch), SECOND_NS, answers.append
        )
    assert [type(answer) for answer in answers] == [Overloaded, Overloaded]


def page_of(cold: Cold, start: bytes, limit: int) -> list[dict[str, Any]]:
    pages: list[Any] = []
    request = ScanRequest("default", None, start, None, limit)
    cold.replica.scans.scan(request, 2, pages.append)
    return pages


def test_pages_that_their_bytes_end_come_from_what_was_read_ahead_too() -> None:
    cold = Cold()
    rows = [(b"%04d" % i, b"v" * 1000, 1, i + 1, None) for i in range(KEYS)]
    found, reads, position = list[bytes](), 0, b""
    while position is not None:
        pages = page_of(cold, position, 10_000)
        if not pages:
            reads += 1
            query, then = cold.take(RangeRead)
            behind = [row for row in rows if row[0] >= query.start]
            then(behind[: min(query.limit, query.bytes_max // 1000)], None)
        [page] = pages
        found += [item["key"] for item in page["items"]]
        position = page["next"]
    assert found == [row[0] for row in rows]
    assert reads == 2, "the first page, and with the second all that follow"
