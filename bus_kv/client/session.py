"""The client's machine: routes operations by the shard map, coalesces them, and retries until each has one outcome.

Theory of operation. `submit` gives every operation its own request number and puts it into a lane: one per shard, level
and kind (reads never wait for writes). A turn sends what its lanes hold, so operations that were submitted together
travel together and a lone one leaves at once. While messages of a lane are in flight, the next leaves when it is worth
it (`client_fill_operations`) or an answer is late, and the window allows. A message that fails or stays unanswered puts
its operations back, numbers kept: the shard recognizes a repeat, so an operation takes effect once, however often sent.
Gets at ONE go to any replica first, and to the primary when that one has no answer.

The routes follow the changes that coordinators announce. Where these cannot be heard, answers tell that there are newer
ones, or that the own ones are wrong; then the map is read.
"""

from __future__ import annotations

import heapq
from itertools import repeat
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeAlias

from bus_kv.client.calls import (
    ADMIN_READING_VERBS,
    WRITING_VERBS,
    Call,
    Calls,
    patience_ns,
    pause_ns,
)  # fmt: skip
from bus_kv.client.lane import Columns, Lane, Operation, Sent, columns_of, operations_of
from bus_kv.client.primaries import Primaries
from bus_kv.client.results import Entry, Fates, ReadState, Receipt
from bus_kv.core.machine import Publish, Ready, Received, Request, Responded
from bus_kv.errors import (
    BusKVError,
    KeyspaceUnknown,
    NoShard,
    Overloaded,
    ShardUnavailable,
    ValueTooLarge,
    from_body,
)  # fmt: skip
from bus_kv.knobs import MILLISECOND_NS, SECOND_NS, Knobs
from bus_kv.protocol import batch as b
from bus_kv.protocol.batch import BatchReply, decode_batch_reply
from bus_kv.protocol.codec import decode_body, decode_cbor, encode_cbor, encode_json
from bus_kv.protocol.routes import Routes, routes_after, routes_from_public
from bus_kv.protocol.sizes import Sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bus_kv.core.machine import Effect, Event
    from bus_kv.protocol.batch import Version
    from bus_kv.protocol.routes import Route
    from bus_kv.subjects import Subjects

    Outcome: TypeAlias = Entry | Receipt | dict[str, Any] | BusKVError
    Done: TypeAlias = Callable[[Sequence[Any], Sequence[Outcome]], None]

ROUTES_NEW_NS = 100 * MILLISECOND_NS
"""Routes that were told so lately are not asked for again."""
LATE_NS_MIN = 5 * MILLISECOND_NS
"""An answer that takes longer than this, and twice as long as usual, is late."""
SETTLE_NS = 5 * MILLISECOND_NS
"""How long after a change of the map what waits is sent again."""
_by_number = attrgetter("number")
_IS_FOUND = bytes(o in (b.REPLACED, b.DELETED, b.FOUND) for o in range(256))


