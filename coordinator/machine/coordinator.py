"""The coordinator: keeps the shard map, and drives reconfigurations (authority: the map decides, replicas enforce).

Everything it does follows from comparing the map with what it has heard (`plan.next_map`): one compare-and-set is under
way at a time, its outcome known before anything follows from it. An answer that does not come proves nothing: the map
is read again, and `writer` tells whether it was the own change.
"""

from __future__ import annotations

import contextlib
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
from bus_kv.core.timers import NEVER_NS, Timers
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
from bus_kv.protocol.messages import PROBE, failure_headers, heartbeat_from_wire
from bus_kv.protocol.shard_map import (
    NodeState,
    ShardMap,
    ShardState,
    delta,
    from_document,
    settings_of,
    shard_from_document,
    shard_to_document,
    to_document,
)  # fmt: skip
from coordinator.machine.admin import Admin
from coordinator.machine.attempt import Attempt, refused_with
from coordinator.machine.detector import Detector
from coordinator.machine.failovers import Failovers
from coordinator.machine.lease import Lease
from coordinator.machine.plan import Heard, next_map
from coordinator.machine.roles import whom_to_ask

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bus_kv.core.machine import Effect, Event
    from bus_kv.protocol.messages import Heartbeat
    from bus_kv.protocol.shard_map import Member, Shard
    from bus_kv.subjects import Subjects

