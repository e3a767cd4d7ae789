"""User SQL: what runs and how it comes back, what is refused, what is stopped, and that nothing gets out or in."""

import contextlib
import threading
from pathlib import Path
from typing import Any

import duckdb
import pytest

from bus_kv.core.machine import Sql
from nodes.sql import SqlRefused, run_query

ENDLESS = (
    "SELECT count(*) FROM kv, range(1000000) a, range(1000000) b WHERE a.range + b.range + seq = -1"
)
OPLOG_COLUMNS = (
    "keyspace, shard, epoch, seq, time, op, key, key_text, value, value_text,"
    " client, request_id, txn_id, trace_id, outcome"
)


@pytest.fixture
def instance(tmp_path: Path):
    """DuckDB as a node sets it up: the state attached, the views made, then everything locked."""
    db = duckdb.connect(
        ":memory:",
        config={"python_enable_replacements": False, "threads": 2, "memory_limit": "256MB"},
    )
    db.execute(f"ATTACH '{tmp_path / 'state.duckdb'}' AS state")
    for table in ("kv_1", "kv_2"):
        db.execute(f"CREATE TABLE state.{table} (key BLOB PRIMARY KEY, value BLOB, seq BIGINT)")
    db.execute("INSERT INTO state.kv_1 VALUES ('apple', 'fruit', 1), ('\\xFF', '\\x00', 2)")
    db.execute("INSERT INTO state.kv_2 VALUES ('zebra', 'animal', 1)")
    db.execute("CREATE TABLE state.secrets (word VARCHAR)")
    db.execute("CREATE SEQUENCE numbers")
    db.execute("CREATE VIEW kv AS " + " UNION ALL ".join(map(kv_rows, (1, 2))))
    db.execute("CREATE VIEW oplog AS " + " UNION ALL ".join(map(oplog_rows, (1, 2))))
    db.execute(f"SET temp_directory = '{tmp_path / 'spill'}'")
    db.execute("SET autoinstall_known_extensions = false")
    db.execute("SET autoload_known_extensions = false")
    db.execute("SET enable_external_access = false")
    db.execute("SET lock_configuration = true")
    yield db
    db.close()


def kv_rows(shard: int) -> str:
    return (
        f"SELECT 'default' AS keyspace, 's{shard}' AS shard, key, TRY(decode(key)) AS key_text, value,"
        " TRY(decode(value)) AS value_text, 3 AS epoch, seq, NULL::BIGINT AS expires_at"
        f" FROM state.kv_{shard}"
    )


def oplog_rows(shard: int) -> str:
    """A put for every key, a second apart."""
    values = (
        "keyspace, shard, epoch, seq, make_timestamp_ms(1767225600678 + seq * 1000), 'put', key,"
        " key_text, value, value_text, 'c1', 'c1:' || seq, NULL, NULL, 'applied'"
    )
    return f"SELECT * FROM (SELECT {values} FROM ({kv_rows(shard)})) AS o({OPLOG_COLUMNS})"


def run(
    instance: duckdb.DuckDBPyConnection,
    query: str,
    *,
    shards: tuple[str, ...] = ("s1", "s2"),
    rows_max: int = 1000,
    bytes_max: int = 1 << 20,
    timeout_ms: int = 20_000,
) -> list[Any]:
    sql = Sql(1, list(shards), query, rows_max, bytes_max, timeout_ms)
    return run_query(instance.cursor(), sql)


def failure(instance: duckdb.DuckDBPyConnection, query: str, **limits: Any) -> SqlRefused:
    with pytest.raises(SqlRefused) as caught:
        run(instance, query, **limits)
    assert "\n" not in caught.value.message
    return caught.value


# ---- what runs ----