class Session:
    """`client` identifies this session's requests; it must be unique among all clients of the cluster."""

    def __init__(
        self, client: str, subjects: Subjects, knobs: Knobs, max_payload_bytes: int, done: Done
    ):
        self.client = client
        self.routes: Routes | None = None
        self.fates: Fates | None = None
        """Whom receipts ask what became of their write."""
        self._subjects, self._knobs, self._done = subjects, knobs, done
        self._sizes = Sizes(max_payload_bytes)
        self._timeout_ns = int(knobs.client_timeout_s * SECOND_NS)
        self._pending_max = knobs.client_pending_operations_max
        self._number = 0
        self._correlation = 0
        self._pending = 0
        self._told = 0
        """Outcomes since the last Ready."""
        self._lanes: dict[tuple[str, bool, str, bool], Lane] = {}
        self._near: dict[tuple[bool, str, str | None], tuple[bytes, bytes | None, Lane]] = {}
        """(is a read, keyspace, level) -> range and lane of the shard asked last."""
        self.dirty: dict[Lane, None] = {}
        """To be looked at in the next turn. While there is any, one is about to come."""
        self._sent: dict[int, Sent] = {}
        self._primaries = Primaries()
        self._calls = Calls(self._request, self._finish, knobs)
        self._unrouted: list[Operation] = []
        self._paused: list[tuple[int, int, Operation]] = []
        self._routes_ns = -ROUTES_NEW_NS
        """When the routes were told last."""
        self._fetch: int | None = None
        self._fetch_ns = 0
        self._fetch_cached = False
        self._effects: list[Effect] = []
        self._said_ns: dict[str, int] = {}
        """Node -> until when its silence need not be told again."""

    # ---- what a client asks for ----

    def get(
        self, key: bytes, token: Any, now_ns: int, keyspace: str = "default",
        consistency: str | None = None,
    ) -> None:  # fmt: skip
        """Take on a get; its outcome is told once, by `done([token], [outcome])`."""
        if self._pending >= self._pending_max:
            return self._done((token,), (_too_many(),))
        self._pending += 1
        lane = self._lane_of(True, key, keyspace, consistency)
        if lane is None:
            return self._route(
                Operation(
                    b.GET, key, None, token, self._next_number(), now_ns + self._timeout_ns,
                    keyspace, consistency,
                ), now_ns,
            )  # fmt: skip
        self.dirty[lane] = None
        waiting = lane.waiting
        waiting.keys.append(key)
        waiting.tokens.append(token)
        waiting.deadlines_ns.append(now_ns + self._timeout_ns)
        return None

    def write(
        self, kind: int, key: bytes, value: bytes | None, token: Any, now_ns: int,
        keyspace: str = "default", consistency: str | None = None, if_absent: bool = False,
        if_version: Version | None = None, ttl_ms: int | None = None,
    ) -> None:  # fmt: skip
        """Take on a put or delete, in the same way."""
        if self._pending >= self._pending_max:
            return self._done((token,), (_too_many(),))
        self._pending += 1
        has_condition = if_absent or if_version is not None
        lane = self._lane_of(False, key, keyspace, consistency)
        if lane is None:
            return self._route(
                Operation(
                    kind, key, value, token, self._next_number(), now_ns + self._timeout_ns,
                    keyspace, consistency, has_condition, if_version, ttl_ms,
                ), now_ns,
            )  # fmt: skip
        self.dirty[lane] = None
        waiting = lane.waiting
        if has_condition:
            waiting.conditions[len(waiting.keys)] = if_version
        if ttl_ms is not None:
            waiting.ttls_ms[len(waiting.keys)] = ttl_ms
        waiting.kinds.append(kind)
        waiting.keys.append(key)
        waiting.values.append(value)
        waiting.tokens.append(token)
        waiting.deadlines_ns.append(now_ns + self._timeout_ns)
        return None

    def submit_many(
        self, kind: int, keys: list[bytes], values: Sequence[bytes | None], tokens: list[Any],
        now_ns: int, keyspace: str, consistency: str | None, ttl_ms: int | None,
    ) -> None:  # fmt: skip
        """The same for many, none of them conditional; in one go when they belong to one shard."""
        lane = self._lane_of(kind == b.GET, min(keys), keyspace, consistency)
        room = self._pending_max - self._pending
        if (
            lane is None
            or len(keys) > room
            or ttl_ms is not None
            or not self._owns(lane, max(keys))
        ):
            for key, value, token in zip(keys, values, tokens, strict=True):
                if kind == b.GET:
                    self.get(key, token, now_ns, keyspace, consistency)
                else:
                    self.write(
                        kind, key, value, token, now_ns, keyspace, consistency, ttl_ms=ttl_ms
                    )
            return
        self._pending += len(keys)
        self.dirty[lane] = None
        lane.waiting.extend(kind, keys, values, tokens, now_ns + self._timeout_ns)

    def _owns(self, lane: Lane, key: bytes) -> bool:
        assert self.routes is not None
        route = self.routes.find(lane.keyspace, key)
        is_range = self.routes.keyspaces[lane.keyspace].policy == "range"
        return is_range and route is not None and route.shard == lane.shard

    def call(self, verb: str, fields: dict[str, Any], token: Any, now_ns: int) -> None:
        """Ask any node. What may be sent again is, under one request_id, until it is answered or its time is over."""
        if verb in WRITING_VERBS and "request_id" not in fields:
            fields = {**fields, "request_id": f"{self.client}:{self._next_number()}"}
        attempt_ns, timeout_ns = patience_ns(verb, self._knobs)
        subject, body = self._subjects.verb(verb), encode_cbor(fields)
        call = Call(verb, subject, body, token, now_ns + timeout_ns, attempt_ns)
        return self._begin_call(call, now_ns)

    def administer(self, verb: str, fields: dict[str, Any], token: Any, now_ns: int) -> None:
        """Ask the active coordinator; what changes something once, because asking again could do it twice."""
        timeout_ns = int(self._knobs.admin_timeout_s * SECOND_NS)
        attempt_ns = timeout_ns
        if verb in ADMIN_READING_VERBS:
            attempt_ns = self._knobs.client_attempt_ms * MILLISECOND_NS
        subject, body = self._subjects.admin(verb), encode_cbor(fields)
        deadline_ns = now_ns + timeout_ns
        call = Call(verb, subject, body, token, deadline_ns, attempt_ns, to_coordinator=True)
        return self._begin_call(call, now_ns)

    def _begin_call(self, call: Call, now_ns: int) -> None:
        if self._pending >= self._pending_max:
            return self._done((call.token,), (_too_many(),))
        if len(call.body) > self._sizes.message:
            refusal = ValueTooLarge(f"a request has at most {self._sizes.message} bytes; send less")
            return self._done((call.token,), (refusal,))
        self._pending += 1
        return self._calls.send(call, now_ns)

    def fetch_routes(self, now_ns: int) -> None:
        """Read the shard map, unless that is under way."""
        if self._fetch is None:
            self._fetch = self._request(
                self._subjects.verb("map"),
                encode_cbor({"cached": True} if self._fetch_cached else {}),
            )
            self._fetch_ns = now_ns + self._knobs.client_attempt_ms * MILLISECOND_NS // 2

    def close(self, reason: str) -> None:
        """End every operation and call that has no outcome yet."""
        sent = [(o, True) for message in self._sent.values() for o in message.operations()]
        waiting = [(o, False) for lane in self._lanes.values() for o in self._all_waiting(lane)]
        paused = [(item, False) for _, _, item in self._paused]
        unrouted = [(o, False) for o in self._unrouted]
        calls = self._calls.take_all()
        items: list[tuple[Operation | Call, bool]] = [
            *sent, *waiting, *paused, *unrouted, *calls,
        ]  # fmt: skip
        for item, is_sent in items:
            if is_sent:
                item.abandon()
            self._finish(item.token, item.verdict(ShardUnavailable(reason)))
        self._sent, self._lanes, self._paused, self._unrouted = {}, {}, [], []
        self._near.clear()

    # ---- the machine ----

    def step(self, event: Event, now_ns: int) -> None:
        if isinstance(event, Received):
            return self._on_change(event.body, now_ns)
        assert isinstance(event, Responded), "a client's events are answers and changes of the map"
        correlation = event.correlation
        if correlation in self._sent:
            return self._on_reply(self._sent.pop(correlation), event.body, now_ns)
        if correlation == self._fetch:
            return self._on_routes(event.body, now_ns)
        return self._calls.on_response(correlation, event.body, now_ns)

    def take_ready(self, now_ns: int) -> Ready:
        self._told = 0
        while self.dirty:
            dirty, self.dirty = self.dirty, {}
            for lane in dirty:
                self._send_waiting(lane, now_ns)
        effects, self._effects = self._effects, []
        return Ready(effects)

    def _send_waiting(self, lane: Lane, now_ns: int) -> None:
        """Send what a lane holds, as far as it may be sent now."""
        route = self._open_route(lane, now_ns)
        if route is None:
            return
        while lane.again and self._may_send_again(lane, route):
            self._send_again(lane, route, now_ns)
        while lane.waiting.keys and self._may_send(lane, route, now_ns):
            self._send_new(lane, route, now_ns)

    @property
    def is_full(self) -> bool:
        return self._told >= self._knobs.turn_operations_max

    def settle(self, now_ns: int) -> bool:
        del now_ns
        return False

    is_settled = True

    def next_deadline_ns(self) -> int:
        candidates = [self._calls.next_ns(), *(sent.next_ns for sent in self._sent.values())]
        candidates += [self._paused[0][0]] if self._paused else []
        if self._fetch is not None:
            candidates.append(self._fetch_ns)
        working = [lane for lane in self._lanes.values() if lane.has_work]
        candidates += [lane.next_deadline_ns for lane in working]
        candidates += [lane.late_ns for lane in working if lane.in_flight and lane.late_ns]
        candidates += [o.deadline_ns for o in self._unrouted[:1]]
        return min(candidates)

    def on_deadline(self, now_ns: int) -> None:
        if self._fetch is not None and self._fetch_ns <= now_ns:
            self._fetch = None
            self._fetch_cached = True
            self.fetch_routes(now_ns)
        for correlation in [c for c, sent in self._sent.items() if sent.next_ns <= now_ns]:
            self._on_delay(correlation, now_ns)
        self._calls.on_deadline(now_ns)
        while self._paused and self._paused[0][0] <= now_ns:
            self._route(heapq.heappop(self._paused)[2], now_ns)
        self._unrouted = self._drop_late(self._unrouted, now_ns)
        for lane in [lane for lane in self._lanes.values() if lane.has_work]:
            if lane.late_ns <= now_ns:
                lane.late_ns = 0
                self.dirty[lane] = None
            if lane.next_deadline_ns <= now_ns:
                lane.again = self._drop_late(self._all_waiting(lane), now_ns)

    # ---- routing ----

    def _lane_of(
        self, reads: bool, key: bytes, keyspace: str, consistency: str | None
    ) -> Lane | None:
        """Where an operation can wait; None if its shard cannot take it now. The last one's shard is tried first."""
        near = self._near.get((reads, keyspace, consistency))
        if near is not None and near[0] <= key and (near[1] is None or key < near[1]):
            return near[2]
        if self.routes is None or keyspace not in self.routes.keyspaces:
            return None
        route = self.routes.find(keyspace, key)
        if route is None or not route.active:
            return None
        lane = self._lane(route, reads, keyspace, consistency)
        if self.routes.keyspaces[keyspace].policy == "range":
            self._near[reads, keyspace, consistency] = (route.start, route.end, lane)
        return lane

    def _lane(
        self, route: Route, reads: bool, keyspace: str, consistency: str | None,
        at_primary: bool = False,
    ) -> Lane:  # fmt: skip
        assert self.routes is not None
        level = consistency or self.routes.keyspaces[keyspace].consistency
        anywhere = reads and level == "one" and not at_primary
        id = (route.shard, reads, level, anywhere)
        if id not in self._lanes:
            self._lanes[id] = Lane(route.shard, reads, level, keyspace, anywhere)
        return self._lanes[id]

    def _route(self, operation: Operation, now_ns: int) -> None:
        if self.routes is None:
            self._unrouted.append(operation)
            return self.fetch_routes(now_ns)
        keyspace = self.routes.keyspaces.get(operation.keyspace)
        route = None if keyspace is None else self.routes.find(operation.keyspace, operation.key)
        if keyspace is None or route is None:
            return self._no_route(operation, keyspace is None, now_ns)
        lane = self._lane(
            route, operation.is_read, operation.keyspace, operation.consistency,
            operation.at_primary,
        )  # fmt: skip
        if not (route.active or lane.anywhere):
            return self._again(
                operation, ShardUnavailable(f"shard {route.shard} is recovering"), now_ns
            )
        lane.again.append(operation)
        self.dirty[lane] = None
        return None

    def _no_route(self, operation: Operation, no_keyspace: bool, now_ns: int) -> None:
        """Perhaps the map is old: read it once before saying so."""
        if operation.attempts == 0:
            self._fetch_cached = False
            self.fetch_routes(now_ns)
        if operation.attempts == 0 or (no_keyspace and self.routes and not self.routes.keyspaces):
            return self._again(operation, ShardUnavailable("no shard is laid out yet"), now_ns)
        if no_keyspace:
            missing: BusKVError = KeyspaceUnknown(f"there is no keyspace {operation.keyspace!r}")
        else:
            missing = NoShard("the key lies outside every shard; see `bus-kv shards list`")
        return self._finish(operation.token, operation.verdict(missing))

    def _open_route(self, lane: Lane, now_ns: int) -> Route | None:
        """The way of what a lane holds; None when there is none at the moment: then it is routed again."""
        assert self.routes is not None
        route = self.routes.by_id.get(lane.shard)
        if route is not None and (route.active or lane.anywhere):
            return route
        for operation in self._all_waiting(lane):
            self._route(operation, now_ns)
        return None

    def _may_send_again(self, lane: Lane, route: Route) -> bool:
        if not (lane.anywhere or self._primaries.lets_through(route.primary)):
            return False
        return lane.in_flight < self._knobs.client_window_messages

    def _may_send(self, lane: Lane, route: Route, now_ns: int) -> bool:
        """At once when nothing is in flight; else what is worth a message, and anything when an answer is late.

        A message costs all who handle it together as much as dozens of operations: few and large ones are cheap. But
        it is half of what is in flight, once that is worth one, so that the nodes work on one while the client works
        on the other. And what holds up the answer to one is no reason for others to wait.
        """
        if not self._may_send_again(lane, route):
            return False
        worth = max(lane.operations_in_flight // 2, self._fill(lane))
        is_due = not lane.in_flight or now_ns >= lane.late_ns
        return is_due or len(lane.waiting.keys) >= worth

    def _fill(self, lane: Lane) -> int:
        """How many operations are worth a message; one of gets costs less, as it makes no entry."""
        return self._knobs.client_fill_operations // (2 if lane.reads else 1)

    def _send_new(self, lane: Lane, route: Route, now_ns: int) -> None:
        """Send what waits for its first attempt, as much as one message takes."""
        waiting, count = lane.waiting, len(lane.waiting)
        if not lane.in_flight:
            half = -(-count // 2)  # the other one follows
            count = half if half >= self._fill(lane) else count
        columns, lane.waiting = waiting.split(self._cut(waiting, count))
        numbers = range(self._number + 1, self._number + 1 + len(columns))
        self._number = numbers[-1]
        self._send(lane, route, columns, numbers, None, now_ns)

    def _send_again(self, lane: Lane, route: Route, now_ns: int) -> None:
        """Send what was sent before: by number, as a batch has to be."""
        lane.again.sort(key=_by_number)
        count = self._cut(columns_of(lane.again), len(lane.again))
        operations, lane.again = lane.again[:count], lane.again[count:]
        numbers = [o.number for o in operations]
        self._send(lane, route, columns_of(operations), numbers, operations, now_ns)

    def _cut(self, waiting: Columns, count: int) -> int:
        count = min(
            len(waiting), count, self._knobs.client_batch_operations_max, self._sizes.operations
        )
        return waiting.fitting(count, self._sizes.batch)

    def _send(
        self, lane: Lane, route: Route, columns: Columns, numbers: Sequence[int],
        again: list[Operation] | None, now_ns: int,
    ) -> None:  # fmt: skip
        fields: dict[str, Any] = {"epoch": route.epoch}
        node, subject = route.primary, self._subjects.shard_request
        attempt_ms = self._knobs.client_attempt_ms
        if lane.anywhere:
            fields, node, subject = {}, "", self._subjects.shard_read
            attempt_ms = self._knobs.suspect_after_ms
        fields["batch"] = columns.batch(self.client, numbers, lane.consistency).encode()
        correlation = self._request(subject(lane.shard), encode_cbor(fields))
        give_up_ns = now_ns + attempt_ms * MILLISECOND_NS
        suspect_ns = now_ns + self._knobs.suspect_after_ms * MILLISECOND_NS
        self._sent[correlation] = Sent(
            lane, columns, numbers, now_ns, give_up_ns, suspect_ns, route.epoch, node, again=again
        )
        lane.in_flight += 1
        lane.operations_in_flight += len(columns)
        lane.late_ns = now_ns + max(LATE_NS_MIN, 2 * lane.usual_ns)
        self._primaries.on_sent(node)
        if self._primaries.is_silent(node):
            self._lanes[lane.id] = self._lanes.pop(lane.id)

    def _request(self, subject: str, body: bytes) -> int:
        self._correlation += 1
        self._effects.append(Request(self._correlation, subject, body))
        return self._correlation

    # ---- outcomes ----

    def _on_reply(self, sent: Sent, body: bytes | None, now_ns: int) -> None:
        self._leave(sent)
        if body is None:
            if not sent.lane.anywhere:
                self._suspect(sent.lane.shard, "no responders", now_ns)
            failure = ShardUnavailable(f"nobody serves shard {sent.lane.shard}")
            return self._all_again(sent, failure, now_ns)
        sent.lane.usual_ns += (now_ns - sent.sent_ns - sent.lane.usual_ns) // 8
        fields = decode_cbor(body)
        if "batch" not in fields:
            return self._all_again(sent, from_body(fields), now_ns)
        assert self.routes is not None
        if fields.get("map_version", 0) > self.routes.map_version:
            self.fetch_routes(now_ns)
        if self._primaries.on_answer(sent.node, now_ns):
            self._look_at_all()
        reply = decode_batch_reply(fields["batch"])
        if reply.failures or b.UNANSWERED in reply.outcomes:
            return self._on_mixed_reply(sent, reply, now_ns)
        return self._tell(sent.columns.tokens, self._results(sent, reply))

    def _leave(self, sent: Sent) -> None:
        sent.lane.in_flight -= 1
        sent.lane.operations_in_flight -= len(sent.columns)
        self._primaries.on_left(sent.node)
        if self._primaries.is_silent(sent.node):
            if self._primaries.lets_through(sent.node):
                self._look_at_all()  # the next trial
        elif sent.lane.has_work:
            self.dirty[sent.lane] = None

    def _look_at_all(self) -> None:
        """Lanes that were held up may send now, the one that was tried last after the others."""
        self.dirty |= dict.fromkeys(lane for lane in self._lanes.values() if lane.has_work)

    def _on_mixed_reply(self, sent: Sent, reply: BatchReply, now_ns: int) -> None:
        """Some operations have their result; the others failed, or found the reply full."""
        results, settled = self._results(sent, reply), []
        for i, operation in enumerate(sent.operations()):
            if i in reply.failures:
                self._again(operation, from_body(reply.failures[i]), now_ns)
            elif reply.outcomes[i] == b.UNANSWERED:
                self._route(operation, now_ns)
            else:
                settled.append(i)
        self._tell([sent.columns.tokens[i] for i in settled], [results[i] for i in settled])

    def _tell(self, tokens: list[Any], outcomes: list[Any]) -> None:
        self._pending -= len(tokens)
        self._told += len(tokens)
        self._done(tokens, outcomes)

    def _on_delay(self, correlation: int, now_ns: int) -> None:
        """No answer yet: when another epoch has begun meanwhile, none may come."""
        assert self.routes is not None
        sent = self._sent[correlation]
        lane, route = sent.lane, self.routes.by_id.get(sent.lane.shard)
        if sent.give_up_ns <= now_ns or route is None or route.epoch != sent.epoch:
            del self._sent[correlation]
            return self._on_silence(sent, now_ns)
        patience_ns = self._knobs.suspect_after_ms * MILLISECOND_NS
        answered_ns = self._primaries.answered_ns(sent.node)
        if now_ns - answered_ns < patience_ns:
            sent.suspect_ns = answered_ns + patience_ns  # busy with others: not silent
            return None
        sent.suspected = True
        if lane.consistency != "all":  # else it may be another member that is waited for
            self._primaries.on_silence(sent.node)
            # Sent again soon: it may have come to a frozen node alone, before the next primary listened.
            sent.give_up_ns = min(sent.give_up_ns, now_ns + patience_ns)
        reason = f"no answer for {self._knobs.suspect_after_ms} ms"
        return self._suspect(lane.shard, reason, now_ns)

    def _suspect(self, shard: str, reason: str, now_ns: int) -> None:
        """Say on the bus that a shard's primary does not answer. A hint: it affects speed, never safety."""
        route = self.routes.by_id.get(shard) if self.routes else None
        if route is None or now_ns < self._said_ns.get(route.primary, 0):
            return
        pause_ns = self._knobs.suspect_after_ms * MILLISECOND_NS
        self._said_ns[route.primary] = now_ns + pause_ns
        said = {"node": route.primary, "shard": shard, "by": self.client, "reason": reason}
        subject = self._subjects.suspect_event(route.primary)
        self._effects.append(Publish(subject, encode_json(said)))

    def _on_silence(self, sent: Sent, now_ns: int) -> None:
        self._leave(sent)
        for operation in sent.operations():
            operation.abandon()
        failure = ShardUnavailable(f"shard {sent.lane.shard} does not answer")
        self._all_again(sent, failure, now_ns)

    def _all_again(self, sent: Sent, failure: BusKVError, now_ns: int) -> None:
        for operation in sent.operations():
            if sent.lane.anywhere and failure.refreshes_map:
                operation.at_primary = True
                self._route(operation, now_ns)
            else:
                self._again(operation, failure, now_ns)

    def _again(self, operation: Operation, failure: BusKVError, now_ns: int) -> None:
        """Send an operation again after a pause if its failure allows and its time is not over."""
        operation.attempts += 1
        operation.at_primary = False
        operation.note(failure)
        at_ns = now_ns + pause_ns(operation.attempts, self._knobs)
        if not failure.retriable or at_ns >= operation.deadline_ns:
            return self._finish(operation.token, operation.verdict(failure))
        if failure.refreshes_map and now_ns - self._routes_ns >= ROUTES_NEW_NS:
            self.fetch_routes(now_ns)
        heapq.heappush(self._paused, (at_ns, self._next_order(), operation))
        return None

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _next_order(self) -> int:
        self._correlation += 1
        return self._correlation

    def _all_waiting(self, lane: Lane) -> list[Operation]:
        """Take everything out of a lane, in order."""
        waiting, lane.waiting = lane.waiting, Columns()
        first = self._number + 1
        self._number += len(waiting)
        again, lane.again = lane.again, []
        return again + operations_of(waiting, range(first, first + len(waiting)), lane)

    def _drop_late(self, operations: list[Operation], now_ns: int) -> list[Operation]:
        """End those whose time is over before they could be sent; the others."""
        for operation in operations:
            if operation.deadline_ns <= now_ns:
                failure = ShardUnavailable("the cluster does not answer; is it running?")
                self._finish(operation.token, operation.verdict(failure))
        return [o for o in operations if o.deadline_ns > now_ns]

    def _finish(self, token: Any, outcome: Outcome) -> None:
        self._pending -= 1
        self._done((token,), (outcome,))

    # ---- the map ----

    def _on_routes(self, body: bytes | None, now_ns: int) -> None:
        self._fetch = None
        fields = None if body is None else decode_cbor(body)
        if fields is None or "code" in fields:
            self._fetch_cached = fields is not None
            self._fetch = -1
            self._fetch_ns = now_ns + self._knobs.client_pause_ms_max * MILLISECOND_NS // 2
            return
        routes = routes_from_public(fields)
        # The next time a node's own copy may do, unless that is what has brought nothing new.
        self._fetch_cached = self.routes is None or routes.map_version > self.routes.map_version
        if self.routes is None or routes.map_version >= self.routes.map_version:
            self._take_routes(routes, now_ns)
        waiting, self._unrouted = self._unrouted, []
        for operation in waiting:
            self._route(operation, now_ns)

    def _on_change(self, body: bytes, now_ns: int) -> None:
        """The map has changed: follow it, or read it when earlier changes were missed."""
        if self.routes is None:
            return
        try:
            change = decode_body(body)[1]
            if change["map_version"] <= self.routes.map_version:
                return
            routes = routes_after(self.routes, change)
        except (BusKVError, KeyError, TypeError, ValueError, AttributeError):
            routes = None
        if routes is None:
            self.fetch_routes(now_ns)
        else:
            self._take_routes(routes, now_ns)

    def _take_routes(self, routes: Routes, now_ns: int) -> None:
        """What waits, and what nobody answers, is soon routed again."""
        is_new = self.routes is None or routes.map_version > self.routes.map_version
        self.routes, self._routes_ns = routes, now_ns
        self._near.clear()
        if not is_new:
            return
        self._look_at_all()
        for correlation, sent in [*self._sent.items()]:
            if sent.suspected:
                route = routes.by_id.get(sent.lane.shard)
                if route is None or route.epoch != sent.epoch:
                    del self._sent[correlation]
                    self._on_silence(sent, now_ns)
        # Not in this very moment: a primary that serves from now on hears of it no sooner.
        soon_ns = now_ns + SETTLE_NS
        self._paused = [(min(at_ns, soon_ns), order, o) for at_ns, order, o in self._paused]
        heapq.heapify(self._paused)
        for _, _, operation in self._paused:
            operation.attempts = 0

    def _results(self, sent: Sent, reply: BatchReply) -> list[Any]:
        """An Entry or a Receipt for every operation, made column by column."""
        lane, columns, versions = sent.lane, sent.columns, reply.versions()
        if not lane.reads:
            found = map(bool, reply.outcomes.translate(_IS_FOUND))
            level, fates = repeat(lane.consistency), repeat(self.fates)
            return [*map(Receipt, repeat(lane.shard), versions, found, level, fates)]
        values = reply.values or [None] * len(columns)
        if not reply.expires_at and reply.read is None:
            return [*map(Entry, columns.keys, values, versions)]
        lifetimes = map(reply.expires_at.get, range(len(columns)))
        read = None if reply.read is None else ReadState(*reply.read)
        return [*map(Entry, columns.keys, values, versions, lifetimes, repeat(read))]


def _too_many() -> Overloaded:
    return Overloaded("this client has too many calls under way; await some of them first")
