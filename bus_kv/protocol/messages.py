"""Bodies of the control plane: heartbeats and node events (JSON), seals, openings and announcements (CBOR)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

from bus_kv.errors import BusKVError, MalformedRequest
from bus_kv.protocol.codec import encode_cbor
from bus_kv.protocol.shard_map import Shard, shard_from_document
from bus_kv.subjects import is_id

EPOCH_MAX = 2**62
"""Epochs are small; a larger one is nonsense and would not fit the log's column."""

PROBE = encode_cbor({"type": "beat"})
"""What a coordinator asks a node whose next heartbeat it cannot wait for; the answer is one."""

Run: TypeAlias = tuple[int, str]
"""One life of a process: (start in ms since the Unix epoch, random). A greater one started later."""


@dataclass(slots=True)
class ReplicaReport:
    """What a node says about one of its replicas."""

    id: str
    epoch: int
    """The promised epoch, and its token."""
    token: str
    status: str
    last: tuple[int, int]
    commit_seq: int
    folded: int
    """Seq up to which the state on disk has it."""
    keys: int
    bytes: int
    operations: int
    """Answered since the process started."""


@dataclass(slots=True)
class Heartbeat:
    node: str
    incarnation: str
    run: Run
    leaving: bool = False
    """The last one of a process that shuts down."""
    zone: str | None = None
    weight: int = 1
    version: str = ""
    value_bytes_max: int = 0
    map_version: int = 0
    shards: list[ReplicaReport] = field(default_factory=list)
    _by_id: dict[str, ReplicaReport] | None = field(
        default=None, init=False, compare=False, repr=False
    )

    def report(self, shard: str) -> ReplicaReport | None:
        """What it says about the replica of a shard."""
        if self._by_id is None:
            self._by_id = {report.id: report for report in self.shards}
        return self._by_id.get(shard)

    def to_wire(self) -> dict[str, Any]:
        wire = {name: getattr(self, name) for name in _HEARTBEAT}
        reports = [{name: getattr(r, name) for name in _REPORT} for r in self.shards]
        return wire | {"shards": reports}


def heartbeat_from_wire(wire: dict[str, Any]) -> Heartbeat:
    """Raises MalformedRequest when it is none; unknown fields of newer nodes are passed over."""
    fields = _typed(wire, _HEARTBEAT)
    if not is_id(fields["node"]):
        raise MalformedRequest("node is not an id")
    fields["run"] = _pair(fields["run"], int, str)
    fields["shards"] = [_report_from_wire(report) for report in fields["shards"]]
    return Heartbeat(**fields)


def _report_from_wire(wire: Any) -> ReplicaReport:
    fields = _typed(wire, _REPORT)
    fields["last"] = _pair(fields["last"], int, int)
    return ReplicaReport(**fields)


def _typed(wire: Any, kinds: dict[str, tuple[type, ...]]) -> dict[str, Any]:
    """The fields that are known, each of its kind."""
    if type(wire) is not dict:
        raise MalformedRequest("not a map")
    for name, kind in kinds.items():
        if type(wire.get(name)) not in kind:
            raise MalformedRequest(f"{name} is missing or of the wrong kind")
    return {name: wire[name] for name in kinds}


def _pair(value: Any, first: type, second: type) -> tuple[Any, Any]:
    if len(value) != 2 or type(value[0]) is not first or type(value[1]) is not second:
        raise MalformedRequest(f"{value!r} is not a pair as it should be")
    return value[0], value[1]


_HEARTBEAT: dict[str, tuple[type, ...]] = {
    "node": (str,), "incarnation": (str,), "run": (list,), "leaving": (bool,),
    "zone": (str, type(None)), "weight": (int,), "version": (str,), "value_bytes_max": (int,),
    "map_version": (int,), "shards": (list,),
}  # fmt: skip
_REPORT: dict[str, tuple[type, ...]] = {
    "id": (str,), "epoch": (int,), "token": (str,), "status": (str,), "last": (list,),
    "commit_seq": (int,), "folded": (int,), "keys": (int,), "bytes": (int,), "operations": (int,),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Seal:
    """Step 2: promise the record's (epoch, token) and report the end of the log; meant for one `incarnation`."""

    record: Shard
    incarnation: str


def seal_from_wire(wire: dict[str, Any]) -> Seal:
    """Raises MalformedRequest."""
    if type(wire.get("incarnation")) is not str:
        raise MalformedRequest("incarnation is missing")
    return Seal(record_from_wire(wire), wire["incarnation"])


def position_from_wire(value: Any) -> tuple[int, int]:
    """(epoch, seq) of an entry's end. Raises MalformedRequest."""
    if type(value) not in (list, tuple):
        raise MalformedRequest("a position is [epoch, seq]")
    return _pair(value, int, int)


def record_from_wire(wire: dict[str, Any]) -> Shard:
    """The `record` of an opening or announcement. Raises MalformedRequest."""
    try:
        shard = shard_from_document(wire["record"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MalformedRequest(f"record is not a shard: {error!r}") from None
    names = [shard.id, shard.keyspace, shard.token, shard.primary]
    names += [m.node for m in shard.members] + [m.incarnation for m in shard.members]
    if not all(type(name) is str for name in names) or not is_id(shard.id):
        raise MalformedRequest("record is not a shard")
    if type(shard.epoch) is not int or not 0 < shard.epoch < EPOCH_MAX:
        raise MalformedRequest("epoch is out of range")
    return shard


def failure_headers(error: BusKVError) -> dict[str, str]:
    """The two headers of every failure (ADR-32); header text is ASCII and one line."""
    text = f"{error.code}: {error.message}".encode("ascii", "replace").decode()
    printable = "".join(c if " " <= c <= "~" else " " for c in text)
    return {
        "Nats-Service-Error": " ".join(printable.split()),
        "Nats-Service-Error-Code": str(error.status),
    }
