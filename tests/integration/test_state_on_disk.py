"""What is acknowledged goes from the log into the state on disk, and is served from there, kill after kill."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import bus_kv
from tests.support.cluster import Cluster, cluster_on, until
from tests.support.recorded import Recorder, entries_in_log, oplog, sql

FOLD_AT_ONCE: dict[str, Any] = {
    "fold_interval_ms": 20,
    "fold_bytes": 10_000,
    "log_keep_bytes": 20_000,
    "log_bytes_max": 20_000,
}
NEVER_MS = 10**13
KILLS = 6


@pytest.fixture
async def single(nats_url: str, tmp_path: Path) -> AsyncIterator[Cluster]:
    """A node that folds and trims all the time."""
    async with cluster_on(nats_url, tmp_path, nodes=1, **FOLD_AT_ONCE) as cluster:
        yield cluster


async def put_all(cluster: Cluster, values: dict[str, str], batch: int = 100) -> None:
    items = [*values.items()]
    for at in range(0, len(items), batch):
        ops = [{"op": "put", "key": k, "value": v} for k, v in items[at : at + batch]]
        while ops:  # what is refused as OVERLOADED is sent again
            results = (await cluster.until_ok("batch", ops=ops))["results"]
            assert {r.get("code", "OVERLOADED") for r in results} == {"OVERLOADED"}
            ops = [op for op, r in zip(ops, results, strict=True) if "code" in r]


async def get_all(cluster: Cluster, keys: list[str], batch: int = 100) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for at in range(0, len(keys), batch):
        ops = [{"op": "get", "key": key} for key in keys[at : at + batch]]
        for result in (await cluster.until_ok("batch", ops=ops))["results"]:
            found[result["key"]] = result.get("value")
    return found


# ---- kills ----


@pytest.mark.parametrize("log_bytes_max", [1, 1 << 30], ids=["fold", "checkpoint"])
async def test_kill_after_kill_every_write_is_there_once(
    nats_url: str, tmp_path: Path, log_bytes_max: int
) -> None:
    """The log keeps nothing that the state or its checkpoint has: whatever a kill leaves in neither is missed."""
    knobs: dict[str, Any] = {
        "fold_interval_ms": 100, "log_keep_bytes": 1, "log_bytes_max": log_bytes_max
    }  # fmt: skip
    async with cluster_on(nats_url, tmp_path, nodes=1, **knobs) as cluster:
        recorder = Recorder(cluster)
        await _kill_again_and_again(cluster, recorder)

        async def is_trimmed() -> bool:
            return entries_in_log(cluster.data("n1"))[1] > 1

        if log_bytes_max == 1:
            await until(is_trimmed)  # while writes go on
        await recorder.stop()
        await recorder.until_all_expired()
        if log_bytes_max > 1:
            assert entries_in_log(cluster.data("n1"))[1] == 1, "no checkpoint, no trim"
        await recorder.assert_values()
        await recorder.assert_oplog()
        await recorder.assert_history()
        cluster.restart("n1")
        await recorder.assert_values()
        await recorder.assert_oplog()


async def _kill_again_and_again(cluster: Cluster, recorder: Recorder) -> None:
    """At any moment of serving, and some of starting."""
    moments = random.Random(7)
    for number in range(KILLS):
        await recorder.until_more(moments.randint(1, 200))
        cluster.restart("n1")
        if number % 3 == 2:

            async def is_starting() -> bool:
                return cluster.has_handlers("n1")

            await until(is_starting)
            cluster.restart("n1")
    await recorder.until_more(200)


# ---- the log is trimmed ----


@pytest.mark.parametrize("runs_max", [50_000, 1], ids=["from memory", "from disk"])
async def test_a_repeat_is_known_when_its_entry_has_left_the_log(
    nats_url: str, tmp_path: Path, runs_max: int
) -> None:
    knobs: dict[str, Any] = {**FOLD_AT_ONCE, "dedup_runs_max": runs_max}
    async with cluster_on(nats_url, tmp_path, nodes=1, **knobs) as cluster:
        put: dict[str, Any] = {"key": "a", "value": "1", "request_id": "me:5"}
        first = await cluster.bus.ok("put", **put)
        ops = [{"op": "put", "key": f"b{i}", "value": "1"} for i in range(3)]
        batch: dict[str, Any] = {"ops": [*ops, {"op": "delete", "key": "a"}], "request_id": "me:3"}
        first_batch = await cluster.bus.ok("batch", **batch)
        values = {f"key-{i:04}": f"{i}" * 100 for i in range(1000)}
        await put_all(cluster, values, batch=20)
        await _until_trimmed(cluster, first_batch["results"][-1]["version"][1])
        before = await oplog(cluster)
        assert await cluster.bus.ok("put", **put) == first
        cluster.restart("n1")
        assert await cluster.until_ok("put", **put) == first
        assert await cluster.bus.ok("batch", **batch) == first_batch
        assert (await cluster.bus.ok("get", key="a"))["found"] is False
        assert await oplog(cluster) == before
        assert await get_all(cluster, [*values]) == values


async def _until_trimmed(cluster: Cluster, seq: int) -> None:
    """Return when the log has forgotten an entry. It forgets when it writes."""

    async def is_gone() -> bool:
        await cluster.bus.ok("put", key="x", value="1")
        return entries_in_log(cluster.data("n1"))[1] > seq

    await until(is_gone)


async def test_the_log_stays_small_and_a_restart_has_everything(single: Cluster) -> None:
    values: dict[str, str] = {}
    for part in range(5):
        more = {f"{part}-{i:04}": f"{part}-{i}" * 20 for i in range(1000)}
        await put_all(single, more, batch=10)
        values |= more
        await _until_trimmed(single, part * 1000)
    # A hundred and more entries per part went through it.
    assert entries_in_log(single.data("n1"))[0] < 100
    single.restart("n1")
    assert await get_all(single, [*values]) == values
    assert (await single.bus.ok("scan", prefix="3-", count_only=True))["count"] == 1000


# ---- more data than memory ----


LITTLE_MEMORY = (f"--knob=cache_bytes={1 << 20}", "--knob=duckdb_memory_mb=64")
GROWTH_BYTES_MAX = 128 << 20
"""What DuckDB may take, and as much again for requests under way and what the allocator keeps."""


async def test_data_larger_than_the_cache_is_read_back(nats_url: str, tmp_path: Path) -> None:
    chance = random.Random(3)
    values = {f"key-{i:04}": chance.randbytes(20_000) for i in range(5000)}
    async with (
        cluster_on(nats_url, tmp_path, nodes=1, fold_interval_ms=20) as cluster,
        bus_kv.connect(nats_url, root=cluster.root) as db,
    ):
        at_start = _peak_bytes(cluster, "n1")
        await db.put_many(dict.fromkeys(values, b"former"))
        for at in range(0, len(values), 500):
            await db.put_many([*values.items()][at : at + 500])
            await db.count()  # waits until all of it is on disk
        await cluster.stop("n1")
        cluster.start_node("n1", *LITTLE_MEMORY)
        await cluster.wait_healthy()
        await _assert_all_read(cluster, db, values, chance)
        assert _peak_bytes(cluster, "n1") < at_start + GROWTH_BYTES_MAX


async def _assert_all_read(
    cluster: Cluster, db: bus_kv.Client, values: dict[str, bytes], chance: random.Random
) -> None:
    keys = [*values]
    chance.shuffle(keys)
    for at in (0, 2500):
        await _refused(cluster, keys[at : at + 2500])
    absent = [f"{key}x" for key in keys[:500]]
    for some in (keys[:2000], keys[2000:4000], keys[4000:], absent):
        entries = await db.get_many(some)
        assert [entry.value for entry in entries] == [values.get(key) for key in some]
    for at in range(0, 1000, 100):
        some = keys[at : at + 100]
        entries = await asyncio.gather(*map(db.get, some))
        assert [entry.value for entry in entries] == [values[key] for key in some]
    await asyncio.gather(*[_read_some(cluster, values, chance) for _ in range(8)])
    found = {entry.key.decode(): entry.value async for entry in db.scan(page_size=20)}
    assert found == values


async def _refused(cluster: Cluster, keys: list[str]) -> None:
    """Writes that depend on what is on disk, and change nothing."""
    ops = [{"op": "put", "key": key, "value": "", "if_absent": True} for key in keys]
    results = (await cluster.bus.ok("batch", ops=ops))["results"]
    assert {result.get("code") for result in results} == {"PRECONDITION_FAILED"}


async def _read_some(cluster: Cluster, values: dict[str, bytes], chance: random.Random) -> None:
    """A batch of gets for more than a reply takes: some are answered, the others told to ask for fewer."""
    keys = chance.sample([*values], 3000)
    ops: list[dict[str, Any]] = [{"op": "get", "key": key} for key in keys]

    async def are_answered() -> bool:
        results = (await cluster.bus.ok("batch", codec="cbor", ops=ops))["results"]
        answered = {key: r["value"] for key, r in zip(keys, results, strict=True) if "value" in r}
        assert answered == {key: values[key] for key in answered}
        failures = {result["code"] for result in results if "code" in result}
        assert failures <= {"VALUE_TOO_LARGE", "SHARD_UNAVAILABLE"}
        return bool(answered)

    await until(are_answered)


def _peak_bytes(cluster: Cluster, name: str) -> int:
    """The most memory that the process has had."""
    status = Path(f"/proc/{cluster._processes[name].pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


# ---- ranges ----


class Model:
    """What a scan has to return."""

    def __init__(self) -> None:
        self.items: dict[str, str] = {}

    def page(self, fields: dict[str, Any]) -> list[tuple[str, str | None]]:
        start, end, prefix = fields.get("start", ""), fields.get("end"), fields.get("prefix", "")
        keys = [
            key for key in sorted(self.items, reverse=fields.get("reverse", False))
            if key >= start and (end is None or key < end) and key.startswith(prefix)
        ]  # fmt: skip
        return [(key, None if fields.get("keys_only") else self.items[key]) for key in keys]


SCANS: list[dict[str, Any]] = [
    {}, {"limit": 1000}, {"limit": 7}, {"reverse": True, "limit": 13}, {"keys_only": True},
    {"prefix": "b/", "limit": 10_000}, {"prefix": "b/", "reverse": True, "limit": 50},
    {"start": "a/0100", "end": "c/0100"}, {"start": "a/0100", "end": "c/0100", "reverse": True},
    {"start": "b", "prefix": "b/01", "keys_only": True, "limit": 3}, {"prefix": "nothing"},
    {"start": "c", "end": "b"},
]  # fmt: skip


async def test_scans_see_memory_and_disk_as_one(nats_url: str, tmp_path: Path) -> None:
    async with cluster_on(nats_url, tmp_path, nodes=1, **FOLD_AT_ONCE) as cluster:
        model = Model()
        model.items = {f"{'abc'[i % 3]}/{i:04}": f"old-{i}" * 20 for i in range(900)}
        await put_all(cluster, model.items)
        assert await sql(cluster, "SELECT count(*) FROM kv") == [[900]]
        cluster.kill("n1")
        cluster.start_node(
            "n1", f"--knob=fold_interval_ms={NEVER_MS}", "--knob=fold_bytes=100000000"
        )
        await cluster.until_ok("get", key="a/0000")
        await _change(cluster, model)
        for fields in SCANS:
            assert await _scan(cluster, fields) == model.page(fields), fields
        for fields in SCANS:
            wanted = {k: v for k, v in fields.items() if k not in ("limit", "reverse", "keys_only")}
            reply = await cluster.bus.ok("scan", count_only=True, **wanted)
            assert reply["count"] == len(model.page(wanted)), wanted


async def _change(cluster: Cluster, model: Model) -> None:
    """New keys between the old ones, others overwritten, others deleted: none of it on disk."""
    ops: list[dict[str, Any]] = []
    for i in range(0, 900, 7):
        ops.append({"op": "put", "key": f"{'abc'[i % 3]}/{i:04}+", "value": f"new-{i}"})
        ops.append({"op": "put", "key": f"{'abc'[i % 3]}/{i:04}", "value": f"over-{i}"})
    ops += [{"op": "delete", "key": f"{'abc'[i % 3]}/{i:04}"} for i in range(0, 900, 5)]
    await cluster.bus.ok("batch", ops=ops)
    for op in ops:
        if op["op"] == "put":
            model.items[op["key"]] = op["value"]
        else:
            model.items.pop(op["key"], None)


async def _scan(cluster: Cluster, fields: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Key and value of each item, in all pages."""
    found: list[tuple[str, str | None]] = []
    cursor: dict[str, Any] = {}
    while True:
        page = await cluster.bus.ok("scan", **{**fields, **cursor})
        assert len(page["items"]) <= fields.get("limit", 100)
        found += [(item["key"], item.get("value")) for item in page["items"]]
        if page["cursor"] is None:
            return found
        cursor = {"cursor": page["cursor"]}