@pytest.mark.parametrize(
    ("query", "columns", "rows"),
    [
        ("SELECT key_text, value FROM kv ORDER BY key", ["key_text", "value"],
         [["apple", b"fruit"], ["zebra", b"animal"], [None, b"\x00"]]),
        ("FROM kv SELECT count(*) AS n", ["n"], [[3]]),
        ("VALUES (1, 'a'), (2, 'b')", ["col0", "col1"], [[1, "a"], [2, "b"]]),
        ("TABLE kv ORDER BY ALL LIMIT 0", ["keyspace", "shard", "key", "key_text", "value",
         "value_text", "epoch", "seq", "expires_at"], []),
        ("WITH a AS (FROM kv), b AS (FROM a) SELECT count(*) AS n FROM b", ["n"], [[3]]),
        ("WITH kv AS (SELECT 1 AS x) SELECT * FROM kv", ["x"], [[1]]),
        ("WITH RECURSIVE r(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM r WHERE i < 3) FROM r",
         ["i"], [[1], [2], [3]]),
        ("SELECT k.shard, o.op FROM kv k JOIN oplog o USING (shard, seq) WHERE k.key = 'zebra'",
         ["shard", "op"], [["s2", "put"]]),
        ("SELECT * FROM range(2), unnest(['a'])", ["range", "unnest"], [[0, "a"], [1, "a"]]),
        ("SELECT time, request_id FROM oplog WHERE key_text = 'apple'", ["time", "request_id"],
         [["2026-01-01T00:00:01.678Z", "c1:1"]]),
        ("SELECT shard, row_number() OVER (PARTITION BY shard ORDER BY seq) AS n FROM kv"
         " QUALIFY n = 2", ["shard", "n"], [["s1", 2]]),
        ("SELECT [x * 2 FOR x IN [1, 2]] AS a, list_transform([1], lambda x: x + 1) AS b",
         ["a", "b"], [[[2, 4], [2]]]),
        ("SELECT COLUMNS('seq|epoch') FROM kv WHERE key = 'apple'", ["epoch", "seq"], [[3, 1]]),
        ("SELECT EXISTS (FROM kv WHERE seq > 1) AS a, 2 IN (SELECT seq FROM kv) AS b",
         ["a", "b"], [[True, True]]),
        ("SELECT key FROM json_each('{\"a\": 1}')", ["key"], [["a"]]),
        ("SELECT 1 AS a, 2 AS a", ["a", "a"], [[1, 2]]),
        ("SELECT ';--' AS \"π;\"\"'\" -- the end;", ["π;\"'"], [[";--"]]),
        ("/* ; */ SELECT 'é😀' AS x ; ; -- done", ["x"], [["é😀"]]),
        ("SELECT 1 AS x" + ";" * 50_000, ["x"], [[1]]),
        ("(SELECT 1 AS x) UNION ALL (SELECT 2) ORDER BY x DESC;", ["x"], [[2], [1]]),
        ("SELECT 1 AS x, x + 1 AS y, y + 1 AS z", ["x", "y", "z"], [[1, 2, 3]]),
    ],
)  # fmt: skip
def test_a_select_answers_columns_and_rows(
    instance: duckdb.DuckDBPyConnection, query: str, columns: list[str], rows: list[Any]
) -> None:
    assert run(instance, query) == [columns, rows]


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("NULL", None), ("true", True), ("1::TINYINT", 1), ("18446744073709551615", (1 << 64) - 1),
        ("18446744073709551616", "18446744073709551616"), ("sum(1)", 1), ("1.5::FLOAT", 1.5),
        ("'nan'::DOUBLE", "nan"), ("'-inf'::DOUBLE", "-inf"), ("1.50", "1.50"), ("'x'", "x"),
        ("'\\xAA'::BLOB", b"\xaa"), ("DATE '2020-02-29'", "2020-02-29"), ("TIME '10:00:01'", "10:00:01"),
        ("TIMESTAMP '2020-01-01 10:00:00.5'", "2020-01-01T10:00:00.5Z"),
        ("TIMESTAMPTZ '2020-01-01 10:00:00+02'", "2020-01-01T08:00:00Z"),
        ("TIMESTAMP 'infinity'", "infinity"), ("DATE '0044-03-15 (BC)'", "0044-03-15 (BC)"),
        ("INTERVAL '3000000 years'", "3000000 years"), ("INTERVAL '90 minutes'", "01:30:00"),
        ("'00000000-0000-4000-8000-000000000000'::UUID", "00000000-0000-4000-8000-000000000000"),
        ("[1, NULL, 3]", [1, None, 3]), ("{'a': {'b': [true]}}", {"a": {"b": [True]}}),
        ("MAP {1: 'a'}", {"1": "a"}), ("[18446744073709551616]", ["18446744073709551616"]),
        ("['nan'::DOUBLE]", ["NaN"]), ("['\\xAA'::BLOB]", ["\\xAA"]), ("NULL::INTEGER[]", None),
        ("'{\"a\": 1}'::JSON", '{"a": 1}'), ("row(1, 'a')", [1, "a"]), ("'a'::ENUM('a', 'b')", "a"),
    ],
)  # fmt: skip
def test_every_type_has_a_value_on_the_wire(
    instance: duckdb.DuckDBPyConnection, expression: str, value: Any
) -> None:
    [row] = run(instance, f"SELECT {expression} AS x")[1]
    assert row == [value]
    assert type(row[0]) is type(value)


