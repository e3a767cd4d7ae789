"""The tables of `state.duckdb`, and the views that users query."""

SCHEMA = """
CREATE TABLE state.meta (name VARCHAR, value VARCHAR);
CREATE TABLE state.marks (
    shard VARCHAR, number INTEGER, keyspace VARCHAR,
    epoch BIGINT, last BIGINT, time_ms BIGINT, keys BIGINT, data_bytes BIGINT, lineage VARCHAR
);
CREATE TABLE state.oplog (
    shard VARCHAR, epoch BIGINT, seq BIGINT, time_ms BIGINT, op VARCHAR, key BLOB,
    key_hash UINTEGER, value BLOB, client VARCHAR, number UBIGINT, request_index UINTEGER,
    txn_id VARCHAR, trace_id VARCHAR, outcome VARCHAR
);
CREATE TABLE state.oplog_parts (shard VARCHAR, last BIGINT, time_ms BIGINT, bytes BIGINT);
CREATE TABLE state.requests (
    shard VARCHAR, client VARCHAR, first UBIGINT, last UBIGINT, numbers BLOB, indexes BLOB,
    outcomes BLOB, epoch BIGINT, first_seq BIGINT, time_ms BIGINT
);
CREATE TABLE state.clients (
    shard VARCHAR, client VARCHAR, floor UBIGINT, time_ms BIGINT, PRIMARY KEY (shard, client)
);
"""
"""What is appended in bulk and read by scans has no index to pay for."""

KV_COLUMNS = """
    key BLOB PRIMARY KEY, value BLOB, value_bytes INTEGER NOT NULL, epoch BIGINT, seq BIGINT,
    expires_at BIGINT
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
OPLOG_VIEW = """
CREATE OR REPLACE VIEW memory.main.oplog AS
SELECT marks.keyspace, oplog.shard, oplog.epoch, seq, make_timestamp_ms(oplog.time_ms) AS time, op,
    key, TRY(decode(key)) AS key_text, value, TRY(decode(value)) AS value_text, client,
    client || ':' || oplog.number AS request_id, txn_id, trace_id, outcome
FROM state.oplog JOIN state.marks ON marks.shard = oplog.shard
"""


def key_hash(key: str) -> str:
    """The expression for an oplog's key_hash, by which the operations of one key are found without reading all keys.

    It is DuckDB's own hash, which another version may compute otherwise: see `StateFile.is_hashed`.
    """
    return f"(hash({key}) & 4294967295)::UINTEGER"


SAMPLE_HASH = key_hash("'bus_kv'::BLOB")
