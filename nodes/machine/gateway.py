"""The any-node verbs: route the requests of clients that know nothing of shards, and answer in their codec and time.

A call is one request of a client. Its operations are grouped by shard into parts; each part goes to that shard's
primary, to the own replica directly when that is here. A part that meets an old map or a silent primary is routed
again, under the same identity, until the call's time is over; then the answer says whether it may have been applied.
Gets at ONE go to the own replica or to any other, and to the primary when that one has no answer.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from bus_kv.core.circuit import Circuit
from bus_kv.core.fate import Fate
from bus_kv.core.timers import NEVER_NS
from bus_kv.errors import (
    BusKVError,
    Internal,
    KeyspaceUnknown,
    MalformedRequest,
    NoShard,
    Overloaded,
    ShardUnavailable,
    ShardUnknown,
    ValueTooLarge,
    from_body,
)  # fmt: skip
from bus_kv.knobs import MILLISECOND_NS
from bus_kv.protocol import batch as b
from bus_kv.protocol.batch import Batch, BatchReply, decode_batch_reply, split_batch
from bus_kv.protocol.codec import decode_cbor, encode_cbor
from bus_kv.protocol.requests import (
    DataRequest,
    HistoryRequest,
    ReceiptRequest,
    ScanRequest,
    ShardRequest,
    make_cursor,
    result_of,
)
from bus_kv.protocol.shard_map import ShardState
from nodes.machine.receipts import answer_receipt

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.protocol.shard_map import Shard
    from nodes.machine.node import NodeMachine


PAUSE_NS = 50 * MILLISECOND_NS
"""A part that has to wait is tried again after this."""
SETTLE_NS = 5 * MILLISECOND_NS
"""And so long after a change of the map: a primary that serves from now on hears of it no sooner."""


@dataclass(slots=True)
class Call:
    """One client request on its way; `answer` gets its result or its failure, once."""

    request: DataRequest | ShardRequest
    deadline_ns: int
    answer: Callable[[dict[str, Any] | BusKVError], None]
    results: list[dict[str, Any] | None] = field(default_factory=list)
    missing: int = 0
    done: bool = False

    def finish(self, outcome: dict[str, Any] | BusKVError) -> None:
        if not self.done:
            self.done = True
            self.answer(outcome)


@dataclass
class _Part(Fate):
    """The operations of a call that one shard owns, or a scan's page of it."""

    call: Call
    keyspace: str
    positions: list[int]
    batch: Batch | None
    anywhere: bool = False
    """Any replica may answer: gets at ONE, until one of them could not."""
    shard: str = ""
    node: str = ""
    """Who is asked, as far as that is known."""
    epoch: int = 0
    """Of the shard, as it was sent."""
    suspected: bool = False
    waits: bool = True
    """Not under way: it is sent when the map changes, or after a pause."""
    page_until_ns: int = 0
    """A page that is under way may take longer than other answers."""
    failure: BusKVError | None = None
    size: int = 0
    """Bytes of keys and values."""

    def __post_init__(self) -> None:
        if self.batch is not None:
            values = [value for value in self.batch.values or () if value is not None]
            self.size = sum(map(len, self.batch.keys)) + sum(map(len, values))

    @property
    def deadline_ns(self) -> int:
        may_take_long = not isinstance(self.call.request, DataRequest | ReceiptRequest)
        under_way = may_take_long and not self.waits
        return self.page_until_ns if under_way else self.call.deadline_ns

    @property
    def reads_at_one(self) -> bool:
        """A call of gets alone: those among writes may have to see them."""
        request = self.call.request
        return (
            isinstance(request, DataRequest)
            and request.consistency == "one"
            and request.batch.kinds.count(b.GET) == len(request.batch)
        )

    @property
    def is_read(self) -> bool:
        if self.batch is not None:
            return self.batch.kinds.count(b.GET) == len(self.batch)
        return not (isinstance(self.call.request, ScanRequest) and self.call.request.erase)


class _Parts:
    """Parts that are under way or wait, by correlation, and how many bytes they hold."""

    def __init__(self) -> None:
        self._parts: dict[int, _Part] = {}
        self.bytes = 0

    def __setitem__(self, correlation: int, part: _Part) -> None:
        self._parts[correlation] = part
        self.bytes += part.size

    def __delitem__(self, correlation: int) -> None:
        self.bytes -= self._parts.pop(correlation).size

    def pop(self, correlation: int) -> _Part | None:
        part = self._parts.pop(correlation, None)
        self.bytes -= part.size if part is not None else 0
        return part

    def get(self, correlation: int) -> _Part | None:
        return self._parts.get(correlation)

    def items(self) -> list[tuple[int, _Part]]:
        return [*self._parts.items()]

    def __contains__(self, correlation: int) -> bool:
        return correlation in self._parts

    def __len__(self) -> int:
        return len(self._parts)