MAP_KEY = "map"
SEALS_MAX = 64
"""In one message: each holds a shard's record, with a range of up to two keys."""
NOT_UNDERSTOOD = (KeyError, TypeError, ValueError, AttributeError)
ANSWERS_MAX = 10_000
"""Questions that are remembered until they are answered; some never are."""


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
        self._looked_for = 0
        """The newest version for which the map was read again because a node has seen it."""
        self._read_ns = 0
        """When the store last said what it holds."""
        self._has_news = True
        """Something has come that the map may have to follow: what is told of takeovers, hundreds at a time, is not."""
        self._detector = Detector(knobs, settings_of(ShardMap(), knobs))
        self._heard = Heard(
            silent=self._detector.down, unproven=self._detector.unproven,
            held=self._detector.held, heard_ns=self._detector.heard_ns,
            fell_ns=self._detector.fell_ns,
        )  # fmt: skip
        self._failovers = Failovers(config.id)
        self._attempts: dict[str, Attempt] = {}
        self._store_pending = 0
        self._wanted: ShardMap | None = None
        """The map of the compare-and-set that is under way or of unknown outcome."""
        self._document: dict[str, Any] | None = None
        """The document of it."""
        self._first_node_ns: int | None = None
        self._answers: dict[int, Callable[[bytes | None], None]] = {}
        self._admin = Admin(self._heard, self._failovers, knobs)
        self._effects: list[Effect] = []
        self._timers = Timers()
        self._correlation = 0
        self.lease = Lease(config.id, config.token(), knobs.lease_s, self._next_correlation)

    def start(self, now_ns: int) -> None:
        self.now_ns = now_ns
        self._effects += self.lease.start(now_ns)
        self._timers.start("look", now_ns + SECOND_NS)

    def reconnected(self, now_ns: int) -> None:
        """The bus was away: who was not heard meanwhile is not to blame."""
        self.now_ns = now_ns
        self._detector.was_away(now_ns)

    def leave(self, now_ns: int) -> None:
        """Give the lease away before the process ends."""
        self.now_ns = now_ns
        self._effects += self.lease.release()

    # ---- the machine ----

    def step(self, event: Event, now_ns: int) -> None:
        self.now_ns = now_ns
        if isinstance(event, Received) and event.channel == "failover":
            return self._on_failover(event)
        self._has_news = True
        match event:
            case Received(channel="heartbeat"):
                self._on_heartbeat(event)
            case Received(channel="admin"):
                self._on_admin(event)
            case Received(channel="suspect"):
                self._on_suspicion(event)
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
        return None

    def on_deadline(self, now_ns: int) -> None:
        self.now_ns, self._has_news = now_ns, True
        self._effects += self.lease.on_deadline(now_ns)
        for name in self._timers.pop_due(now_ns):
            if name == "look":
                self._look()
            elif name == "store":
                self._read_map()
            elif name == "attempts":
                self._drive_late()
            elif name == "ask":
                self._ask_around()
        self._detector.on_deadline(now_ns)

    def next_deadline_ns(self) -> int:
        return min(
            self._timers.next_ns, self.lease.next_deadline_ns(), self._admin.next_ns(),
            self._detector.next_deadline_ns(),
        )  # fmt: skip

    def settle(self, now_ns: int) -> bool:
        del now_ns
        return False

    is_full, is_settled = False, True

    @property
    def has_orders(self) -> bool:
        """Whether an operator waits for something to come into effect."""
        return self._admin.next_ns() < NEVER_NS

    def take_ready(self, now_ns: int) -> Ready:
        self.now_ns = now_ns
        self._tell_suspicions()
        for node in self._detector.take_probes():
            self._ask_for_beat(node)
        if self._has_news:
            self._has_news = False
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
        self._take_beat(beat)

    def _take_beat(self, beat: Heartbeat, asked: bool = False) -> None:
        newest = self._heard.beats.get(beat.node)
        if newest is not None and beat.run < newest.run:
            return
        self._heard.beats[beat.node] = beat
        self._detector.on_heartbeat(beat, self.now_ns, asked)
        if not beat.leaving:
            self._first_node_ns = self._first_node_ns or self.now_ns
        if self.lease.active:
            self._announce_again(beat)
            if self.map is not None and beat.map_version > max(
                self.map.map_version, self._looked_for
            ):
                # Once: a store that has forgotten this version does not find it again by being asked.
                self._map_is_old, self._looked_for = True, beat.map_version

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
        """Once a second: is the wait for a first layout over, is anybody to be asked, is the map to be read again.

        With heartbeats that are closer, as often as they come. The map is read because a compare-and-set of a former
        leader may succeed so late that nobody announces it.
        """
        interval_ns = int(self._detector.settings.heartbeat_interval_s * SECOND_NS)
        self._timers.start("look", self.now_ns + min(SECOND_NS, interval_ns))
        self._timers.start_once("ask", self.now_ns)
        wait_ns = int(self.knobs.layout_wait_s * SECOND_NS)
        first_ns = self._first_node_ns
        self._heard.layout_due = first_ns is not None and self.now_ns - first_ns >= wait_ns
        self._map_is_old |= self.now_ns - self._read_ns >= interval_ns

    # ---- who is there ----

    def _on_suspicion(self, message: Received) -> None:
        """Somebody has no answer of a node. Every coordinator probes it, so that the next one knows as well."""
        try:
            fields = decode_body(message.body)[1]
            by, reason = str(fields["by"])[:100], str(fields["reason"])[:200]
        except (BusKVError, KeyError):
            return
        self._detector.on_suspicion(message.name, by, reason, self.now_ns)

    def _ask_for_beat(self, node: str) -> None:
        correlation = self._next_correlation()
        self._answers[correlation] = partial(self._on_asked, node)
        subject = self.config.subjects.node_inbox(node)
        self._effects.append(Request(correlation, subject, PROBE))

    def _on_asked(self, node: str, body: bytes | None) -> None:
        if body is None:
            self._detector.on_suspicion(node, self.config.id, "no responders", self.now_ns)
            return self._detector.on_no_responders(node, self.now_ns)
        try:
            beat = heartbeat_from_wire(decode_cbor(body))
        except BusKVError:
            return None
        return self._take_beat(beat, asked=True) if beat.node == node else None

    def _ask_around(self) -> None:
        """Have those tell how they are whose next heartbeat somebody waits for."""
        nodes = whom_to_ask(self.map, self._heard) if self.map else set()
        for node in sorted(nodes):
            self._ask_for_beat(node)
        if nodes:
            self._timers.start("ask", self.now_ns + self.knobs.step_retry_ms * MILLISECOND_NS)

    def _tell_suspicions(self) -> None:
        """Shards whose primary is suspected, or is so no longer."""
        for suspicion, is_right in self._detector.take_news():
            for shard in self.map.shards.values() if self.map else ():
                if shard.primary == suspicion.node and shard.state is ShardState.ACTIVE:
                    self._tell(self._failovers.detecting(shard, suspicion, is_right))

    # ---- stories ----

    def _on_failover(self, message: Received) -> None:
        with contextlib.suppress(BusKVError):
            self._failovers.on_event(message.name, decode_body(message.body)[1])

    def _tell(self, story: dict[str, Any]) -> None:
        """On the bus, where this coordinator hears it, too; it is known at once because the next step follows it."""
        self._failovers.on_event(story["shard"], story)
        subject = self.config.subjects.failover_event(story["shard"])
        self._effects.append(Publish(subject, encode_json(story)))

    def _tell_begun(self, old: Shard, new: Shard) -> None:
        """A takeover has begun, if that is why there is a new epoch."""
        member = old.member(old.primary)
        report = self._heard.report(old.id, member) if member else None
        outage = self._detector.outages.get(old.primary)
        if old.id in self._heard.failovers:
            cause, outage = "an operator has asked for it", None
        elif old.primary in self._detector.down and outage is not None:
            cause = outage.cause
        elif member is None or not self._heard.hears(member):
            cause, outage = "it is not there with this disk", None
        elif report is not None and report.status == "restarted":
            cause = "it has restarted"
        elif self._failovers.is_recovering(old.id):
            cause, outage = "the attempt before has come to nothing", None
        else:
            return
        story = self._failovers.recovering(old, new, outage, cause, self._heard, self.now_ns)
        if story is not None:
            self._tell(story)

    def _tell_completed(self, map: ShardMap, attempts: dict[str, Attempt]) -> None:
        for story, shard in self._failovers.unfinished(map.shards):
            attempt = attempts.get(shard.id)
            if attempt is not None and attempt.id != (shard.epoch, shard.token):
                attempt = None
            self._tell(self._failovers.completed(story, shard, attempt, self.now_ns))

    # ---- administration ----

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
            self._ask(node, {"type": "remembered"}, self._on_remembered)

    def _on_remembered(self, fields: dict[str, Any]) -> None:
        map = from_document(fields["map"])
        records = [shard_from_document(record) for record in fields["records"]]
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
        self._heard.changing = sum(
            [self.now_ns - a.started_ns < SECOND_NS for a in self._attempts.values()]
        )
        self._heard.opened = {id: a.id for id, a in self._attempts.items() if a.opened}
        wanted = next_map(self.map, self._heard, self.knobs, self.config.token)
        if wanted is not self.map:
            self._wanted, self._document = wanted, to_document(wanted)
            self._ask_store(
                StoreCas(self._next_correlation(), MAP_KEY, self._revision, self._document)
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
        if self._wanted is not None and stored.document is self._document:
            return self._take_map(self._wanted)
        self._take_map(from_document(stored.document) if stored.document else ShardMap())

    def _take_map(self, map: ShardMap) -> None:
        """The store holds this map: drop attempts that it does not bear out, begin those that it proves to be ours."""
        old, wanted, self._wanted = self.map, self._wanted, None
        self.map = map
        self._follow_settings(map)
        if old is None or old.map_version != map.map_version:
            self._timers.start("ask", self.now_ns)
        self._note_beginnings(old or ShardMap(), map)
        self._tell_completed(map, self._attempts)
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
        begun: list[Attempt] = []
        for id, shard in map.shards.items():
            if shard.state is ShardState.RECOVERING and old.shards.get(id) != shard:
                if id in old.shards:
                    self._tell_begun(old.shards[id], shard)
                self._attempts[id] = Attempt(shard, self.now_ns, self.now_ns)
                begun.append(self._attempts[id])
                self._heard.failovers.discard(id)
                self._heard.transfers.pop(id, None)
        self._drive(*begun)

    def _note_beginnings(self, old: ShardMap, new: ShardMap) -> None:
        """Nodes and epochs that are new to this coordinator."""
        for id in new.nodes:
            if id not in old.nodes:
                self._detector.expect(id, self.now_ns)
        for id, shard in new.shards.items():
            if id not in old.shards or old.shards[id].epoch != shard.epoch:
                self._heard.since_ns[id] = self.now_ns
                for member in (*shard.members, *shard.learners):
                    self._detector.expect(member.node, self.now_ns)

    def _follow_settings(self, map: ShardMap) -> None:
        self._detector.settings = settings_of(map, self.knobs)
        self._heard.auto_failover = self._detector.settings.auto_failover
        if map.settings == self._heard.cluster_settings:
            self._heard.cluster_settings = None

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

    def _drive(self, *attempts: Attempt) -> None:
        """Say what is still to be said; what stays unanswered is said again."""
        retry_ns = self.now_ns + self.knobs.step_retry_ms * MILLISECOND_NS
        seals: dict[str, list[tuple[Attempt, Member, dict[str, Any]]]] = {}
        for attempt in attempts:
            for member, fields in attempt.messages():
                if fields["type"] == "seal":
                    seals.setdefault(member.node, []).append((attempt, member, fields))
                else:
                    self._ask(member.node, fields, partial(self._on_answer, attempt, member))
            attempt.retry_ns = retry_ns
        for node, asked in seals.items():
            for first in range(0, len(asked), SEALS_MAX):
                self._seal(node, asked[first : first + SEALS_MAX])
        self._timers.start_once("attempts", retry_ns)

    def _seal(self, node: str, asked: Sequence[tuple[Attempt, Member, dict[str, Any]]]) -> None:
        """Ask a node to promise, for all these attempts at once."""

        def on_answers(answer: dict[str, Any]) -> None:
            answers = [answer] if len(asked) == 1 else answer["items"]
            for (attempt, member, _), fields in zip(asked, answers, strict=True):
                if fields:
                    self._on_answer(attempt, member, fields)

        seals = [fields for _, _, fields in asked]
        message = seals[0] if len(seals) == 1 else {"type": "seals", "items": seals}
        self._ask(node, message, on_answers)

    def _ask(
        self, node: str, fields: dict[str, Any], then: Callable[[dict[str, Any]], None]
    ) -> None:
        """Ask a node; what does not come or is not understood is as good as lost."""

        def on_answer(body: bytes | None) -> None:
            with contextlib.suppress(BusKVError, *NOT_UNDERSTOOD):
                if body is not None:
                    then(decode_cbor(body))

        correlation = self._next_correlation()
        self._answers[correlation] = on_answer
        subject = self.config.subjects.node_inbox(node)
        self._effects.append(Request(correlation, subject, encode_cbor(fields)))
        while len(self._answers) > ANSWERS_MAX:
            del self._answers[next(iter(self._answers))]

    def _drive_late(self) -> None:
        """Those who have not been answered for a while."""
        unfinished = [attempt for attempt in self._attempts.values() if not attempt.opened]
        self._drive(*(a for a in unfinished if a.retry_ns <= self.now_ns))
        if unfinished:
            self._timers.start("attempts", min(a.retry_ns for a in unfinished))

    def _on_answer(self, attempt: Attempt, member: Member, fields: dict[str, Any]) -> None:
        if self._attempts.get(attempt.shard.id) is not attempt:
            return
        sealed_before, opened_before = attempt.is_sealed, attempt.opened
        attempt.on_answer(member, fields)
        promised_epoch = refused_with(fields)
        if attempt.is_sealed and not sealed_before:
            attempt.sealed_ns = self.now_ns
        if attempt.opened and not opened_before:
            attempt.opened_ns = self.now_ns
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
            self._drive(attempt)

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
