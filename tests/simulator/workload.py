"""The workload of one client: single operations on few keys, every value unique, every call recorded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bus_kv.client.results import Entry, Receipt
from bus_kv.client.session import Session
from bus_kv.errors import BusKVError, ConsistencyNotMet, from_body
from bus_kv.protocol import batch as b
from bus_kv.protocol.codec import encode_cbor
from tests.simulator.shape import KEYS
from tests.simulator.world import MILLISECOND_NS, Violation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bus_kv.protocol.batch import Version
    from tests.simulator.cluster import Cluster
    from tests.simulator.world import World


@dataclass(slots=True)
class Call:
    """One line of the history. `outcome` is ok, definite (never applied) or indefinite."""

    kind: str
    key: bytes
    value: bytes | None
    invoked_ns: int
    returned_ns: int | None = None
    outcome: str = "open"
    version: Version | None = None
    read: bytes | None = None
    code: str = ""
    found: bool | None = None
    if_absent: bool = False
    atomic: bool = False
    """Part of a batch that was to be done whole or not at all: refused also for its neighbours' sake."""
    if_version: Version | None = None
    level: str = "quorum"
    copied: bool = False
    """Sent once more, and nobody hears what became of that: no refusal of this one is the whole truth."""


@dataclass(slots=True)
class Twins:
    """A call that was sent twice at the same time, over two gateways, under one request_id."""

    call: Call
    first: Any = None


