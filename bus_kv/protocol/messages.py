"""Bodies of the control plane: heartbeats and node events (JSON), seals, openings and announcements (CBOR)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from bus_kv.errors import BusKVError

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

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)


def heartbeat_from_wire(wire: dict[str, Any]) -> Heartbeat:
    """Raises KeyError, TypeError or ValueError when it is none; unknown fields of newer nodes are passed over."""
    known = {name: wire[name] for name in Heartbeat.__dataclass_fields__ if name in wire}
    known["run"] = tuple(known["run"])
    known["shards"] = [
        ReplicaReport(**{n: s[n] for n in ReplicaReport.__dataclass_fields__})
        for s in known["shards"]
    ]
    for report in known["shards"]:
        report.last = tuple(report.last)
    return Heartbeat(**known)


def failure_headers(error: BusKVError) -> dict[str, str]:
    """The two headers of every failure (ADR-32); header text is ASCII and one line."""
    text = f"{error.code}: {error.message}".encode("ascii", "replace").decode()
    return {
        "Nats-Service-Error": " ".join(text.split()),
        "Nats-Service-Error-Code": str(error.status),
    }
