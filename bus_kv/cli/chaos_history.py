"""What the clients of `bus-kv chaos` saw, call by call, and what the cluster tells afterwards."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bus_kv.protocol.batch import Version

LEVELS_THAT_LAST = ("quorum", "all")
"""A write that was acknowledged so is never lost."""


def hot_key(number: int) -> bytes:
    return b"hot/%03d" % number


class Kind(StrEnum):
    GET = "get"
    PUT = "put"
    DELETE = "delete"


class Outcome(StrEnum):
    DONE = "done"
    UNMET = "unmet"
    """Refused because the key was not as the condition says: that is an answer about the data."""
    REFUSED = "refused"
    """Definite: it was not applied and never will be."""
    UNKNOWN = "unknown"
    """It may have been applied, or may yet be."""


@dataclass(slots=True)
class Call:
    """One call; `invoked_ns` and `returned_ns` are of one monotonic clock.

    `value` is what a put writes; no two puts write the same. `version`, `found` and `read` (the value) are the answer.
    """

    client: str
    kind: Kind
    key: bytes
    invoked_ns: int
    level: str = "quorum"
    value: bytes | None = None
    if_absent: bool = False
    if_version: Version | None = None
    returned_ns: int | None = None
    outcome: Outcome = Outcome.UNKNOWN
    version: Version | None = None
    found: bool | None = None
    read: bytes | None = None
    code: str | None = None

    @property
    def is_write(self) -> bool:
        return self.kind is not Kind.GET

    @property
    def is_acknowledged_write(self) -> bool:
        """Whether it was acknowledged and changed something."""
        return self.is_write and self.outcome is Outcome.DONE and self.version is not None

    def __str__(self) -> str:
        condition = " if absent" if self.if_absent else ""
        condition += f" if at {self.if_version}" if self.if_version else ""
        wrote = "" if self.value is None else f" {_text(self.value)}"
        answer = "" if self.read is None else f" {_text(self.read)}"
        version = "" if self.version is None else f" at {self.version}"
        returned = "-" if self.returned_ns is None else f"{self.returned_ns / 1e6:.3f}"
        return (
            f"{self.client} {self.kind} {_text(self.key)}{wrote}{condition} ({self.level}) → "
            f"{self.code or self.outcome}{answer}{version} [{self.invoked_ns / 1e6:.3f}, {returned} ms]"
        )

    def to_json(self) -> dict[str, Any]:
        """Without what is empty; keys and values are text, for they were made here."""
        fields = {name: value for name, value in asdict(self).items() if value not in (None, False)}
        return {n: v.decode() if isinstance(v, bytes) else v for n, v in fields.items()}


def _text(data: bytes) -> str:
    return data.decode(errors="backslashreplace")


@dataclass(frozen=True, slots=True)
class Logged:
    """One row of the cluster's operation log; `value` None is a delete."""

    version: Version
    kind: str
    key: bytes
    value: bytes | None
    client: str | None
    request_id: str | None


@dataclass
class Evidence:
    """What the cluster tells when everything is healed: its operation log in order, every key as it is read, the
    histories of some keys, and the sum of every member's copy."""

    log: list[Logged] = field(default_factory=list)
    final: dict[bytes, tuple[Version | None, bytes | None]] = field(default_factory=dict)
    histories: dict[bytes, list[tuple[Version, bytes | None]]] = field(default_factory=dict)
    """Key → (version, value) of every write, oldest first."""
    copies: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Node → (operations, sum of their hashes) of its operation log, told while it was primary."""