class Gateway:
    def __init__(self, node: NodeMachine, client: str) -> None:
        self._node = node
        self._knobs = node.knobs
        self._client = client
        """Identity of requests that came without one."""
        self._number = 0
        self._parts = _Parts()
        self._wakes: list[tuple[int, int]] = []
        self.circuit = Circuit(node.knobs.suspect_after_ms * MILLISECOND_NS)
        self._answered_ns: dict[str, int] = {}
        """Node -> when it answered last."""

    def start(
        self, request: DataRequest | ShardRequest, now_ns: int,
        answer: Callable[[dict[str, Any] | BusKVError], None],
    ) -> None:  # fmt: skip
        """Take on a request. `answer` is called once, within `answer_within_ms`."""
        parts, knobs = self._parts, self._knobs
        if len(parts) >= knobs.calls_max or parts.bytes > knobs.parked_bytes_max:
            return answer(Overloaded("this node has too many requests under way; send it again"))
        keyspace = self._node.map.keyspaces.get(request.keyspace)
        if keyspace is None:
            return answer(self._no_keyspace(request.keyspace))
        if request.consistency is None:
            request.consistency = keyspace.consistency
        call = Call(request, now_ns + self._node.answer_within_ns, answer)
        if not isinstance(request, DataRequest):
            if isinstance(request, ScanRequest) and request.erase == ("", 0):
                request.erase = self._next_id()
            call.missing = 1
            return self._route(_Part(call, request.keyspace, [0], None), now_ns)
        self._identify(request)
        call.results = [None] * len(request.batch)
        self._start_data(call, request, now_ns)
        return None

    def _no_keyspace(self, keyspace: str) -> BusKVError:
        if not self._node.map.keyspaces:
            return ShardUnavailable("no shard is laid out yet; send it again in a moment")
        return KeyspaceUnknown(f"there is no keyspace {keyspace!r}; see `bus-kv status`")

    def _identify(self, request: DataRequest) -> None:
        batch = request.batch
        assert request.consistency is not None
        batch.consistency = request.consistency
        client, number = request.request_id or self._next_id()
        batch.client, batch.numbers = client, [number] * len(batch)
        batch.indexes = list(range(len(batch))) if request.verb == "batch" else []

    def _next_id(self) -> tuple[str, int]:
        self._number += 1
        return (self._client, self._number)

    def _start_data(self, call: Call, request: DataRequest, now_ns: int) -> None:
        batch = request.batch
        groups = self._group(request.keyspace, batch)
        outside = groups.pop(None, [])
        if batch.atomic and len(groups) + bool(outside) > 1:
            return call.finish(MalformedRequest("an atomic batch must lie within one shard"))
        if batch.atomic and len(batch.encode()) > self._node.sizes.batch:
            return call.finish(ValueTooLarge("the atomic batch does not fit into one log entry"))
        parts: list[_Part] = []
        for positions in groups.values():
            pieces = split_batch(batch.select(positions), self._node.sizes.batch)
            for piece in pieces:
                own, positions = positions[: len(piece)], positions[len(piece) :]
                parts.append(_Part(call, request.keyspace, own, piece))
        for part in parts:
            part.anywhere = part.reads_at_one
        call.missing = len(parts) + bool(outside)
        if outside:
            self._finish_part(call, outside, [_no_shard().to_body()] * len(outside))
        for part in parts:
            self._route(part, now_ns)
        return None

    def _group(self, keyspace: str, batch: Batch) -> dict[str | None, list[int]]:
        """Operations by the shard that owns their key; None: outside every shard."""
        map = self._node.map
        groups: dict[str | None, list[int]] = {}
        for i, key in enumerate(batch.keys):
            shard = map.shard_of(keyspace, key)
            groups.setdefault(shard.id if shard else None, []).append(i)
        return groups

    @property
    def is_busy(self) -> bool:
        return len(self._parts) > 0

    # ---- one part ----

    def _route(self, part: _Part, now_ns: int) -> None:
        """Send a part to the primary of its shard, as the map is now; a part that lies in several is split."""
        part.waits = True
        if part.batch is None:
            shard = self._page_shard(part.call.request)
            if shard is None:
                return self._on_no_shard(part)
        else:
            groups = self._group(part.keyspace, part.batch)
            if len(groups) > 1:
                return self._split(part, groups, now_ns)
            shard = self._node.map.shard_of(part.keyspace, part.batch.keys[0])
            if shard is None:
                return self._fail_part(part, part.verdict(_no_shard()))
        part.shard, part.node = shard.id, shard.primary
        if part.anywhere:
            return self._send_anywhere(part, now_ns)
        if shard.state is not ShardState.ACTIVE:
            part.failure = ShardUnavailable(f"shard {shard.id} is {shard.state}; send it again")
            return self._pause(part, now_ns)
        is_own = shard.primary == self._node.config.id
        if not (is_own or self.circuit.lets_through(shard.primary, now_ns)):
            silence = f"{shard.primary}, the primary of shard {shard.id}, does not answer"
            part.failure = ShardUnavailable(f"{silence}; send it again")
            return self._pause(part, now_ns)
        return self._send(part, shard, now_ns)

    def _split(self, part: _Part, groups: dict[str | None, list[int]], now_ns: int) -> None:
        assert part.batch is not None
        part.call.missing += len(groups) - 1
        for indexes in groups.values():
            own = [part.positions[i] for i in indexes]
            piece = _Part(part.call, part.keyspace, own, part.batch.select(indexes))
            piece.unanswered, piece.anywhere = part.unanswered, part.anywhere
            self._route(piece, now_ns)

    def _page_shard(self, request: DataRequest | ShardRequest) -> Shard | None:
        """The shard where a page begins; where no shard is, the next one in the scan's direction."""
        if isinstance(request, ReceiptRequest):
            return self._node.map.shards.get(request.shard)
        if isinstance(request, HistoryRequest):
            return self._node.map.shard_of(request.keyspace, request.key)
        assert isinstance(request, ScanRequest)
        shards = self._node.map.ordered(request.keyspace)
        if request.reverse:
            below = [s for s in shards if request.end is None or s.start < request.end]
            return below[-1] if below and _reaches(below[-1], request.start) else None
        above = [s for s in shards if s.end is None or request.start < s.end]
        return above[0] if above and (request.end is None or above[0].start < request.end) else None

    def _on_no_shard(self, part: _Part) -> None:
        """A scan has come to its end; a key's history is nowhere."""
        request = part.call.request
        if isinstance(request, ReceiptRequest):
            unknown = f"there is no shard {request.shard!r}; see `bus-kv shards list`"
            return self._fail_part(part, ShardUnknown(unknown))
        if not isinstance(request, ScanRequest):
            return self._fail_part(part, _no_shard())
        empty: dict[str, Any] = {"items": []}
        if request.count_only:
            empty = {"count": 0}
        elif request.erase:
            empty = {"deleted": 0, "version": None}
        return self._finish_page(part, empty, None)

    def _send(self, part: _Part, shard: Shard, now_ns: int) -> None:
        part.waits = False
        part.epoch = shard.epoch
        part.page_until_ns = now_ns + self._knobs.page_within_ms * MILLISECOND_NS
        here = self._node.serving(shard.id) is not None
        if here and part.batch is not None:
            deadline_ns, respond = part.call.deadline_ns, partial(self._on_reply, part)
            raw = part.batch.encode()
            return self._node.door.submit(
                shard.id, part.batch, raw, shard.epoch, deadline_ns, respond
            )
        request = part.call.request
        if here:
            assert not isinstance(request, DataRequest)
            answered, deadline_ns = partial(self._on_page, part), part.deadline_ns
            if isinstance(request, ReceiptRequest):
                return answer_receipt(self._node, request, shard.epoch, deadline_ns, answered)
            return self._node.door.page(shard.id, request, shard.epoch, deadline_ns, answered)
        body: dict[str, Any] = {"epoch": shard.epoch}
        if part.batch is not None:
            body["batch"] = part.batch.encode()
        else:
            assert not isinstance(request, DataRequest)
            form = "scan" if isinstance(request, ScanRequest) else request.verb
            body |= {form: request.to_wire(), "consistency": request.consistency}
        return self._ask(part, self._node.request_shard(shard.id, encode_cbor(body)), now_ns)

    def _send_anywhere(self, part: _Part, now_ns: int) -> None:
        """Have gets answered by the own replica, or by any other."""
        assert part.batch is not None
        part.waits = False
        node, raw = self._node, part.batch.encode()
        if node.reading(part.shard) is not None:
            part.node = node.config.id
            deadline_ns, respond = part.call.deadline_ns, partial(self._on_reply, part)
            return node.door.submit(part.shard, part.batch, raw, None, deadline_ns, respond)
        body = encode_cbor({"batch": raw})
        return self._ask(part, node.request_shard(part.shard, body, any=True), now_ns)

    def _ask(self, part: _Part, correlation: int, now_ns: int) -> None:
        self._parts[correlation] = part
        self._wake(correlation, now_ns + self._knobs.suspect_after_ms * MILLISECOND_NS, part)

    def _at_primary(self, part: _Part, now_ns: int) -> None:
        """No replica has an answer: have the primary give it."""
        part.anywhere = False
        self._route(part, now_ns)

    def _pause(self, part: _Part, now_ns: int, pause_ns: int = PAUSE_NS) -> None:
        correlation = self._node.next_correlation()
        self._parts[correlation] = part
        self._wake(correlation, now_ns + pause_ns, part)

    def _wake(self, correlation: int, at_ns: int, part: _Part) -> None:
        heapq.heappush(self._wakes, (min(at_ns, part.deadline_ns), correlation))

    # ---- what comes back ----

    def on_response(self, correlation: int, body: bytes | None) -> bool:
        """An answer of a primary; False when it is not (or no longer) this gateway's."""
        part = self._parts.pop(correlation)
        if part is None:
            return False
        if not part.anywhere and body is not None:
            self.circuit.succeed(part.node)
            self._answered_ns[part.node] = self._node.now_ns
        if body is None:
            if not part.anywhere:
                self._node.suspect(part.shard, "no responders")
            gone = ShardUnavailable(f"nobody serves shard {part.shard}; send it again")
            self._on_failure(part, gone)
            return True
        try:
            fields = decode_cbor(body)
            reply = decode_batch_reply(fields["batch"]) if "batch" in fields else None
        except (BusKVError, TypeError, ValueError):
            self._on_failure(part, Internal(f"shard {part.shard} sent an answer that is none"))
            return True
        if reply is not None:
            part.node = fields.get("node", part.node)
            self._on_reply(part, reply)
        elif "next" in fields or "state" in fields:
            self._on_page(part, fields)
        else:
            self._on_failure(part, from_body(fields))
        return True

    def _on_reply(self, part: _Part, reply: BatchReply | BusKVError) -> None:
        if isinstance(reply, BusKVError):
            return self._on_failure(part, reply)
        assert part.batch is not None
        if not part.anywhere:
            self._node.suspicions.silent.pop(part.shard, None)
        results = [
            result_of(part.batch, reply, i, part.shard, part.node) for i in range(len(part.batch))
        ]
        for i, body in reply.failures.items():
            results[i] = part.verdict(from_body(body)).to_body()
        for i, outcome in enumerate(reply.outcomes):
            if outcome == b.UNANSWERED:
                results[i] = _too_much().to_body()
        return self._finish_part(part.call, part.positions, results)

    def _on_page(self, part: _Part, page: dict[str, Any] | BusKVError) -> None:
        if isinstance(page, BusKVError):
            return self._on_failure(part, page)
        request = part.call.request
        if isinstance(request, ReceiptRequest):
            return self._finish_part(part.call, part.positions, [page])
        position = page.pop("next")
        if isinstance(request, HistoryRequest):
            page["cursor"] = None if position is None else f"{position[0]}.{position[1]}"
            return self._finish_part(part.call, part.positions, [page])
        assert isinstance(request, ScanRequest)
        if position is None:
            position = self._beyond(part, request)
        return self._finish_page(part, page, position)

    def _finish_page(self, part: _Part, page: dict[str, Any], position: bytes | None) -> None:
        request = part.call.request
        assert isinstance(request, ScanRequest)
        if request.erase and not page["deleted"] and position is not None:
            # Nothing is left in this shard: the next one.
            request.start = position
            return self._route(part, self._node.now_ns)
        if request.erase:
            page = {"results": [{**page, "more": position is not None}]}
        else:
            page["cursor"] = None if position is None else make_cursor(request, position)
        return self._finish_part(part.call, part.positions, [page])

    def _beyond(self, part: _Part, request: ScanRequest) -> bytes | None:
        """Where the scan goes on behind the shard that is exhausted; None at the end of its range."""
        shard = self._node.map.shards.get(part.shard)
        if shard is None:
            return None
        if request.reverse:
            return shard.start if shard.start > request.start else None
        if shard.end is None or (request.end is not None and shard.end >= request.end):
            return None
        return shard.end

    def _on_failure(self, part: _Part, failure: BusKVError) -> None:
        """Route the part again if that can help and time is left, else tell the client."""
        now_ns = self._node.now_ns
        if part.anywhere and failure.refreshes_map:
            return self._at_primary(part, now_ns)
        part.note(failure)
        part.failure = failure
        part.waits = True
        if not failure.retriable or now_ns >= part.call.deadline_ns:
            return self._fail_part(part, part.verdict(failure))
        if failure.refreshes_map:
            self._node.fetch_map()
        part.anywhere = part.reads_at_one
        return self._pause(part, now_ns)

    def _fail_part(self, part: _Part, failure: BusKVError) -> None:
        if part.batch is None or part.call.request.verb != "batch":
            part.call.finish(failure)
            return
        self._finish_part(part.call, part.positions, [failure.to_body()] * len(part.positions))

    def _finish_part(self, call: Call, positions: list[int], results: list[dict[str, Any]]) -> None:
        if not isinstance(call.request, DataRequest):
            return call.finish(results[0])
        for position, result in zip(positions, results, strict=True):
            call.results[position] = result
        call.missing -= 1
        if call.missing:
            return None
        if call.request.verb == "batch":
            return call.finish({"results": call.results})
        only = call.results[0]
        assert only is not None
        return call.finish(from_body(only) if "code" in only else only)

    # ---- time ----

    def next_deadline_ns(self) -> int:
        while self._wakes and self._wakes[0][1] not in self._parts:
            heapq.heappop(self._wakes)
        return self._wakes[0][0] if self._wakes else NEVER_NS

    def on_deadline(self, now_ns: int) -> None:
        while self._wakes and self._wakes[0][0] <= now_ns:
            _, correlation = heapq.heappop(self._wakes)
            part = self._parts.get(correlation)
            if part is not None:
                self._on_wake(correlation, part, now_ns)

    def _on_wake(self, correlation: int, part: _Part, now_ns: int) -> None:
        if part.call.done:
            del self._parts[correlation]
        elif now_ns >= part.deadline_ns:
            del self._parts[correlation]
            if not part.waits:
                part.abandon()
            silence = ShardUnavailable(f"shard {part.shard} does not answer; send it again")
            self._fail_part(part, part.verdict(part.failure or silence))
        elif part.waits:
            del self._parts[correlation]
            self._route(part, now_ns)
        elif part.anywhere:
            del self._parts[correlation]
            self._at_primary(part, now_ns)
        else:
            self._on_silence(correlation, part, now_ns)

    def _on_silence(self, correlation: int, part: _Part, now_ns: int) -> None:
        """No answer yet; when another epoch has begun meanwhile none may come, for the old primary does not listen."""
        shard = self._node.map.shards.get(part.shard)
        if shard is None or shard.epoch != part.epoch:
            return self._route_again(correlation, part, now_ns)
        patience_ns = self._knobs.suspect_after_ms * MILLISECOND_NS
        answered_ns = self._answered_ns.get(part.node, 0)
        if now_ns - answered_ns < patience_ns:
            # It is busy with others: not silent.
            return self._wake(correlation, answered_ns + patience_ns, part)
        if part.suspected:
            # It may have come to a frozen node alone, before the next primary listened.
            part.suspected = False
            return self._route_again(correlation, part, now_ns)
        part.suspected = True
        self._node.suspect(part.shard, f"no answer for {self._knobs.suspect_after_ms} ms")
        if part.batch is None or part.call.request.consistency == "all":
            # A page takes its time, and at ALL it may be another member that is waited for.
            return self._wake(correlation, part.deadline_ns, part)
        self.circuit.fail(part.node, now_ns)
        return self._wake(correlation, now_ns + patience_ns, part)

    def on_map(self, now_ns: int) -> None:
        """The map changed: parts that wait, and those that nobody answers, are soon routed again."""
        for correlation, part in self._parts.items():
            if part.waits or part.suspected:
                del self._parts[correlation]
                if not part.waits:
                    part.abandon()
                part.waits, part.suspected = True, False
                self._pause(part, now_ns, SETTLE_NS)

    def _route_again(self, correlation: int, part: _Part, now_ns: int) -> None:
        del self._parts[correlation]
        if not part.waits:
            part.abandon()
        self._route(part, now_ns)


def _reaches(shard: Shard, start: bytes) -> bool:
    return shard.end is None or start < shard.end


def _no_shard() -> BusKVError:
    return NoShard("the key lies outside every shard; see `bus-kv shards list`")


def _too_much() -> BusKVError:
    return ValueTooLarge("the values do not fit into one reply; ask for fewer keys at once")
