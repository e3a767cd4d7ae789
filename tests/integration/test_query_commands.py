"""The commands load, sql, history and oplog, and the client's calls behind them, against a real cluster."""

import asyncio
import contextlib
import json
import secrets
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytest_asyncio

import bus_kv
from bus_kv.cli.local_cluster import LocalCluster
from bus_kv.client.client import Client
from bus_kv.errors import SqlFailed, SqlRefused
from bus_kv.runtime.connection import ConnectOptions
from tests.support.cluster import until
from tests.support.command import DEADLINE_S, Ran, run_module, start_module

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(
    nats_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LocalCluster]:
    options = ConnectOptions(servers=(nats_url,), root=f"test.query-{secrets.token_hex(4)}")
    folder = tmp_path_factory.mktemp("cluster")
    async with LocalCluster(folder, nodes=1, connection=options) as cluster:
        await cluster.wait_healthy()
        yield cluster


@pytest.fixture(scope="module")
def env(cluster: LocalCluster) -> dict[str, str]:
    connection = cluster.connection
    return {"BUS_KV_NATS": connection.servers[0], "BUS_KV_ROOT": connection.root}


class Command(Protocol):
    async def __call__(self, *arguments: str, stdin: bytes = b"") -> Ran: ...


@pytest.fixture
def command(env: dict[str, str]) -> Command:
    """Run a command on the cluster; keys are the test's own business."""

    async def run(*arguments: str, stdin: bytes = b"") -> Ran:
        return await run_module("bus_kv", *arguments, env=env, stdin=stdin)

    return run


@pytest_asyncio.fixture(loop_scope="session")
async def db(cluster: LocalCluster) -> AsyncIterator[Client]:
    async with bus_kv.connect(options=cluster.connection) as client:
        yield client


async def texts(db: Client, prefix: str) -> dict[str, str | None]:
    return {entry.key.decode(): entry.text async for entry in db.scan(prefix=prefix)}


# ---- load ----


def json_lines(prefix: str, numbers: range) -> bytes:
    rows = ({"key": f"{prefix}{i:05}", "value": str(i)} for i in numbers)
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


