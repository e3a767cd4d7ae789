"""Users' SQL: every primary answers for its shards, the gateway puts their rows together.

A node answers once everything it had committed when the query came is on disk, so a query sees all that was
acknowledged before it was sent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from bus_kv.core.machine import Sql
from bus_kv.core.timers import Timers
from bus_kv.errors import BusKVError, NotPrimary, Overloaded, ShardUnavailable, from_body
from bus_kv.knobs import MILLISECOND_NS
from bus_kv.protocol.codec import decode_cbor, encode_cbor

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.protocol.requests import SqlRequest
    from nodes.machine.node import NodeMachine
    from nodes.machine.replica import Replica

    Answer = Callable[[dict[str, Any] | BusKVError], None]

MARGIN_MS = 1000
"""What folding and the way through the bus may take beside the query itself."""


@dataclass(slots=True)
class _Call:
    answer: Answer
    missing: int
    columns: list[str] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)
    done: bool = False


class SqlGateway:
    def __init__(self, node: NodeMachine) -> None:
        self._node = node
        self._calls: dict[int, _Call] = {}
        self._asked: dict[int, int] = {}
        """Correlation of a question to another node -> call."""
        self._next = 0
        self._timers = Timers()

    @property
    def is_busy(self) -> bool:
        return bool(self._calls)

    def start(self, request: SqlRequest, answer: Answer) -> None:
        node = self._node
        by_primary: dict[str, list[str]] = {}
        for shard in node.map.shards.values():
            by_primary.setdefault(shard.primary, []).append(shard.id)
        if not by_primary:
            return answer(ShardUnavailable("no shard is laid out yet; send it again in a moment"))
        if len(self._calls) >= node.knobs.calls_max:
            return answer(Overloaded("this node has too many queries under way; send it again"))
        self._next += 1
        id = self._next
        self._calls[id] = _Call(answer, len(by_primary))
        within_ms = node.knobs.sql_timeout_ms + MARGIN_MS
        self._timers.start(str(id), node.now_ns + within_ms * MILLISECOND_NS)
        for primary, shards in by_primary.items():
            if primary == node.config.id:
                self.answer_for(shards, request.query, partial(self._on_part, id))
            else:
                fields = {"type": "sql", "shards": shards, "query": request.query}
                self._asked[node.request_node(primary, encode_cbor(fields))] = id
        return None

    def answer_for(self, shards: list[str], query: str, respond: Answer) -> None:
        """Run a query over own shards."""
        replicas = [self._node.serving(shard) for shard in shards]
        if None in replicas:
            return respond(NotPrimary("a shard of the query has moved; send it again"))
        node, waiting = self._node, len(replicas)
        if node.fold_stalled:
            return respond(node.door.cannot_fold())

        deadline_ns = node.now_ns + node.knobs.page_within_ms * MILLISECOND_NS
        failed: list[BusKVError] = []

        def confirmed(replica: Replica, outcome: BusKVError | None) -> None:
            """No later epoch had begun when the query came (R5): what this node has committed is the newest."""
            if outcome is None:
                return replica.folder.barrier(folded)
            failed.append(outcome)
            return respond(outcome) if len(failed) == 1 else None

        def folded() -> None:
            nonlocal waiting
            waiting -= 1
            if not waiting:
                knobs = node.knobs
                sql = Sql(
                    0, shards, query, knobs.sql_rows_max, node.sizes.page, knobs.sql_timeout_ms
                )
                node.ask(sql, partial(_on_rows, respond))

        for replica in replicas:
            assert replica is not None
            told = partial(confirmed, replica)
            replica.answer_read("quorum", deadline_ns, told, None, replica.commit_seq)
        return None

    def on_response(self, correlation: int, body: bytes | None) -> bool:
        """Another node's answer; False when it is not (or no longer) for this."""
        id = self._asked.pop(correlation, None)
        if id is None:
            return False
        if body is None:
            self._on_part(id, ShardUnavailable("a primary does not answer; send it again"))
            return True
        try:
            fields = decode_cbor(body)
            self._on_part(id, from_body(fields) if "code" in fields else fields)
        except (BusKVError, KeyError, TypeError, ValueError):
            self._on_part(id, ShardUnavailable("a node's answer is not understood; send it again"))
        return True

    def _on_part(self, id: int, part: dict[str, Any] | BusKVError) -> None:
        call = self._calls.get(id)
        if call is None:
            return
        if isinstance(part, BusKVError):
            return self._finish(id, part)
        call.columns = part["columns"]
        call.rows += part["rows"]
        call.missing -= 1
        if not call.missing:
            self._finish(id, {"columns": call.columns, "rows": call.rows})

    def _finish(self, id: int, outcome: dict[str, Any] | BusKVError) -> None:
        self._timers.stop(str(id))
        if self._calls[id].missing:
            self._asked = {c: i for c, i in self._asked.items() if i != id}
        self._calls.pop(id).answer(outcome)

    def next_deadline_ns(self) -> int:
        return self._timers.next_ns

    def on_deadline(self, now_ns: int) -> None:
        for id in self._timers.pop_due(now_ns):
            self._asked = {c: i for c, i in self._asked.items() if i != int(id)}
            late = ShardUnavailable("not all primaries have answered in time; send it again")
            self._calls.pop(int(id)).answer(late)


def _on_rows(respond: Answer, answer: list[Any], failure: str | None) -> None:
    if failure is not None:
        code, colon, message = failure.partition(": ")
        if not colon or not code.isupper():
            code, message = "SHARD_UNAVAILABLE", f"{failure}; send it again"
        return respond(from_body({"code": code, "message": message}))
    columns, rows = answer
    return respond({"columns": columns, "rows": rows})
