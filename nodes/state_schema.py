"""The tables of `state.duckdb`, and the views that users query.

Columns that grow with what is written name their compression: DuckDB would try all that it knows on every one of them,
which takes longer than writing them does, and those for text many times as long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bus_kv.protocol.batch import CREATED, DELETED, KIND_NAMES, REPLACED

if TYPE_CHECKING:
    from collections.abc import Mapping

ROLLED_BACK = 255
"""An outcome that stands in no log: a takeover has undone the operation."""
OUTCOME_NAMES = {
    CREATED: "created", REPLACED: "replaced", DELETED: "deleted", ROLLED_BACK: "rolled_back"
}  # fmt: skip

SCHEMA = """
CREATE TABLE state.meta (name VARCHAR, value VARCHAR);
CREATE TABLE state.marks (
    shard VARCHAR, number INTEGER, keyspace VARCHAR,
    epoch BIGINT, last BIGINT, time_ms BIGINT, keys BIGINT, data_bytes BIGINT, lineage VARCHAR
);
CREATE TABLE state.oplog (
    shard_number INTEGER USING COMPRESSION RLE,
    epoch BIGINT USING COMPRESSION RLE,
    seq BIGINT USING COMPRESSION BITPACKING,
    time_ms BIGINT USING COMPRESSION RLE,
    op UTINYINT USING COMPRESSION BITPACKING,
    key BLOB USING COMPRESSION UNCOMPRESSED,
    key_hash UINTEGER USING COMPRESSION UNCOMPRESSED,
    value BLOB USING COMPRESSION UNCOMPRESSED,
    client VARCHAR USING COMPRESSION DICT_FSST,
    number UBIGINT USING COMPRESSION BITPACKING,
    request_index UINTEGER USING COMPRESSION BITPACKING,
    outcome UTINYINT USING COMPRESSION BITPACKING
);
CREATE TABLE state.oplog_parts (shard_number INTEGER, last BIGINT, time_ms BIGINT, bytes BIGINT);
CREATE TABLE state.requests (
    shard VARCHAR USING COMPRESSION DICT_FSST, client VARCHAR USING COMPRESSION DICT_FSST,
    first UBIGINT, last UBIGINT, numbers BLOB USING COMPRESSION UNCOMPRESSED,
    indexes BLOB USING COMPRESSION UNCOMPRESSED, outcomes BLOB USING COMPRESSION UNCOMPRESSED,
    epoch BIGINT, first_seq BIGINT, time_ms BIGINT
);
CREATE TABLE state.clients (
    shard VARCHAR, client VARCHAR, floor UBIGINT, time_ms BIGINT, PRIMARY KEY (shard, client)
);
"""
"""What is appended in bulk and read by scans has no index to pay for. A shard's number is the one in its marks."""

KV_COLUMNS = """
    key BLOB PRIMARY KEY USING COMPRESSION UNCOMPRESSED,
    value BLOB USING COMPRESSION UNCOMPRESSED,
    value_bytes INTEGER NOT NULL, epoch BIGINT, seq BIGINT, expires_at BIGINT
"""
"""Asking for the length of a value would read it; so there is a column for it."""
NO_KV = """
SELECT NULL::VARCHAR AS keyspace, NULL::VARCHAR AS shard, NULL::BLOB AS key,
    NULL::VARCHAR AS key_text, NULL::BLOB AS value, NULL::VARCHAR AS value_text,
    NULL::BIGINT AS epoch, NULL::BIGINT AS seq, NULL::BIGINT AS expires_at WHERE false
"""
KV_OF_SHARD = """
SELECT {keyspace}, {shard}, key, TRY(decode(key)), value, TRY(decode(value)), epoch, seq, expires_at
FROM state.{table}
"""


def _named(column: str, names: Mapping[int, str]) -> str:
    cases = " ".join(f"WHEN {code} THEN '{name}'" for code, name in names.items())
    return f"CASE {column} {cases} END"


OP_NAME = _named("op", dict(enumerate(KIND_NAMES)))
OPLOG_VIEW = f"""
CREATE OR REPLACE VIEW memory.main.oplog AS
SELECT marks.keyspace, marks.shard, oplog.epoch, seq, make_timestamp_ms(oplog.time_ms) AS time,
    {OP_NAME} AS op, key, TRY(decode(key)) AS key_text, value, TRY(decode(value)) AS value_text,
    client, client || ':' || oplog.number AS request_id, NULL::VARCHAR AS txn_id,
    NULL::VARCHAR AS trace_id, {_named("outcome", OUTCOME_NAMES)} AS outcome
FROM state.oplog JOIN state.marks ON marks.number = oplog.shard_number
"""


def key_hash(key: str) -> str:
    """The expression for an oplog's key_hash, by which the operations of one key are found without reading all keys.

    It is DuckDB's own hash, which another version may compute otherwise: see `StateFile.is_hashed`.
    """
    return f"(hash({key}) & 4294967295)::UINTEGER"


SAMPLE_HASH = key_hash("'bus_kv'::BLOB")
