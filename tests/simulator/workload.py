"""The workload of one client: single operations on few keys, every value unique, every call recorded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bus_kv.client.results import Entry, Receipt
from bus_kv.client.session import Operation, Session
from bus_kv.errors import BusKVError
from bus_kv.protocol import batch as b
from tests.simulator.world import MILLISECOND_NS

if TYPE_CHECKING:
    from bus_kv.protocol.batch import Version
    from tests.simulator.cluster import Cluster
    from tests.simulator.world import World

KEYS = [f"k{i}".encode() for i in range(6)]


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


class Workload:
    def __init__(
        self, world: World, cluster: Cluster, name: str, workers: int, history: list[Call]
    ):
        self._world, self._history, self._name = world, history, name
        self._random = world.random(f"workload/{name}")
        self._process = cluster.start_client(name, self._done)
        self._count = 0
        self._number = 0
        self.stopped = False
        self.open = 0
        for _ in range(workers):
            self._think()

    @property
    def _session(self) -> Session:
        assert isinstance(self._process.machine, Session)
        return self._process.machine

    def _think(self) -> None:
        self._world.after(self._random.randint(0, 60) * MILLISECOND_NS, self._next)

    def _next(self) -> None:
        if self.stopped:
            return
        key = self._random.choice(KEYS)
        choice = self._random.random()
        if choice < 0.4:
            call = Call("get", key, None, self._world.now_ns)
        elif choice < 0.5:
            call = Call("delete", key, None, self._world.now_ns)
        else:
            self._count += 1
            call = Call("put", key, f"{self._name}.{self._count}".encode(), self._world.now_ns)
        self._history.append(call)
        self.open += 1
        if choice > 0.85:
            self._through_gateway(call)
        else:
            self._submit(call)

    def _submit(self, call: Call) -> None:
        kind = {"get": b.GET, "put": b.PUT, "delete": b.DELETE}[call.kind]
        operation = Operation(kind, call.key, call.value, call)
        if call.kind == "put" and self._random.random() < 0.2:
            operation.has_condition = True
        self._session.submit(operation, self._world.now_ns)
        self._process.schedule()

    def _through_gateway(self, call: Call) -> None:
        """The way of a client that knows nothing of shards; the session repeats it under one request_id."""
        self._number += 1
        fields: dict[str, Any] = {
            "key": call.key, "value": call.value, "request_id": f"{self._name}-g:{self._number}",
        }  # fmt: skip
        if self._random.random() < 0.3:
            fields["ttl_ms"] = self._random.randint(5, 2000)
        self._session.call("put", fields, call, self._world.now_ns)
        self._process.schedule()

    def _done(self, call: Call, outcome: Any) -> None:
        call.returned_ns = self._world.now_ns
        self.open -= 1
        match outcome:
            case BusKVError():
                call.outcome = "definite" if outcome.definite else "indefinite"
                call.code = outcome.code
            case Entry():
                call.outcome, call.version, call.read = "ok", outcome.version, outcome.value
            case Receipt():
                call.outcome, call.version = "ok", outcome.version
            case dict():
                call.outcome, call.version = "ok", tuple(outcome["version"])
        self._world.note(
            self._name, f"{call.kind} {call.key!r} = {call.outcome} {call.version} {call.code}"
        )
        self._think()