def test_explain_and_describe_tell_about_a_query(instance: duckdb.DuckDBPyConnection) -> None:
    assert "kv_1" in run(instance, "explain SELECT key FROM kv;", shards=("s1",))[1][0][1]
    assert run(instance, "DESCRIBE kv")[1][2][:2] == ["key", "BLOB"]


@pytest.mark.parametrize(
    ("shards", "keys"),
    [(("s1",), ["apple"]), (("s2",), ["zebra"]), (("s1", "s2"), ["apple", "zebra"]),
     ((), []), (("s1') OR ('1' = '1",), [])],
)  # fmt: skip
def test_only_rows_of_the_shards_asked_for_are_seen(
    instance: duckdb.DuckDBPyConnection, shards: tuple[str, ...], keys: list[str]
) -> None:
    for view in ("kv", "oplog"):
        query = f"SELECT key_text FROM {view} WHERE key_text IS NOT NULL ORDER BY 1"
        assert run(instance, query, shards=shards)[1] == [[key] for key in keys]


# ---- what is refused ----


@pytest.mark.parametrize(
    "query",
    [
        # Statements that are no SELECT, and several at once.
        "INSERT INTO state.kv_1 VALUES ('a', 'b', 1)", "DELETE FROM kv", "UPDATE kv SET seq = 1",
        "DROP TABLE state.kv_1", "CREATE TABLE x (a INT)", "CREATE TEMP TABLE x AS SELECT 1",
        "CREATE MACRO m(a) AS a", "SET threads = 1", "RESET threads", "PRAGMA database_size",
        "CALL checkpoint()", "CHECKPOINT state", "ATTACH 'x.duckdb'", "DETACH state", "USE state",
        "COPY kv TO 'x.csv'", "EXPORT DATABASE 'x'", "INSTALL httpfs", "LOAD httpfs", "VACUUM",
        "BEGIN", "COMMIT", "ROLLBACK", "PREPARE p AS SELECT 1", "EXECUTE p", "SHOW TABLES",
        "SELECT 1; SELECT 2", "SELECT 1; DROP TABLE state.kv_1", "COMMIT; SELECT 1",
        "/* SELECT */ DELETE FROM kv", "PIVOT kv ON shard USING count(*)",
        "EXPLAIN ANALYZE SELECT 1", "EXPLAIN ANALYZE DELETE FROM kv", "EXPLAIN DELETE FROM kv",
        "EXPLAIN EXPLAIN SELECT 1", "EXPLAIN SELECT * FROM state.kv_1", "DESCRIBE state.kv_1",
        "SUMMARIZE state.kv_1", "MERGE INTO kv USING kv AS b ON true WHEN MATCHED THEN DELETE",
        # Writes inside of a SELECT.
        "WITH x AS (INSERT INTO state.kv_1 VALUES ('a', 'b', 1) RETURNING *) FROM x",
        "WITH x AS (DELETE FROM state.kv_1 RETURNING *) FROM x", "SELECT nextval('numbers')",
        "WITH x AS (UPDATE state.kv_1 SET seq = 9 RETURNING *) FROM x",
        # Relations other than kv, oplog and what the query itself names.
        "FROM main.kv", "FROM memory.main.kv", "FROM temp.kv", "FROM state.kv_1", "FROM state.main.kv_1",
        'FROM "state"."secrets"', "FROM secrets", "FROM sqlite_master", "FROM duckdb_tables",
        "FROM pg_catalog.pg_tables", "FROM information_schema.tables", "FROM 'x.csv'",
        "FROM 'https://example.com/x.parquet'", 'FROM "/etc/passwd"', "FROM tmp_path", "FROM kv2",
        "FROM kv, LATERAL (FROM secrets)", "SELECT (SELECT max(word) FROM secrets)",
        "SELECT 1 WHERE EXISTS (FROM secrets)", "FROM kv ORDER BY (SELECT 1 FROM secrets)",
        "FROM kv LIMIT (SELECT count(*) FROM secrets)", "FROM kv JOIN secrets ON true",
        "WITH secrets AS (FROM secrets) FROM secrets", "WITH a AS (FROM b), b AS (SELECT 1) FROM a",
        "FROM (WITH secrets AS (SELECT 1) FROM secrets), secrets",
        "WITH RECURSIVE secrets AS (FROM secrets UNION ALL FROM secrets) FROM secrets",
        "SELECT sum(1) OVER (ORDER BY (SELECT 1 FROM secrets)) FROM kv",
        "SELECT CASE WHEN true THEN (SELECT word FROM secrets) END", "SELECT [(SELECT word FROM secrets)]",
        "SELECT list_transform([1], lambda x: (SELECT word FROM secrets))",
        "SELECT count(*) FILTER ((SELECT true FROM secrets)) FROM kv",
        "SELECT * REPLACE ((SELECT word FROM secrets) AS key) FROM kv",
        "SELECT * FROM range((SELECT count(*) FROM secrets))", "VALUES ((SELECT word FROM secrets))",
        "SELECT seq FROM kv GROUP BY seq HAVING EXISTS (FROM secrets)", "FROM kv UNION FROM secrets",
        # Table functions.
        "FROM read_csv('x')", "FROM read_text('/etc/passwd')", "FROM read_blob('*')", "FROM glob('*')",
        "FROM query('SELECT 1')", "FROM query_table('secrets')", "FROM duckdb_settings()",
        "FROM duckdb_secrets()", "FROM checkpoint()", "FROM force_checkpoint()", "FROM pragma_version()",
        "FROM json_execute_serialized_sql('{}')", "FROM seq_scan('secrets')", "FROM repeat('a', 9)",
        "FROM parquet_scan('x')", "FROM system.main.range(1)", "FROM main.range(1)", "FROM sniff_csv('x')",
        'FROM "READ_TEXT"(\'x\')', "FROM summary((FROM kv))", "FROM enable_logging()",
        # Functions.
        "SELECT getenv('HOME')", "SELECT current_setting('temp_directory')", "SELECT getvariable('x')",
        "SELECT sleep_ms(1)", "SELECT write_log('x')", "SELECT currval('numbers')", "SELECT setseed(0)",
        "SELECT json_serialize_plan('SELECT 1')", "SELECT stats(key) FROM kv", "SELECT version()",
        "SELECT main.abs(1)", "SELECT system.main.abs(1)", "SELECT 'numbers'.nextval()",
        "SELECT pg_get_viewdef(1)", "SELECT repeat('a', 9)", "SELECT lpad('a', 9, 'b')",
        "SELECT range(9)", "SELECT list_resize([1], 9)", "SELECT levenshtein('a', 'b')",
        "SELECT * EXCLUDE (key) REPLACE (nextval('numbers') AS seq) FROM kv", "SELECT current_query()",
        "SELECT printf('%9d', 1)", "SELECT no_such_function(1)", 'SELECT "nextval"(\'numbers\')',
        # Types, parameters, and what has no place on a list.
        "SELECT NULL::INTEGER[100000]", "SELECT NULL::state.main.t", "SELECT ?", "SELECT $1",
        "SELECT $name", "FROM kv PIVOT (count(*) FOR shard IN ('s1'))", "SELECT 1\0",
        "SELECT count(DISTINCT seq) OVER () FROM kv",
    ],
)  # fmt: skip
def test_what_is_not_known_to_be_harmless_is_refused(
    instance: duckdb.DuckDBPyConnection, query: str
) -> None:
    assert failure(instance, query).code == "SQL_REFUSED"