async def test_a_prefix_is_deleted_and_a_repeat_deletes_nothing_more(single: Cluster) -> None:
    values = {f"p/{i:04}": "v" for i in range(2500)}
    await put_all(single, {**values, "o": "stays", "p0": "stays"}, batch=500)
    fields: dict[str, Any] = {"ops": [{"op": "delete_prefix", "prefix": "p/"}]}
    first = await single.bus.ok("batch", **fields, request_id="me:1")
    (result,) = first["results"]
    assert 0 < result["deleted"] < 2500
    assert result["more"] is True
    single.restart("n1")
    before = await oplog(single)
    assert await single.until_ok("batch", **fields, request_id="me:1") == first
    assert await oplog(single) == before
    number, deleted = 1, result["deleted"]
    while result["more"]:
        number += 1
        (result,) = (await single.bus.ok("batch", **fields, request_id=f"me:{number}"))["results"]
        deleted += result["deleted"]
    assert deleted == 2500
    assert (await single.bus.ok("scan", count_only=True))["count"] == 2
    gone = [o.key for o in await oplog(single) if o.op == "delete"]
    assert sorted(gone) == sorted(values)


async def test_a_repeat_deletes_no_keys_that_came_later(single: Cluster) -> None:
    fields: dict[str, Any] = {
        "ops": [{"op": "delete_prefix", "prefix": "p/"}],
        "request_id": "me:1",
    }
    await put_all(single, {f"p/{i:04}": "old" for i in range(300)})
    first = await single.bus.ok("batch", **fields)
    assert first["results"][0]["deleted"] == 300
    assert await single.bus.ok("batch", **fields) == first
    values = {f"p/{i:04}": "new" for i in range(900)}
    await put_all(single, values)
    for restarted in (False, True):
        if restarted:
            single.restart("n1")
        (result,) = (await single.until_ok("batch", **fields))["results"]
        assert result == {**first["results"][0], "more": True}
    assert await get_all(single, [*values]) == values


