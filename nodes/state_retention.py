"""How long the state remembers what was done: operations by age and size, requests by the window of exactly-once.

Ages are told by log time, so a node that slept forgets nothing that its shards still count on (R6).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_DROPPED_PARTS = """
SELECT shard_number, max(last) AS last FROM (
    SELECT shard_number, last, time_ms,
        sum(bytes) OVER (ORDER BY time_ms DESC, shard_number, last DESC) AS bytes_to_here
    FROM state.oplog_parts
) WHERE time_ms < (SELECT max(time_ms) FROM state.marks) - $keep_ms OR bytes_to_here > $keep_bytes
GROUP BY shard_number
"""
_DROP = """
DELETE FROM state.{table} USING ({dropped}) AS dropped
WHERE {table}.shard_number = dropped.shard_number AND {table}.{position} <= dropped.last
"""
_REMEMBER_FLOORS = """
INSERT INTO state.clients
SELECT requests.shard, client, max(requests.last), max(requests.time_ms)
FROM state.requests JOIN state.marks ON marks.shard = requests.shard
WHERE requests.time_ms < marks.time_ms - $window_ms
GROUP BY requests.shard, client
ON CONFLICT (shard, client) DO UPDATE SET
    floor = greatest(floor, excluded.floor), time_ms = greatest(time_ms, excluded.time_ms)
"""
_FORGET_REQUESTS = """
DELETE FROM state.requests USING state.marks
WHERE marks.shard = requests.shard AND requests.time_ms < marks.time_ms - $window_ms
"""
_FORGET_CLIENTS = """
DELETE FROM state.clients USING (
    SELECT shard, client,
        row_number() OVER (PARTITION BY shard ORDER BY time_ms DESC, client) AS place
    FROM state.clients
) AS aged
WHERE aged.shard = clients.shard AND aged.client = clients.client AND aged.place > $clients_max
"""


@dataclass(frozen=True, slots=True)
class Retention:
    oplog_keep_s: float
    oplog_keep_bytes: int
    """Of all shards together; the oldest operations go first."""
    dedup_window_ms: int
    clients_max: int
    """Clients per shard whose greatest forgotten request number is remembered, the latest ones."""

    def apply(self, db: DuckDBPyConnection) -> None:
        """Take out what is no longer to be kept, within a transaction of the caller's. Raises duckdb.Error."""
        kept = {"keep_ms": int(self.oplog_keep_s * 1000), "keep_bytes": self.oplog_keep_bytes}
        for table, position in (("oplog", "seq"), ("oplog_parts", "last")):
            statement = _DROP.format(table=table, position=position, dropped=_DROPPED_PARTS)
            db.execute(statement, kept)
        window = {"window_ms": self.dedup_window_ms}
        db.execute(_REMEMBER_FLOORS, window)
        db.execute(_FORGET_REQUESTS, window)
        db.execute(_FORGET_CLIENTS, {"clients_max": self.clients_max})