async def test_load_json_lines_and_again(command: Command, db: Client, tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(json_lines("jl/", range(5000)))
    assert (await command("load", str(file))).text.startswith("loaded 5,000 rows in ")
    expected = {f"jl/{i:05}": str(i) for i in range(5000)}
    assert await texts(db, "jl/") == expected
    again = await command("load", str(file), "--json")
    assert (again.code, again.err) == (0, "")
    document = again.document()
    assert (document["rows"], document["rows_before"], document["bad"]) == (5000, 0, 0)
    assert document["rows_per_s"] > 0
    assert await texts(db, "jl/") == expected
    assert [*tmp_path.iterdir()] == [file]


async def test_load_of_one_key_many_times_leaves_its_last_row(command: Command, db: Client):
    lines = (json.dumps({"key": "hot", "value": str(i)}) + "\n" for i in range(20_000))
    ran = await command("load", "-", stdin="".join(lines).encode())
    assert ran.text.startswith("loaded 20,000 rows")
    assert (await db.get("hot")).text == "19999"


async def test_load_csv_with_chosen_columns(command: Command, db: Client, tmp_path: Path):
    file = tmp_path / "people.csv"
    file.write_text("id,name,age\ncsv/1,Zoë,40\ncsv/2,Bo,50\n")
    ran = await command("load", str(file), "--key-column", "id", "--value-column", "name")
    assert ran.code == 0
    assert ran.err == "columns that are not loaded: age; see --json-value\n"
    assert await texts(db, "csv/") == {"csv/1": "Zoë", "csv/2": "Bo"}
    assert (await command("load", str(file), "--key-column", "id", "--json-value")).code == 0
    assert json.loads((await db.get("csv/1")).value or b"") == {
        "id": "csv/1", "name": "Zoë", "age": "40",
    }  # fmt: skip


async def test_load_parquet_with_bytes_and_lifetimes(command: Command, db: Client, tmp_path: Path):
    file = tmp_path / "rows.parquet"
    keys, ttls = [f"pq/{i}" for i in range(3000)], [None, 3_600_000] * 1500
    pq.write_table(pa.table({"key": keys, "value": [b"\xff"] * 3000, "ttl_ms": ttls}), file)
    assert (await command("load", str(file), "--json")).document()["rows"] == 3000
    entries = await db.get_many(keys)
    assert {entry.value for entry in entries} == {b"\xff"}
    plain, mortal = await db.get("pq/0"), await db.get("pq/1")
    assert plain.expires_at is None
    assert mortal.expires_at is not None


async def test_a_bad_row_ends_a_load_which_goes_on_there(
    command: Command, db: Client, tmp_path: Path
):
    file, note = tmp_path / "rows.jsonl", tmp_path / "note"
    good = json_lines("bad/", range(5000)), json_lines("bad/", range(5000, 6000))
    file.write_bytes(good[0] + b"nonsense\n" + good[1])
    arguments = ("load", str(file), "--progress", str(note), "--json")
    stopped = await command(*arguments)
    assert (stopped.code, stopped.err) == (1, "")
    assert stopped.document()["code"] == "BAD_ROW"
    assert "line 5001: it is not valid JSON" in stopped.document()["message"]
    loaded = len(await texts(db, "bad/"))
    assert 0 < loaded < 5000

    gone_on = (await command(*arguments, "--skip-bad")).document()
    assert gone_on["rows_before"] == loaded
    assert (gone_on["rows"], gone_on["bad"]) == (6000 - loaded, 1)
    assert len(await texts(db, "bad/")) == 6000
    assert not note.exists()


async def test_a_note_is_passed_over_by_restart_and_for_a_changed_file(
    command: Command, tmp_path: Path
):
    file = tmp_path / "rows.jsonl"
    text = json_lines("re/", range(3000))
    file.write_bytes(text + b"nonsense\n")
    assert (await command("load", str(file))).code == 1
    told = await command("load", str(file), "--skip-bad", "--restart", "--json")
    assert told.document()["rows_before"] == 0

    assert (await command("load", str(file))).code == 1
    file.write_bytes(text)
    corrected = (await command("load", str(file), "--json")).document()
    assert (corrected["rows"], corrected["rows_before"]) == (3000, 0)


async def test_load_can_be_interrupted_while_stdin_is_silent(env: dict[str, str], db: Client):
    async def written() -> bool:
        return (await db.get("pipe/01999")).found

    process = await start_module("bus_kv", "load", "-", env=env)
    assert process.stdin is not None
    process.stdin.write(json_lines("pipe/", range(2000)))
    await process.stdin.drain()
    async with asyncio.timeout(DEADLINE_S):
        await until(written)
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 1
        assert process.stderr is not None
        assert (await process.stderr.read()).startswith(b"bus-kv: INTERRUPTED: ")
        process.stdin.close()


async def test_what_load_cannot_do_is_told(command: Command, tmp_path: Path):
    table, plain, rows = tmp_path / "a.csv", tmp_path / "a.txt", tmp_path / "a.jsonl"
    table.write_text("id,name\n1,x\n")
    plain.write_text("")
    rows.write_bytes(json_lines("no/", range(9000)))
    rans = await asyncio.gather(
        command("load", str(tmp_path / "missing.csv")),
        command("load", str(table)),
        command("load", str(table), "--format", "parquet"),
        command("load", str(table), "--progress", str(tmp_path / "no" / "note")),
        command("load", str(rows), "--keyspace", "other"),
        command("load", str(plain)),
        command("load", "-", "--progress", str(tmp_path / "note")),
    )
    assert [ran.code for ran in rans] == [1, 1, 1, 1, 1, 2, 2]
    assert [ran.err.startswith("bus-kv: FILE: ") for ran in rans[:4]] == [True] * 4
    assert "--key-column" in rans[1].err
    assert rans[4].err.startswith("bus-kv: KEYSPACE_UNKNOWN: ")
    assert "--format" in rans[5].err
    assert {*tmp_path.iterdir()} == {table, plain, rows}


# ---- sql ----


async def test_sql_asks_for_data_and_operations(command: Command, db: Client):
    await db.put_many([("sql/a", "1"), ("sql/b", b"\xff"), ("sql/c", "3")])
    await db.delete("sql/c")
    query = "SELECT key, value FROM kv WHERE key_text LIKE 'sql/%' ORDER BY key"
    rows = (await db.sql(query)).rows
    assert [[*row] for row in rows] == [[b"sql/a", b"1"], [b"sql/b", b"\xff"]]
    table = await command("sql", query)
    assert [line.split() for line in table.text.splitlines()] == [
        ["key", "value"], ["sql/a", "1"], ["sql/b", "0xff"],
    ]  # fmt: skip
    counted = (
        "SELECT op, count(*) AS n FROM oplog WHERE key_text LIKE 'sql/%' GROUP BY op ORDER BY n"
    )
    as_json = await command("sql", "-", "--json", stdin=counted.encode())
    assert as_json.document() == {"columns": ["op", "n"], "rows": [["delete", 1], ["put", 3]]}


async def test_what_sql_does_not_do_has_its_code(command: Command, db: Client):
    for query, failure in (("DROP TABLE kv", SqlRefused), ("SELECT nothing", SqlFailed)):
        with pytest.raises(failure):
            await db.sql(query)
        ran = await command("sql", query)
        assert ran.code == 1
        assert ran.err.startswith(f"bus-kv: {failure.code}: ")
        assert (await command("sql", query, "--json")).document()["code"] == failure.code


# ---- history ----


async def test_history_is_what_was_written_newest_first(command: Command, db: Client):
    for text in ("one", "two"):
        await db.put("past", text)
    await db.delete("past")
    last = await db.put("past", b"\xff")
    versions = [version async for version in db.history("past")]
    assert [(v.op, v.value) for v in versions] == [
        ("put", b"\xff"), ("delete", None), ("put", b"two"), ("put", b"one"),
    ]  # fmt: skip
    assert versions[0].version == last.version
    assert [v.version for v in versions] == sorted((v.version for v in versions), reverse=True)
    assert [v.op async for v in db.history("past", limit=2)] == ["put", "delete"]
    document = (await command("history", "past", "--json")).document()
    assert document["key"] == "past"
    assert document["versions"][0]["value_b64"] == "/w=="
    table = await command("history", "past", "--limit", "2")
    assert [line.split()[2] for line in table.text.splitlines()[1:]] == ["put", "delete"]
    assert table.err == "there is more: raise --limit\n"
    assert [v async for v in db.history("never written")] == []


async def test_a_long_history_comes_in_pages(db: Client):
    await asyncio.gather(*[db.put("long", str(i)) for i in range(2500)])
    values = [version.value async for version in db.history("long")]
    assert values == [str(i).encode() for i in reversed(range(2500))]


# ---- oplog ----


async def test_oplog_lists_operations_the_newest_last(command: Command, db: Client):
    for i in range(3):
        await db.put("op'log", str(i))
    await db.delete("op'log")
    ran = await command("oplog", "--key", "op'log", "--since", "1h")
    lines = [line.split() for line in ran.text.splitlines()]
    assert lines[0] == ["time", "shard", "version", "op", "key", "value", "request_id"]
    assert [words[3] for words in lines[1:]] == ["put", "put", "put", "delete"]
    chosen = ("oplog", "--key", "op'log", "--op", "put", "--limit", "2", "--json")
    document = (await command(*chosen)).document()
    place = document["columns"].index("value")
    assert [row[place] for row in document["rows"]] == ["1", "2"]
    assert (await command("oplog", "--op", "' OR 1=1", "--json")).document()["rows"] == []


async def test_oplog_follows_until_it_is_interrupted(env: dict[str, str], db: Client):
    await db.put("follow", "before")
    process = await start_module(
        *("bus_kv", "oplog", "--key", "follow", "--follow", "--json"), env=env
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(DEADLINE_S):
            assert json.loads(await process.stdout.readline())["value"] == "before"
            for text in ("1", "2", "3"):
                await db.put("follow", text)
                assert json.loads(await process.stdout.readline())["value"] == text
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        async with asyncio.timeout(DEADLINE_S):
            out, err = await process.communicate()
    assert (process.returncode, out, err) == (0, b"", b"")


# ---- count and delete_prefix ----


async def test_count_and_delete_prefix(db: Client):
    await db.put_many([(f"many/{i:05}", "x") for i in range(25_000)])
    await db.put("many0", "stays")
    assert await db.count(prefix="many/") == 25_000
    assert await db.count("many/00010", "many/00020") == 10
    assert await db.delete_prefix("many/") == 25_000
    assert await db.count(prefix="many/") == 0
    assert await db.delete_prefix("many/") == 0
    assert (await db.get("many0")).text == "stays"
