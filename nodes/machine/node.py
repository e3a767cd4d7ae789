"""A node: the replicas it holds, the gateway for clients, and its part in the control plane.

Life of a process: `starting` until it knows that no other process runs under its id, then `running`: heartbeats, the
shard map, requests. It changes roles only when told so by the map or by a coordinator's seal, open or announcement.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from bus_kv.core.endpoints import Endpoint
from bus_kv.core.machine import (
    Answered,
    Append,
    AppendCompleted,
    AppendStalled,
    Checkpointed,
    CutRow,
    EntryRow,
    FoldStalled,
    Halt,
    Publish,
    Ready,
    Received,
    ReplicaRow,
    Request,
    Responded,
    Stored,
    StoreGet,
    Subscribe,
)  # fmt: skip
from bus_kv.core.timers import Timers
from bus_kv.errors import BusKVError, ValueTooLarge
from bus_kv.knobs import MILLISECOND_NS, SECOND_NS, Knobs
from bus_kv.protocol.codec import (
    Codec,
    codec_of,
    decode_body,
    decode_cbor,
    encode_body,
    encode_cbor,
    encode_json,
)  # fmt: skip
from bus_kv.protocol.messages import (
    Heartbeat,
    Run,
    failure_headers,
    heartbeat_from_wire,
)  # fmt: skip
from bus_kv.protocol.requests import (
    VERBS,
    InfoRequest,
    SqlRequest,
    parse_request,
)
from bus_kv.protocol.shard_map import (
    Member,
    Shard,
    ShardMap,
    ShardState,
    apply_delta,
    changed_shards,
    document_change,
    from_document,
    settings_of,
    shard_from_document,
)  # fmt: skip
from bus_kv.protocol.sizes import Sizes
from nodes.machine import views
from nodes.machine.control import Control
from nodes.machine.door import Door
from nodes.machine.fit import encode_fitting
from nodes.machine.gateway import Gateway
from nodes.machine.links import Links
from nodes.machine.map_reader import MapReader
from nodes.machine.replica import Past, Ports, Replica
from nodes.machine.replicas import Replicas
from nodes.machine.reports import heartbeat_of
from nodes.machine.shard_requests import ShardRequests
from nodes.machine.snapshot import Snapshots
from nodes.machine.sql import SqlGateway
from nodes.machine.status import Status
from nodes.machine.suspicions import Suspicions
from nodes.machine.wipes import Wipes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from bus_kv.core.machine import Effect, Event, Fold, Load, LogRead, Mark, Query
    from bus_kv.subjects import Subjects
    from nodes.machine.links import Then

ENDPOINTS = (*VERBS, "shard")
BEAT_PAUSE_NS = 20 * MILLISECOND_NS
BEAT_REPLICA_NS = MILLISECOND_NS
"""A heartbeat tells of every replica, and so many read it: the more there are, the longer to the next one."""


@dataclass(frozen=True, slots=True)
class NodeConfig:
    id: str
    incarnation: str
    run: Run
    subjects: Subjects
    max_payload_bytes: int
    version: str = ""
    zone: str | None = None
    weight: int = 1


class NodeMachine:
    def __init__(self, config: NodeConfig, knobs: Knobs) -> None:
        self.config = config
        self.knobs = knobs
        self.map = ShardMap()
        self.now_ns = 0
        self.sizes = Sizes(config.max_payload_bytes)
        self.answer_within_ns = knobs.answer_within_ms * MILLISECOND_NS
        self.replicas = Replicas()
        self.peers: dict[str, tuple[int, Heartbeat]] = {}
        """Newest heartbeat of each node, and when it came."""
        self.endpoints: dict[str, Endpoint] = {}
        self.stalled = ""
        """Why the log cannot take more at the moment."""
        self.fold_stalled = ""
        """Why the state cannot take more at the moment."""
        self._gateway = Gateway(self, f"{config.run[1]}-g")
        self.door = Door(self)
        self.links = Links(self)
        self.suspicions = Suspicions(self)
        self.sql = SqlGateway(self)
        self.snapshots = Snapshots(self)
        self._wipes = Wipes(self)
        self._shard_requests = ShardRequests(self)
        self._control = Control(self)
        self.express = self._control.express
        self._map_reader = MapReader(self)
        self.is_running = False
        self._effects: list[Effect] = []
        self._after_rows: list[Callable[[], None]] = []
        """What to do when what is appended in this turn is durable."""
        self._appended: deque[tuple[int, list[Replica], list[Callable[[], None]]]] = deque()
        self._handed_map = self.map
        """As the log has it, or will."""
        self._ticket = 0
        self._asked: dict[int, Callable[[list[Any], str | None], None]] = {}
        """Who waits for the state's answer to which ticket."""
        self._correlation = 0
        self._timers = Timers()
        self._beaten_ns = 0
        self._hello: int | None = None

    # ---- start ----

    def restore(self, row: ReplicaRow, past: Past) -> Replica:
        """A replica that the disk remembers; its entries behind the mark follow by `Replica.replay`, before `start`."""
        replica = self.new_replica(shard_from_document(row.record), past)
        replica.restore(row)
        return replica

    def new_replica(self, shard: Shard, past: Past | None = None) -> Replica:
        ports = Ports(
            partial(self._ask_for, shard.id), lambda: self.now_ns, self.links.tell,
            partial(self._call_for, shard.id), self.snapshots.start,
            partial(self._announce, shard.id),
        )  # fmt: skip
        replica = Replica(
            shard, self.config.id, self.config.incarnation, self.knobs, self.sizes, past or Past(),
            ports,
        )  # fmt: skip
        self.replicas.put(replica)
        for held in self.replicas.values():
            held.table.cache_bytes_max = self.knobs.cache_bytes // len(self.replicas)
            held.folder.share_with(len(self.replicas))
        return replica

    def replace(
        self, old: Replica, mark: Mark, clients: Sequence[tuple[str, int]], base_seq: int
    ) -> Replica:
        """A replica whose log and memory are empty in the place of a learner's; its state on disk is as `mark` says."""
        old.fail_waiting("the replica is replaced")
        replica = self.new_replica(old.shard, Past(mark, clients))
        replica.succeed(old, base_seq)
        return replica

    def restore_map(self, document: dict[str, Any]) -> None:
        """The newest map that the disk remembers."""
        self.map = self._handed_map = from_document(document)

    def ask(
        self, query: Query | Fold | Load | LogRead, then: Callable[[list[Any], str | None], None]
    ) -> None:
        """Put a query to the state on disk; `then` gets its rows, or why there are none."""
        query.ticket = self._next_ticket()
        self._asked[query.ticket] = then
        self._effects.append(query)

    def _ask_for(
        self, shard: str, query: Any, then: Callable[[list[Any], str | None], None]
    ) -> None:
        """`ask` for a replica, which is looked at when the answer comes."""

        def on_answer(rows: list[Any], failure: str | None) -> None:
            self.replicas.touch(shard)
            then(rows, failure)

        self.ask(query, on_answer)

    def _call_for(self, shard: str, node: str, fields: dict[str, Any], then: Then) -> None:
        def on_answer(fields: dict[str, Any]) -> None:
            self.replicas.touch(shard)
            then(fields)

        self.links.call(node, fields, on_answer)

    def start(self, now_ns: int) -> None:
        """Ask whether another process runs under this id; go on when none has said so."""
        self.now_ns = now_ns
        subject = self.config.subjects.node_inbox(self.config.id)
        self._hello = self.next_correlation()
        body = encode_cbor({"type": "hello", "run": self.config.run})
        self._effects.append(Request(self._hello, subject, body))
        self._timers.start("hello", now_ns + self.knobs.hello_wait_ms * MILLISECOND_NS)

    def _run(self) -> None:
        self.is_running, self._hello = True, None
        self._effects.append(Subscribe("verb", "", True))
        for replica in self.replicas.values():
            self.replicas.touch(replica.shard.id)  # from now on they listen
        self._follow_all(self.map.shards.values())
        self.fetch_map()
        self.beat()
        self._timers.start("listen", self.now_ns + SECOND_NS)

    def leave(self, now_ns: int) -> None:
        """Tell the others that this process is about to end."""
        self.now_ns = now_ns
        for replica in self.replicas.values():
            self.replicas.touch(replica.shard.id)
            replica.fail_waiting("the node is shutting down")
        if self.is_running:
            self._publish_heartbeat(leaving=True)

    def reconnected(self, now_ns: int) -> None:
        """The bus was away: read the map again and say that this node is here."""
        self.now_ns = now_ns
        if self.is_running:
            self._map_reader.fetch_now()
            self.beat()

    @property
    def is_busy(self) -> bool:
        """Whether a client still waits for an answer that is on its way."""
        return (
            self._gateway.is_busy
            or self.sql.is_busy
            or self.door.is_busy
            or any(r.is_waiting for r in self.replicas.values())
        )

    # ---- the machine ----

    def step(self, event: Event, now_ns: int) -> None:
        self.now_ns = now_ns
        match event:
            case Received():
                self._on_message(event)
            case AppendCompleted(ticket):
                self.stalled = ""
                self._on_durable(ticket)
            case Responded(correlation, body):
                self._on_response(correlation, body)
            case Stored():
                self._on_stored(event)
            case AppendStalled(reason):
                self.stalled = reason
            case FoldStalled(reason):
                self.fold_stalled = reason
            case Checkpointed(lasts):
                self._on_checkpoint(lasts)
            case Answered(ticket, rows, failure):
                self._asked.pop(ticket)(rows, failure)

    def on_deadline(self, now_ns: int) -> None:
        self.now_ns = now_ns
        for name in self._timers.pop_due(now_ns):
            if name == "hello":
                self._run()
            elif name == "listen":
                self._effects += self.suspicions.listen()
                self._timers.start("listen", now_ns + SECOND_NS)
            elif name == "heartbeat":
                self._publish_heartbeat()
                interval_ns = int(self._heartbeat_interval_s * SECOND_NS)
                self._timers.start("heartbeat", now_ns + interval_ns)
        self._map_reader.on_deadline(now_ns)
        self._gateway.on_deadline(now_ns)
        self.sql.on_deadline(now_ns)
        self.snapshots.on_deadline(now_ns)
        self._wipes.on_deadline(now_ns)
        self.door.on_deadline(now_ns)
        self.replicas.on_deadline(now_ns)

    def next_deadline_ns(self) -> int:
        return min(
            self._timers.next_ns, self._gateway.next_deadline_ns(), self.sql.next_deadline_ns(),
            self.snapshots.next_deadline_ns(), self._wipes.next_deadline_ns(),
            self.door.next_deadline_ns(), self._map_reader.next_deadline_ns(),
            self.replicas.next_deadline_ns(),
        )  # fmt: skip

    def settle(self, now_ns: int) -> bool:
        self.now_ns = now_ns
        self.replicas.settle()
        return bool(self._effects)

    @property
    def is_settled(self) -> bool:
        return self.replicas.are_settled

    @property
    def is_full(self) -> bool:
        return self.door.operations >= self.knobs.turn_operations_max

    def take_ready(self, now_ns: int) -> Ready:
        self.now_ns = now_ns
        self.door.operations = 0
        entries: list[EntryRow | CutRow] = []
        rows: list[ReplicaRow] = []
        handed: list[Replica] = []
        for replica in self.replicas.take_touched():
            added, row = replica.take_rows()
            if added or row is not None:
                handed.append(replica)
                self._effects += self.links.tell_cuts(added)
                entries += added
                rows += [row] if row is not None else []
            trim = replica.end_turn()
            if trim is not None:
                self._effects.append(trim)
            self._effects += self.links.end_turn(replica)
            self.replicas.looked_at(replica)
        self.replicas.end_turn()
        append = None
        is_new_map = self.map is not self._handed_map
        if entries or rows or self._after_rows or is_new_map:
            map = document_change(self._handed_map, self.map) if is_new_map else None
            self._handed_map = self.map
            append = Append(self._next_ticket(), entries, rows, map)
            self._appended.append((append.ticket, handed, self._after_rows))
            self._after_rows = []
        self._effects += self.links.take_tells()
        effects, self._effects = self._effects, []
        return Ready(effects, append)

    def _on_durable(self, ticket: int) -> None:
        while self._appended and self._appended[0][0] <= ticket:
            _, handed, callbacks = self._appended.popleft()
            for replica in handed:
                self.replicas.glance(replica.shard.id)
                if replica.on_durable():
                    self.replicas.look_at(replica.shard.id)
            for callback in callbacks:
                callback()

    def _on_checkpoint(self, lasts: dict[str, int]) -> None:
        for shard, last in lasts.items():
            replica = self.replicas.get(shard)
            if replica is not None:
                replica.folder.checkpointed = last

    # ---- messages ----

    def _on_message(self, message: Received) -> None:
        match message.channel:
            case "shard" | "read":
                self._shard_requests.on_request(message)
            case "replicate":
                self._control.on_replicate(message)
            case "verb":
                self._on_verb(message)
            case "node":
                self._control.on_message(message)
            case "heartbeat":
                self._on_heartbeat(message)
            case "map":
                self._on_delta(message)
            case "suspect":
                self.suspicions.on_message(message)
            case channel:
                raise AssertionError(f"no such channel: {channel}")

    def answer(
        self, endpoint: str, message: Received, codec: Codec, result: dict[str, Any] | BusKVError,
        since_ns: int,
    ) -> None:  # fmt: skip
        """Answer a request in its codec, as much as fits into one message, and count it."""
        body = None
        if not isinstance(result, BusKVError):
            body = encode_fitting(codec, result, self.sizes.message)
            if body is None:
                hint = "ask in CBOR" if codec is Codec.JSON else "ask for less at once"
                result = ValueTooLarge(f"the reply is too big for one message; {hint}")
        if body is not None:
            self._count(endpoint, since_ns, None)
            return self.reply(message, body)
        assert isinstance(result, BusKVError)
        self._count(endpoint, since_ns, result)
        return self.reply(message, encode_body(codec, result.to_body()), failure_headers(result))

    def reply(self, message: Received, body: bytes, headers: dict[str, str] | None = None) -> None:
        if message.reply:
            self._effects.append(Publish(message.reply, body, headers))

    def _count(self, endpoint: str, since_ns: int, failure: BusKVError | None) -> None:
        counters = self.endpoints.setdefault(
            endpoint if endpoint in ENDPOINTS else "other", Endpoint()
        )
        text = None if failure is None else f"{failure.status}:{failure.code}"
        counters.record(self.now_ns - since_ns, text)

    def _on_verb(self, message: Received) -> None:
        verb, since_ns, codec = message.name, self.now_ns, codec_of(message.body)

        def answer(result: dict[str, Any] | BusKVError) -> None:
            self.answer(verb, message, codec, result, since_ns)

        try:
            codec, fields = decode_body(message.body)
            request = parse_request(verb, fields, self.sizes)
        except BusKVError as error:
            return answer(error)
        if isinstance(request, SqlRequest):
            return self.sql.start(request, answer)
        if not isinstance(request, InfoRequest):
            return self._gateway.start(request, self.now_ns, answer)
        if verb == "map" and not request.cached:
            return self._map_reader.read(answer)
        return answer(views.info(verb, self))

    # ---- the shard map ----

    def serving(self, shard: str) -> Replica | None:
        """The own replica of a shard when it is the active primary."""
        replica = self.replicas.get(shard)
        return replica if replica is not None and replica.status is Status.ACTIVE else None

    def reading(self, shard: str) -> Replica | None:
        """The own replica of a shard when it may answer at ONE: the primary's, or a member's that follows or has.

        Not a learner's, which may have nothing yet, nor what a former member still has.
        """
        replica = self.replicas.get(shard)
        return replica if replica is not None and self.may_read(replica) else None

    def may_read(self, replica: Replica) -> bool:
        if not replica.has_followed:
            return replica.status is Status.ACTIVE
        return replica.is_whole and replica.own in replica.shard.members

    def fetch_map(self) -> None:
        """Read the whole map from the store soon: a message shows that the own copy is old."""
        self._map_reader.fetch()

    def ask_store(self, correlation: int) -> None:
        self._effects.append(StoreGet(correlation, "map"))

    def _on_stored(self, stored: Stored) -> None:
        failure = stored.failure
        if stored.document is not None:
            try:
                self._adopt(from_document(stored.document))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                failure = f"the map in the store is not readable: {error!r}"
        self._map_reader.on_answer(stored.correlation, failure)

    def _on_delta(self, message: Received) -> None:
        try:
            map = apply_delta(self.map, decode_body(message.body)[1])
        except (BusKVError, KeyError, TypeError, ValueError, AttributeError):
            map = None
        if map is None:
            self.fetch_map()
        else:
            self._adopt(map)

    def _adopt(self, map: ShardMap) -> None:
        if map.map_version <= self.map.map_version:
            return
        interval_s = self._heartbeat_interval_s
        old, self.map = self.map, map
        if interval_s != self._heartbeat_interval_s:
            self.beat()
        if self.is_running:
            # What holds for all of them may have changed, or only some of them.
            is_same = (old.keyspaces, old.nodes.keys()) == (map.keyspaces, map.nodes.keys())
            self._follow_all(changed_shards(old, map) if is_same else map.shards.values())
        self._gateway.on_map(self.now_ns)

    def _follow_all(self, shards: Iterable[Shard]) -> None:
        for shard in shards:
            self.follow(shard)
            self._wipes.look(shard.id)

    def follow(self, shard: Shard) -> None:
        """Do what a record says: hold a replica, serve when it is the own attempt, stop when another one is active."""
        replica = self.replicas.get(shard.id)
        keyspace = self.map.keyspaces.get(shard.keyspace)
        if replica is None:
            return self._create_if_named(shard)
        if keyspace is None:
            return self.fetch_map()
        replica.policy = keyspace.policy
        replica.members_for_all = min(keyspace.replication_factor, len(self.map.nodes))
        if shard.state is not ShardState.ACTIVE:
            return None
        own = (shard.epoch, shard.token) == replica.promised and shard.primary == self.config.id
        if own and replica.status is Status.OPENED and replica.is_opened:
            replica.activate(shard)
            self.suspicions.silent.pop(shard.id, None)
            self.beat()
        elif shard.epoch > replica.promised[0]:
            replica.step_down("another configuration of the shard is active")
        if shard.epoch >= replica.promised[0] and shard.primary != self.config.id:
            replica.shard = shard
            replica.backup.greet(shard)
        return None

    def _create_if_named(self, shard: Shard) -> None:
        """A replica is made with its shard or as a learner, and has promised the epoch that makes it (R8)."""
        own = Member(self.config.id, self.config.incarnation)
        if own in shard.members or own in shard.learners:
            self.new_replica(shard).promise(shard.epoch, shard.token)
            self.beat()

    def when_durable(self, then: Callable[[], None]) -> None:
        """Call once everything that this turn hands to the log is durable."""
        self._after_rows.append(then)

    # ---- heartbeats ----

    def beat(self) -> None:
        """Send a heartbeat at the end of this turn, and the next after an interval.

        Not at once after another: it tells of all replicas, and a reconfiguration may be of all of them.
        """
        if self.is_running:
            pause_ns = max(BEAT_PAUSE_NS, BEAT_REPLICA_NS * len(self.replicas))
            interval_ns = int(self._heartbeat_interval_s * SECOND_NS)
            at_ns = self._beaten_ns + min(pause_ns, interval_ns)
            self._timers.start("heartbeat", max(self.now_ns, at_ns))

    @property
    def _heartbeat_interval_s(self) -> float:
        return settings_of(self.map, self.knobs).heartbeat_interval_s

    def _publish_heartbeat(self, leaving: bool = False) -> None:
        self._beaten_ns = self.now_ns
        beat = replace(self.heartbeat(), leaving=leaving)
        subject = self.config.subjects.heartbeat(self.config.id)
        self._effects.append(Publish(subject, encode_json(beat.to_wire())))

    def heartbeat(self) -> Heartbeat:
        return heartbeat_of(self)

    def _on_heartbeat(self, message: Received) -> None:
        try:
            beat = heartbeat_from_wire(decode_body(message.body)[1])
        except BusKVError:
            return
        if beat.node != self.config.id:
            self.peers[beat.node] = (self.now_ns, beat)
            self._gateway.circuit.succeed(beat.node)
            self.suspicions.on_heartbeat(beat)
        elif beat.run > self.config.run:
            self._halt_for_newer()
        if beat.map_version > self.map.map_version:
            self.fetch_map()

    def _halt_for_newer(self) -> None:
        self._effects.append(
            Halt(1, f"a newer process runs as node {self.config.id}; this one stops")
        )

    # ---- answers and plumbing ----

    def _next_ticket(self) -> int:
        self._ticket += 1
        return self._ticket

    def next_correlation(self) -> int:
        self._correlation += 1
        return self._correlation

    def request_node(self, node: str, body: bytes) -> int:
        correlation = self.next_correlation()
        subject = self.config.subjects.node_inbox(node)
        self._effects.append(Request(correlation, subject, body))
        return correlation

    def request_shard(self, shard: str, body: bytes, any: bool = False) -> int:
        """Ask a shard's primary, or `any` of its replicas."""
        correlation = self.next_correlation()
        subjects = self.config.subjects
        subject = subjects.shard_read(shard) if any else subjects.shard_request(shard)
        self._effects.append(Request(correlation, subject, body))
        return correlation

    def suspect(self, shard: str, reason: str) -> None:
        """Say on the bus that a shard's primary does not answer. A hint: it affects speed, never safety."""
        said = self.suspicions.say(shard, reason)
        self._effects += [said] if said else []

    def _on_response(self, correlation: int, body: bytes | None) -> None:
        waiting = self.links.take_call(correlation)
        if waiting is not None:
            return self._control.on_answer(waiting, body)
        if correlation != self._hello or body is None:
            if not self.sql.on_response(correlation, body):
                self._gateway.on_response(correlation, body)
            return
        try:
            earlier = tuple(decode_cbor(body)["run"]) < self.config.run
        except (BusKVError, KeyError, TypeError):
            return
        if earlier:
            self._effects.append(
                Halt(1, f"node {self.config.id} runs already; stop it first or use another --id")
            )

    def _announce(self, shard: str, event: dict[str, Any]) -> None:
        subject = self.config.subjects.failover_event(shard)
        self._effects.append(Publish(subject, encode_json(event)))
