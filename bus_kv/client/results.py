"""What a client gets back."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
