"""The coordinator: keeps the shard map, and drives reconfigurations (authority: the map decides, replicas enforce).

Everything it does follows from comparing the map with what it has heard (`plan.next_map`): one compare-and-set is under
way at a time, its outcome known before anything follows from it. An answer that does not come proves nothing: the map
is read again, and `writer` tells whether it was the own change.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bus_kv.core.machine import (
    AppendCompleted,
    AppendStalled,
    Publish,
    Ready,
    Received,
    Request,
    Responded,
    StoreCas,
    Stored,
    StoreGet,
)  # fmt: skip
from bus_kv.core.timers import Timers
from bus_kv.errors import BusKVError
from bus_kv.knobs import MILLISECOND_NS, SECOND_NS, Knobs
from bus_kv.protocol.codec import (
    codec_of,
    decode_body,
    decode_cbor,
    encode_body,
    encode_cbor,
    encode_json,
)  # fmt: skip
from bus_kv.protocol.messages import failure_headers, heartbeat_from_wire
from bus_kv.protocol.shard_map import (
    NodeState,
    ShardMap,
    ShardState,
    delta,
    from_document,
    shard_from_document,
    shard_to_document,
    to_document,
)  # fmt: skip
from coordinator.machine.admin import Admin
from coordinator.machine.attempt import Attempt, refused_with
from coordinator.machine.lease import Lease
from coordinator.machine.plan import Heard, next_map

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.core.machine import Effect, Event
    from bus_kv.protocol.messages import Heartbeat
    from bus_kv.protocol.shard_map import Member, Shard
    from bus_kv.subjects import Subjects

MAP_KEY = "map"


@dataclass(frozen=True, slots=True)
class CoordinatorConfig:
    id: str
    subjects: Subjects
    token: Callable[[], str]
    """A fresh random token at each call."""


class CoordinatorMachine:
    def __init__(self, config: CoordinatorConfig, knobs: Knobs) -> None:
        self.config = config
        self.knobs = knobs
        self.map: ShardMap | None = None
        """The map as last read from or written to the store; None until it has been read."""
        self.now_ns = 0
        self.requests = 0
        self._revision = 0
        self._map_is_old = False
        """A node has seen a newer one, or it is some time ago that it was read."""
        self._read_ns = 0
        """When the store last said what it holds."""
        self._heard = Heard()
        self._seen_ns: dict[str, int] = {}
        """When each node was heard last, or since when it is waited for."""
        self._attempts: dict[str, Attempt] = {}
        self._store_pending = 0
        self._wanted: ShardMap | None = None
        """The map of the compare-and-set that is under way or of unknown outcome."""
        self._first_node_ns: int | None = None
        self._answers: dict[int, Callable[[bytes | None], None]] = {}
        self._admin = Admin(self._heard)
        self._effects: list[Effect] = []
        self._timers = Timers()
        self._correlation = 0
        self.lease = Lease(config.id, config.token(), knobs.lease_s, self._next_correlation)

    def start(self, now_ns: int) -> None:
        self.now_ns = now_ns
        self._effects += self.lease.start(now_ns)
        self._timers.start("look", now_ns + SECOND_NS)

    def leave(self, now_ns: int) -> None:
        """Give the lease away before the process ends."""
        self.now_ns = now_ns
        self._effects += self.lease.release()

    # ---- the machine ----

    def step(self, event: Event, now_ns: int) -> None:
        self.now_ns = now_ns
        match event:
            case Received(channel="heartbeat"):
                self._on_heartbeat(event)
            case Received(channel="admin"):
                self._on_admin(event)
            case Received(channel=channel):
                raise AssertionError(f"no such channel: {channel}")
            case Responded(correlation, body):
                answer = self._answers.pop(correlation, None)
                if answer is not None:
                    answer(body)
            case Stored():
                self._on_stored(event)
            case AppendCompleted() | AppendStalled():
                raise AssertionError("a coordinator has no log")

    def on_deadline(self, now_ns: int) -> None:
        self.now_ns = now_ns
        self._effects += self.lease.on_deadline(now_ns)
        for name in self._timers.pop_due(now_ns):
            if name == "look":
                self._look()
            elif name == "store":
                self._read_map()
            elif name == "attempts":
                self._drive_attempts()

    def next_deadline_ns(self) -> int | None:
        candidates = [self._timers.next_ns(), self.lease.next_deadline_ns(), self._admin.next_ns()]
        return min((c for c in candidates if c is not None), default=None)

    is_full = False

    @property
    def has_orders(self) -> bool:
        """Whether an operator waits for something to come into effect."""
        return self._admin.next_ns() is not None

    def take_ready(self, now_ns: int) -> Ready:
        self.now_ns = now_ns
        self._reconcile()
        self._admin.look(self.map, now_ns)
        effects, self._effects = self._effects, []
        return Ready(effects)

    def _next_correlation(self) -> int:
        self._correlation += 1
        return self._correlation

    # ---- hearing ----

    def _on_heartbeat(self, message: Received) -> None:
        try:
            beat = heartbeat_from_wire(decode_body(message.body)[1])
        except BusKVError:
            return
        newest = self._heard.beats.get(beat.node)
        if newest is not None and beat.run < newest.run:
            return
        self._heard.beats[beat.node] = beat
        self._seen_ns[beat.node] = self.now_ns
        if beat.leaving:
            self._heard.silent.add(beat.node)
        else:
            self._heard.silent.discard(beat.node)
            self._first_node_ns = self._first_node_ns or self.now_ns
        if self.lease.active:
            self._announce_again(beat)
            if self.map is not None and beat.map_version > self.map.map_version:
                self._map_is_old = True

    def _announce_again(self, beat: Heartbeat) -> None:
        """A primary that has opened and does not know that its record is ACTIVE is told once more."""
        for shard in self.map.shards.values() if self.map else ():
            member = shard.member(beat.node)
            report = self._heard.report(shard.id, member) if member else None
            if (
                shard.primary == beat.node
                and shard.state is ShardState.ACTIVE
                and report is not None
                and report.status == "opened"
                and (report.epoch, report.token) == (shard.epoch, shard.token)
            ):
                body = encode_cbor({"type": "active", "record": shard_to_document(shard)})
                subject = self.config.subjects.node_inbox(shard.primary)
                self._effects.append(Publish(subject, body))

    def _look(self) -> None:
        """Once a second: who is silent, is the wait for a first layout over, is the map to be read again.

        A compare-and-set of a former leader may succeed so late that nobody announces it.
        """
        self._timers.start("look", self.now_ns + SECOND_NS)
        patience_ns = int(
            self.knobs.heartbeat_interval_s * self.knobs.heartbeat_misses_max * SECOND_NS
        )
        for id in self.map.nodes if self.map else ():
            if self.now_ns - self._seen_ns.setdefault(id, self.now_ns) > patience_ns:
                self._heard.silent.add(id)
        wait_ns = int(self.knobs.layout_wait_s * SECOND_NS)
        first_ns = self._first_node_ns
        self._heard.layout_due = first_ns is not None and self.now_ns - first_ns >= wait_ns
        interval_ns = int(self.knobs.heartbeat_interval_s * SECOND_NS)
        self._map_is_old |= self.now_ns - self._read_ns >= interval_ns

    def _on_admin(self, message: Received) -> None:
        """Administration; a standby leaves it to the active coordinator."""
        if not self.lease.active or not message.reply:
            return
        self.requests += 1
        codec, reply = codec_of(message.body), message.reply

        def answer(result: dict[str, Any] | BusKVError) -> None:
            headers = None
            if isinstance(result, BusKVError):
                headers, result = failure_headers(result), result.to_body()
            self._effects.append(Publish(reply, encode_body(codec, result), headers))

        self._admin.on_request(message.name, message.body, self.map, self.now_ns, answer)
        if self._heard.restoring:
            self._ask_for_maps()

    def _ask_for_maps(self) -> None:
        """Have every node tell the newest map that it remembers (R10)."""
        for node in sorted(self._heard.beats):
            correlation = self._next_correlation()
            self._answers[correlation] = self._on_remembered
            subject = self.config.subjects.node_inbox(node)
            body = encode_cbor({"type": "remembered"})
            self._effects.append(Request(correlation, subject, body))

    def _on_remembered(self, body: bytes | None) -> None:
        try:
            fields = decode_cbor(body or b"")
            map = from_document(fields["map"])
            records = [shard_from_document(record) for record in fields["records"]]
        except (BusKVError, KeyError, TypeError, ValueError, AttributeError):
            return
        for record in records:
            known = self._heard.records.get(record.id)
            if record.state is ShardState.ACTIVE and (not known or record.epoch > known.epoch):
                self._heard.records[record.id] = record
        newest = self._heard.newest
        if newest is None or map.map_version > newest.map_version:
            self._heard.newest = map

    # ---- the map ----

    def _reconcile(self) -> None:
        """Begin the next change of the map, if one is due and none is under way."""
        if not self.lease.active:
            self.map, self._wanted, self._attempts, self._store_pending = None, None, {}, 0
            self._timers.stop("store")
            return
        if self._store_pending:
            return
        if self.map is None or self._map_is_old:
            self._map_is_old = False
            return self._read_map()
        self._heard.running = {
            id: a.id for id, a in self._attempts.items()
            if self.now_ns - a.started_ns < a.patience_ns(self.knobs)
        }  # fmt: skip
        self._heard.opened = {id: a.id for id, a in self._attempts.items() if a.opened}
        wanted = next_map(self.map, self._heard, self.knobs, self.config.token)
        if wanted is not self.map:
            self._wanted = wanted
            self._ask_store(
                StoreCas(self._next_correlation(), MAP_KEY, self._revision, to_document(wanted))
            )
        return None

    def _read_map(self) -> None:
        self._ask_store(StoreGet(self._next_correlation(), MAP_KEY))

    def _ask_store(self, effect: StoreGet | StoreCas) -> None:
        self._store_pending = effect.correlation
        self._effects.append(effect)
        timeout_ns = self.knobs.store_timeout_ms * MILLISECOND_NS
        self._timers.start("store", self.now_ns + timeout_ns)

    def _on_stored(self, stored: Stored) -> None:
        if self.lease.owns(stored.correlation):
            self._effects += self.lease.on_stored(stored, self.now_ns)
            return
        if stored.correlation != self._store_pending:
            return
        if stored.failure is not None:
            # Conflict or no answer: only a read tells. A store that fails is asked again after a pause.
            pause_ns = (20 if stored.conflict else 200) * MILLISECOND_NS
            self._timers.start("store", self.now_ns + pause_ns)
            return
        self._store_pending = 0
        self._timers.stop("store")
        self._revision, self._read_ns = stored.revision, self.now_ns
        self._take_map(from_document(stored.document) if stored.document else ShardMap())

    def _take_map(self, map: ShardMap) -> None:
        """The store holds this map: drop attempts that it does not bear out, begin those that it proves to be ours."""
        old, wanted, self._wanted = self.map, self._wanted, None
        self.map = map
        self._attempts = {
            id: attempt
            for id, attempt in self._attempts.items()
            if id in map.shards
            and (map.shards[id].epoch, map.shards[id].token) == attempt.id
            and map.shards[id].state is ShardState.RECOVERING
        }
        self._heard.settings = {
            name: wanted for name, wanted in self._heard.settings.items()
            if map.keyspaces.get(name, wanted) != wanted
        }  # fmt: skip
        if wanted is None or wanted.writer != map.writer:
            if old is not None and old.map_version < map.map_version:
                self._announce(old, map)  # whoever has changed it may be gone
            return
        if self._heard.restoring and self._heard.newest is not None:
            self._heard.restoring, self._heard.newest = False, None
            self._heard.forgotten.clear()
            self._heard.records.clear()
        assert old is not None, "a change is made to a map that was read"
        self._announce(old, map)
        for id, shard in map.shards.items():
            if shard.state is ShardState.RECOVERING and old.shards.get(id) != shard:
                self._attempts[id] = Attempt(shard, self.now_ns, self.now_ns)
                self._heard.failovers.discard(id)
                self._heard.transfers.pop(id, None)
        self._drive_attempts()

    def _announce(self, old: ShardMap, new: ShardMap) -> None:
        body = encode_json(delta(old, new))
        self._effects.append(Publish(self.config.subjects.map_event, body))
        for id, node in sorted(new.nodes.items()):
            before = old.nodes.get(id)
            if before is None or before.state is not node.state:
                event = {"node": id, "state": str(node.state), "map_version": new.map_version}
                subject = self.config.subjects.node_event(id)
                self._effects.append(Publish(subject, encode_json(event)))

    # ---- attempts ----

    def _drive_attempts(self) -> None:
        """Say what is still to be said; what stays unanswered is said again."""
        retry_ns = self.now_ns + self.knobs.step_retry_ms * MILLISECOND_NS
        for attempt in self._attempts.values():
            for member, fields in attempt.messages():
                correlation = self._next_correlation()
                self._answers[correlation] = partial(self._on_answer, attempt, member)
                subject = self.config.subjects.node_inbox(member.node)
                self._effects.append(Request(correlation, subject, encode_cbor(fields)))
            attempt.retry_ns = retry_ns
        if any(not attempt.opened for attempt in self._attempts.values()):
            self._timers.start("attempts", retry_ns)
        while len(self._answers) > 10_000:
            del self._answers[next(iter(self._answers))]

    def _on_answer(self, attempt: Attempt, member: Member, body: bytes | None) -> None:
        if self._attempts.get(attempt.shard.id) is not attempt or body is None:
            return
        sealed_before = attempt.is_sealed
        try:
            fields = decode_cbor(body)
            attempt.on_answer(member, fields)
            promised_epoch = refused_with(fields)
        except (BusKVError, KeyError, TypeError, ValueError):
            return
        if attempt.opened:
            self._note_opened(attempt.shard)
        if "forgotten" in fields:
            self._heard.forgotten.add(attempt.shard.id)
        if promised_epoch >= attempt.shard.epoch:
            # Also the own epoch: a primary that restarted after opening it never resumes it (R7).
            self._heard.epoch_floor = max(self._heard.epoch_floor, promised_epoch)
            del self._attempts[attempt.shard.id]
        elif attempt.is_unreached:
            self._note_sealed(attempt)
            del self._attempts[attempt.shard.id]
        elif attempt.is_sealed and not sealed_before:
            self._drive_attempts()

    def _note_sealed(self, attempt: Attempt) -> None:
        """Whose log is the longest is known better now than from heartbeats: the next attempt is under that one."""
        for member, last in attempt.sealed.items():
            report = self._heard.report(attempt.shard.id, member)
            if report is not None:
                report.last = last

    def _note_opened(self, shard: Shard) -> None:
        """What the primary's last heartbeat told about the time before is over."""
        primary = shard.member(shard.primary)
        report = self._heard.report(shard.id, primary) if primary else None
        if report is not None:
            report.epoch, report.token, report.status = shard.epoch, shard.token, "opened"

    def unavailable(self) -> list[str]:
        """Shards that cannot serve because the only node that has them is down, for the operator."""
        shards = self.map.shards.values() if self.map else ()
        nodes = self.map.nodes if self.map else {}
        return [
            s.id for s in shards
            if s.primary in nodes and nodes[s.primary].state is NodeState.DOWN
        ]  # fmt: skip
