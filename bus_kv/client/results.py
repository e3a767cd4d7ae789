"""What a client gets back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from bus_kv.protocol.batch import Version


class Fates(Protocol):
    """Whom a receipt asks what became of its write (client/receipts.py)."""

    async def ask(self, receipt: Receipt) -> str:
        """The write's state now."""

    async def reach(self, receipt: Receipt, level: str) -> None:
        """Return when the write is at this level."""


class Receipt:
    """What a write returns: where it stands in the history of its shard.

    `version` is (epoch, seq), None when nothing was there to delete; `found` tells whether the key existed before;
    `consistency` is the level at which the write was acknowledged. What became of it since, `state` tells; `quorum`
    and `all` wait for it.
    """

    __slots__ = ("_fates", "_state", "consistency", "found", "shard", "version")

    def __init__(
        self, shard: str, version: Version | None, found: bool, consistency: str,
        fates: Fates | None = None,
    ) -> None:  # fmt: skip
        self.shard = shard
        self.version = version
        self.found = found
        self.consistency = consistency
        self._fates = fates
        self._state: str | None = None
        """As it was told last."""

    async def state(self) -> str:
        """What became of the write.

        "primary": on the disk of its primary. "quorum": committed, nothing takes it back. "all": on every member's
        disk. "rolled_back": gone with its primary, for ever. "unknown": what cannot be told. A write of which "all" or
        "rolled_back" was told is not asked for again. Raises ShardUnavailable, ShardUnknown.
        """
        if self.version is None:
            return "all"  # nothing was written that a member could lack
        if self._state not in ("all", "rolled_back"):
            assert self._fates is not None, "a client's receipt can ask"
            self._state = await self._fates.ask(self)
        return self._state

    async def quorum(self) -> None:
        """Return when the write is committed: at once, if it was acknowledged so, else after asking.

        Raises ConsistencyNotMet when it was rolled back, OutcomeUnknown when the client's timeout passes first.
        """
        await self._reach("quorum")

    async def all(self) -> None:
        """Return when every member has the write.

        Raises what `quorum` raises, and ConsistencyNotMet, with "quorum" as `detail["met"]`, when it has come no
        further than that in time.
        """
        await self._reach("all")

    async def _reach(self, level: str) -> None:
        if not self.is_known_at(level):
            assert self._fates is not None, "a client's receipt can ask"
            await self._fates.reach(self, level)

    def is_known_at(self, level: str) -> bool:
        """Whether it has been told that the write is at this level ("quorum" or "all")."""
        told = (self.consistency, self._state)
        return self.version is None or "all" in told or (level == "quorum" and "quorum" in told)

    def __repr__(self) -> str:
        return f"Receipt(shard={self.shard!r}, version={self.version}, found={self.found})"


class ReadState(NamedTuple):
    """What a read at ONE was answered from: a replica that had the shard's log up to (epoch, seq), and had heard from
    its primary `age_ms` ago."""

    epoch: int
    seq: int
    age_ms: int


class Entry:
    """What a read returns. An absent key has `found` False, and None for value, version and expires_at.

    `expires_at` is in milliseconds since the Unix epoch, None when the key has no lifetime. `read` tells how fresh a
    read at ONE is; None at the other levels, which are never stale.
    """

    __slots__ = ("expires_at", "key", "read", "value", "version")

    def __init__(
        self,
        key: bytes,
        value: bytes | None,
        version: Version | None,
        expires_at: int | None = None,
        read: ReadState | None = None,
    ) -> None:
        self.key = key
        self.value = value
        self.version = version
        self.expires_at = expires_at
        self.read = read

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


class ClusterStats(NamedTuple):
    """The cluster in numbers, as the node that was asked knows it."""

    total_nodes: int
    healthy_nodes: int
    total_shards: int
    under_replicated_shards: int
    keys: int
    bytes: int
    average_latency_ms: float | None
    """Mean time to answer of the node that was asked, since it started; None before its first request."""
    map_version: int
    suspects: list[str]
    """Nodes that somebody lately had no answer of."""

    @classmethod
    def from_wire(cls, stats: dict[str, Any]) -> ClusterStats:
        under_replicated = sum(bool(shard["under_replicated"]) for shard in stats["shards"])
        return cls(
            stats["total_nodes"], stats["healthy_nodes"], stats["total_shards"], under_replicated,
            stats["keys"], stats["bytes"], stats["average_latency_ms"], stats["map_version"],
            [suspect["node"] for suspect in stats["suspects"]],
        )  # fmt: skip