# ---- lifetimes ----


async def test_lifetimes_end_after_a_restart(single: Cluster) -> None:
    ops: list[dict[str, Any]] = [
        {"op": "put", "key": f"short-{i}", "value": "1", "ttl_ms": 1500 + i} for i in range(300)
    ]
    ops += [{"op": "put", "key": f"long-{i}", "value": "1", "ttl_ms": 600_000} for i in range(300)]
    await single.bus.ok("batch", ops=ops)
    # The one lives on: it was overwritten before its lifetime ended.
    await single.bus.ok("put", key="short-7", value="2")
    assert await sql(single, "SELECT count(*) FROM kv") == [[600]]
    single.restart("n1")

    async def are_gone() -> bool:
        page = await single.until_ok("scan", prefix="short-", limit=400)
        return [item["key"] for item in page["items"]] == ["short-7"]

    await until(are_gone)
    expired = [o.key for o in await oplog(single) if o.op == "expire"]
    assert sorted(expired) == sorted(f"short-{i}" for i in range(300) if i != 7)
    assert (await single.bus.ok("scan", prefix="long-", count_only=True))["count"] == 300
    single.restart("n1")
    assert (await single.until_ok("get", key="short-8"))["found"] is False
    assert (await single.bus.ok("get", key="long-8"))["found"] is True