@pytest.mark.parametrize(
    "query",
    ["", " ; ", "-- nothing", "SELEC 1", "SELECT", "SELECT 'open", "SELECT /* open", "SELECT 1)",
     "SELECT 1) AS x, (SELECT 2", "SELECT no_such_column FROM kv", "SELECT 'x'::INTEGER",
     "SELECT error('stop')", "SELECT \ud800", "SELECT abs('a', 'b')", "SELECT 1 FROM",
     "SELECT 1 INTO x", "EXPLAIN (ANALYZE) SELECT 1"],
)  # fmt: skip
def test_what_cannot_work_fails(instance: duckdb.DuckDBPyConnection, query: str) -> None:
    assert failure(instance, query).code == "SQL_FAILED"


def chained(count: int, step: str) -> str:
    return ", ".join(step.format(i=i, j=i + 1) for i in range(count))


@pytest.mark.parametrize(
    "query",
    [
        "SELECT " + "(" * 20_000 + "1" + ")" * 20_000,
        "SELECT " + "[" * 300 + "1" + "]" * 300,
        "SELECT seq AS a0, " + chained(30, "a{i} + a{i} AS a{j}") + " FROM kv",
        "WITH c0 AS (FROM kv), " + chained(30, "c{j} AS (FROM c{i}, c{i} AS x)") + " FROM c30",
        "SELECT *, * FROM " + "(SELECT *, * FROM " * 20 + "kv" + ")" * 20,
        "FROM " + ", ".join(f"kv AS k{i}" for i in range(200)),
        " UNION ALL ".join(["SELECT 1"] * 2000),
        "SELECT " + "+".join("1" * 900),
        "SELECT '" + "a" * 100_000 + "'",
    ],
    ids=["brackets", "nesting", "aliases", "ctes", "stars", "joins", "unions", "chain", "length"],
)
def test_a_query_that_planning_would_choke_on_is_refused(
    instance: duckdb.DuckDBPyConnection, query: str
) -> None:
    assert failure(instance, query).code == "SQL_REFUSED"