class Workload:
    def __init__(
        self, world: World, cluster: Cluster, name: str, workers: int, history: list[Call]
    ):
        self._world, self._history, self._name = world, history, name
        self._cluster = cluster
        self._random = world.random(f"workload/{name}")
        self._process = cluster.start_client(name, self._done)
        self._count = 0
        self._number = 0
        self._seen: dict[bytes, Version] = {}
        """Key -> a version it had, for conditions."""
        self.stopped = False
        self.open = 0
        for _ in range(workers):
            self._think()

    @property
    def _session(self) -> Session:
        assert isinstance(self._process.machine, Session)
        return self._process.machine

    def _think(self) -> None:
        pause_ns = self._random.randint(0, 60) * MILLISECOND_NS
        self._world.after(pause_ns // self._cluster.shape.haste, self._next)

    def _next(self) -> None:
        if self.stopped:
            return
        self.open += 1
        choice = self._random.random()
        if choice < 0.65:
            self._submit(self._call())
        elif choice < 0.9:
            self._through_gateway(self._call())
        else:
            self._batch()

    def _call(self, keys: Sequence[bytes] = KEYS) -> Call:
        """A get, put or delete of a random key; every value is unique."""
        key = self._random.choice(keys)
        choice = self._random.random()
        if choice < 0.45:
            call = Call("get", key, None, self._world.now_ns)
        elif choice < 0.55:
            call = Call("delete", key, None, self._world.now_ns)
        else:
            self._count += 1
            value = f"{self._name}.{self._count}".encode()
            call = Call("put", key, value, self._world.now_ns)
            call.if_absent = self._random.random() < 0.2
        if call.kind != "get" and not call.if_absent and self._random.random() < 0.2:
            call.if_version = self._seen.get(key)
        self._history.append(call)
        return call

    def _submit(self, call: Call) -> None:
        level = self._random.choice([None, None, "one", "all"])
        call.level = level or "quorum"
        now_ns = self._process.now_ns
        if call.kind == "get":
            self._session.get(call.key, call, now_ns, consistency=level)
        else:
            self._session.write(
                b.PUT if call.kind == "put" else b.DELETE, call.key, call.value, call, now_ns,
                consistency=level, if_absent=call.if_absent, if_version=call.if_version,
            )  # fmt: skip
        self._process.schedule()

    def _through_gateway(self, call: Call) -> None:
        """The way of a client that knows nothing of shards; the session repeats it under one request_id."""
        fields = self._fields(call)
        if call.kind == "get":
            return self._ask(call.kind, fields, call)
        fields["request_id"] = self._request_id()
        choice = self._random.random()
        if choice < 0.1:
            self.open += 1
            twins = Twins(call)
            self._ask(call.kind, fields, twins)
            return self._ask(call.kind, fields, twins)
        if choice < 0.25:
            call.copied = True
            delay_ns = self._random.randint(0, 20) * MILLISECOND_NS
            self._world.after(delay_ns, lambda: self._to_primary(call, fields))
        return self._ask(call.kind, fields, call)

    def _ask(self, verb: str, fields: dict[str, Any], token: Any) -> None:
        self._session.call(verb, fields, token, self._process.now_ns)
        self._process.schedule()

    def _to_primary(self, call: Call, fields: dict[str, Any]) -> None:
        """The same request once more, from somebody who knows the shard's primary."""
        shard = self._cluster.map().shards.get(self._cluster.shard_of(call.key))
        if shard is None:
            return
        client, _, number = fields["request_id"].partition(":")
        is_put = call.kind == "put"
        batch = b.Batch(
            bytes([b.PUT if is_put else b.DELETE]), [call.key], [call.value] if is_put else [],
            client, [int(number)],
        )  # fmt: skip
        if call.if_absent or call.if_version:
            batch.conditions = {0: call.if_version}
        if "ttl_ms" in fields:
            batch.ttls_ms = {0: fields["ttl_ms"]}
        body = encode_cbor({"epoch": shard.epoch, "batch": batch.encode()})
        subject = self._cluster.subjects.shard_request(shard.id)
        self._cluster.bus.publish(self._process, subject, body)

    def _fields(self, call: Call) -> dict[str, Any]:
        fields: dict[str, Any] = {"key": call.key}
        if call.kind == "put":
            fields["value"] = call.value
            if call.if_absent:
                fields["if_absent"] = True
            if self._random.random() < 0.3:
                fields["ttl_ms"] = self._random.randint(5, 2000)
        if call.if_version:
            fields["if_version"] = list(call.if_version)
        return fields

    def _request_id(self) -> str:
        """Numbers grow, but not in the order in which requests leave."""
        self._number += 1
        return f"{self._name}-g:{self._number ^ 3}"

    def _batch(self) -> None:
        """Several operations as one request; sometimes all or nothing."""
        atomic, keys = self._random.random() < 0.3, KEYS
        if atomic and self._random.random() < 0.9:
            shard_of = self._cluster.shard_of
            shard = shard_of(self._random.choice(KEYS))
            keys = [key for key in KEYS if shard_of(key) == shard]
        calls = [self._call(keys) for _ in range(self._random.randint(1, 5))]
        operations = [{"op": call.kind, **self._fields(call)} for call in calls]
        for call in calls:
            call.atomic = atomic
        fields = {"ops": operations, "atomic": atomic, "request_id": self._request_id()}
        self._ask("batch", fields, calls)

    def _done(self, tokens: Sequence[Call | list[Call] | Twins], outcomes: Sequence[Any]) -> None:
        for token, outcome in zip(tokens, outcomes, strict=True):
            if isinstance(token, Twins):
                self._twin_done(token, outcome)
            else:
                self._one_done(token, outcome)

    def _twin_done(self, twins: Twins, outcome: Any) -> None:
        """What one of two was told is told the other; a refusal is the truth when both got one."""
        call, is_first = twins.call, twins.first is None
        if is_first:
            twins.first, self.open = outcome, self.open - 1
            if not isinstance(outcome, BusKVError):
                self._record(call, outcome)
        elif call.outcome == "open":
            if isinstance(outcome, BusKVError) and not getattr(twins.first, "definite", True):
                outcome = twins.first
            self._one_done(call, outcome)
        else:
            told = isinstance(outcome, dict) and outcome.get("version")
            if told and call.version and tuple(told) != call.version:
                raise Violation(f"exactly once: {call} was told {told} as well")
            self.open -= 1
            self._think()

    def _one_done(self, token: Call | list[Call], outcome: Any) -> None:
        self.open -= 1
        calls = token if isinstance(token, list) else [token]
        results = (
            outcome["results"]
            if isinstance(token, list) and isinstance(outcome, dict)
            else [outcome]
        )
        for i, call in enumerate(calls):
            result = results[i] if len(results) == len(calls) else outcome
            self._record(
                call, from_body(result) if isinstance(result, dict) and "code" in result else result
            )
        self._think()

    def _check_all(self, call: Call) -> None:
        """ALL is answered only when every member has it, and there are as many as there should be (R4)."""
        wanted = min(self._cluster.store.factor_min, len(self._cluster.map().nodes))
        if call.version is None:
            return
        holders = self._cluster.holders(self._cluster.shard_of(call.key), call.version)
        if holders < wanted:
            raise Violation(f"R4: {call} was told as ALL, and is on {holders} disks of {wanted}")

    def _record(self, call: Call, outcome: Any) -> None:
        call.returned_ns = self._world.now_ns
        match outcome:
            case ConsistencyNotMet() if call.kind != "get":
                call.outcome, call.version = "ok", tuple(outcome.detail["version"])
            case BusKVError():
                call.outcome = "definite" if outcome.definite else "indefinite"
                call.code = outcome.code
                if call.copied:
                    call.outcome, call.code = "indefinite", ""
            case Entry():
                call.outcome, call.version, call.read = "ok", outcome.version, outcome.value
            case Receipt():
                call.outcome, call.version, call.found = "ok", outcome.version, outcome.found
            case dict():
                version = outcome.get("version")
                call.outcome, call.version = "ok", version and tuple(version)
                if call.kind == "get":
                    call.read = outcome.get("value")
                else:
                    call.found = outcome["found"]
        if call.level == "all" and call.kind != "get" and isinstance(outcome, Receipt):
            self._check_all(call)
        if call.version is not None:
            self._seen[call.key] = call.version
        self._world.note(
            self._name, f"{call.kind} {call.key!r} = {call.outcome} {call.version} {call.code}"
        )
