"""What a client gets back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bus_kv.protocol.batch import Version


class Receipt:
    """What a write returns: where it stands in the history of its shard.

    `version` is (epoch, seq), None when nothing was there to delete; `found` tells whether the key existed before;
    `consistency` is the level at which the write was acknowledged.
    """

    __slots__ = ("consistency", "found", "shard", "version")

    def __init__(self, shard: str, version: Version | None, found: bool, consistency: str) -> None:
        self.shard = shard
        self.version = version
        self.found = found
        self.consistency = consistency

    def __repr__(self) -> str:
        return f"Receipt(shard={self.shard!r}, version={self.version}, found={self.found})"


class Entry:
    """What a read returns. An absent key has `found` False, and None for value, version and expires_at.

    `expires_at` is in milliseconds since the Unix epoch, None when the key has no lifetime.
    """

    __slots__ = ("expires_at", "key", "value", "version")

    def __init__(
        self,
        key: bytes,
        value: bytes | None,
        version: Version | None,
        expires_at: int | None = None,
    ) -> None:
        self.key = key
        self.value = value
        self.version = version
        self.expires_at = expires_at

    @property
    def found(self) -> bool:
        return self.version is not None

    @property
    def text(self) -> str | None:
        """The value as UTF-8 text; None when the key is absent. Raises UnicodeDecodeError when it is no text."""
        return None if self.value is None else self.value.decode()

    def __repr__(self) -> str:
        return f"Entry(key={self.key!r}, value={self.value!r}, version={self.version})"


class PastVersion:
    """One write of a key's history.

    `op` is put, delete or expire; `value` is what a put wrote, else None; `time_ms` is the primary's, in milliseconds
    since the Unix epoch; `request_id` ("<client>:<number>") names the request, None for what no client asked for.
    """

    __slots__ = ("op", "request_id", "time_ms", "value", "version")

    def __init__(
        self, version: Version, op: str, value: bytes | None, time_ms: int, request_id: str | None
    ) -> None:
        self.version = version
        self.op = op
        self.value = value
        self.time_ms = time_ms
        self.request_id = request_id

    @classmethod
    def from_wire(cls, fields: dict[str, Any]) -> PastVersion:
        epoch, seq = fields["version"]
        value, request_id = fields.get("value"), fields.get("request_id")
        return cls((epoch, seq), fields["op"], value, fields["time"], request_id)

    def __repr__(self) -> str:
        return f"PastVersion(version={self.version}, op={self.op!r}, value={self.value!r})"


class Rows:
    """What a SQL query returns: the names of its columns, and its rows, a value for each column.

    A value is None, bool, int, float, str, bytes, list or dict; times are ISO 8601 text in UTC.
    """

    __slots__ = ("columns", "rows")

    def __init__(self, columns: list[str], rows: list[list[Any]]) -> None:
        self.columns = columns
        self.rows = rows

    def __repr__(self) -> str:
        return f"Rows(columns={self.columns}, {len(self.rows)} rows)"