# ---- what is stopped ----


@pytest.mark.parametrize(
    "query",
    [
        "WITH RECURSIVE r(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM r) SELECT max(i) FROM r",
        "SELECT count(*) FROM range(1000000) a, range(1000000) b WHERE a.range + b.range = -1",
        "SELECT * FROM range(1000000000000) WHERE range < 0",
    ],
)
def test_a_query_ends_at_its_deadline(instance: duckdb.DuckDBPyConnection, query: str) -> None:
    error = failure(instance, query, timeout_ms=200)
    assert error.code == "SQL_FAILED"
    assert "longer than" in error.message


def test_a_deadline_that_passed_before_the_query_began_ends_it(
    instance: duckdb.DuckDBPyConnection,
) -> None:
    assert "longer than" in failure(instance, ENDLESS, timeout_ms=0).message


def test_a_result_beyond_its_limits_fails_and_says_what_to_do(
    instance: duckdb.DuckDBPyConnection,
) -> None:
    assert len(run(instance, "FROM range(5)", rows_max=5)[1]) == 5
    for query, limits in [
        ("FROM range(1000000000000)", {"rows_max": 5}),
        ("SELECT sha256(range::VARCHAR) FROM range(1000000000000)", {"bytes_max": 10_000}),
        ("SELECT list(range) FROM range(10000)", {"bytes_max": 10_000}),
    ]:
        error = failure(instance, query, **limits)
        assert error.code == "SQL_FAILED"
        assert "add LIMIT or aggregate" in error.message


def test_a_query_beyond_the_memory_limit_fails(instance: duckdb.DuckDBPyConnection) -> None:
    query = "SELECT length(list(a.range)) FROM range(1000000) a, range(10000) b"
    error = failure(instance, query)
    assert error.code == "SQL_FAILED"
    assert "memory" in error.message


# ---- what a query leaves behind ----


@pytest.mark.parametrize(
    "query", ["SELECT 1", "FROM range(1000000000000)", "DROP VIEW kv", "SELEC"]
)
def test_nothing_is_left_of_a_query(instance: duckdb.DuckDBPyConnection, query: str) -> None:
    cursor = instance.cursor()
    with contextlib.suppress(SqlRefused):
        run_query(cursor, Sql(1, ["s1"], query, 10, 1000, 20_000))
    with pytest.raises(duckdb.ConnectionException):
        cursor.execute("SELECT 1")
    assert [t.name for t in threading.enumerate() if t.name == "sql-deadline"] == []
    assert instance.execute("SELECT count(*) FROM kv").fetchone() == (3,)
    instance.execute("ALTER TABLE state.kv_1 ADD COLUMN extra INTEGER")
    instance.execute("FORCE CHECKPOINT state")


def test_writes_go_on_while_a_query_runs(instance: duckdb.DuckDBPyConnection) -> None:
    outcome: list[SqlRefused] = []
    query = threading.Thread(
        target=lambda: outcome.append(failure(instance, ENDLESS, timeout_ms=500))
    )
    query.start()
    writer = instance.cursor()
    writes = 0
    while query.is_alive():
        writer.execute("INSERT OR REPLACE INTO state.kv_1 VALUES ('apple', 'pie', ?)", [writes])
        writes += 1
    query.join()
    assert outcome[0].code == "SQL_FAILED"
    assert run(instance, "SELECT seq FROM kv WHERE key = 'apple'")[1] == [[writes - 1]]


def test_a_query_sees_one_state(instance: duckdb.DuckDBPyConnection) -> None:
    """A write is seen by the next query, never by half of one."""
    query = "SELECT (SELECT count(*) FROM kv) = (SELECT count(*) FROM oplog) AS same"
    stop = threading.Event()

    def write() -> None:
        writer = instance.cursor()
        while not stop.is_set():
            writer.execute("INSERT INTO state.kv_1 SELECT uuid()::VARCHAR::BLOB, 'v', 1")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert all(run(instance, query)[1] == [[True]] for _ in range(20))
    finally:
        stop.set()
        thread.join()
