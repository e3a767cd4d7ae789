"""A node that was away for longer than the logs reach back comes in by a snapshot, and can be the primary then."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

from tests.support.cluster import cluster_on, until
from tests.support.recorded import entries_in_log

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.cluster import Cluster

COUNT = 2000


TRIMMED: dict[str, Any] = {
    "log_keep_bytes": 1,
    "log_bytes_max": 1,
    "fold_interval_ms": 20,
    "heartbeat_interval_s": 0.2,
}
"""Logs reach back no further than the fold."""


async def test_a_node_that_missed_more_than_the_log_has_takes_a_snapshot(
    nats_url: str, tmp_path: Path
) -> None:
    async with cluster_on(nats_url, tmp_path, nodes=3, **TRIMMED) as cluster:
        bus = cluster.bus
        await bus.ok("put", key="before", value="1", request_id="c:1")
        await leave_behind(cluster, "n3")
        await cluster.until_ok("delete", key="before", request_id="c:2")
        cluster.restart("n3")
        await until(lambda: is_member(cluster, "n3"), 60)
        await cluster.until_ok("admin.transfer", shard="s1", to="n3")
        assert await cluster.primary() == "n3"
        await cluster.until_ok("put", key="after", value="2")
        count = await cluster.until_ok("scan", count_only=True)
        assert count["count"] == COUNT + 1
        page = await cluster.until_ok("scan", start="k01990", end="k01995")
        assert [item["value"] for item in page["items"]] == [f"v{i}" for i in range(1990, 1995)]
        history = await cluster.until_ok("history", key="before")
        assert [version["op"] for version in history["versions"]] == ["delete", "put"]
        repeat = await cluster.until_ok("delete", key="before", request_id="c:2")
        assert repeat["found"] is True, "the repeat has the result of the first"
        assert log_begins_at(cluster, "n3") > COUNT // 2, "its log begins where the snapshot ended"


async def test_a_snapshot_comes_to_its_end_while_more_is_written_than_the_log_keeps(
    nats_url: str, tmp_path: Path
) -> None:
    slow = {**TRIMMED, "snapshot_bytes_per_s": 100_000}
    async with cluster_on(nats_url, tmp_path, nodes=3, **slow) as cluster:
        await leave_behind(cluster, "n3")
        written = 0

        async def write() -> None:
            nonlocal written
            while True:
                await cluster.until_ok("put", key="live", value=f"{written + 1}")
                written += 1

        cluster.restart("n3")
        writing = asyncio.create_task(write())
        try:
            await until(lambda: is_member(cluster, "n3"), 60)
        finally:
            writing.cancel()
        assert log_begins_at(cluster, "n3") > 1, "it took a snapshot"
        assert written > 10
        await cluster.until_ok("admin.transfer", shard="s1", to="n3")
        entry = await cluster.until_ok("get", key="live")
        assert int(entry["value"]) >= written
        count = await cluster.until_ok("scan", count_only=True)
        assert count["count"] == COUNT + 1


async def leave_behind(cluster: Cluster, node: str) -> None:
    """Kill a backup and write more than the logs of the others keep."""
    cluster.kill(node)

    async def is_out() -> bool:
        return not await is_member(cluster, node)

    await until(is_out, 30)
    for first in range(0, COUNT, 20):
        puts = [
            {"op": "put", "key": f"k{i:05}", "value": f"v{i}"} for i in range(first, first + 20)
        ]
        await cluster.until_ok("batch", ops=puts)

    async def is_trimmed() -> bool:
        for _ in range(20):  # logs forget when they write
            await cluster.until_ok("put", key="k00000", value="v0")
        others = [other for other in ("n1", "n2", "n3") if other != node]
        return all(entries_in_log(cluster.data(other))[1] > COUNT // 2 for other in others)

    await until(is_trimmed)


async def is_member(cluster: Cluster, node: str) -> bool:
    return node in (await cluster.shard())["members"]


def log_begins_at(cluster: Cluster, node: str) -> int:
    with closing(sqlite3.connect(cluster.data(node) / "log.sqlite")) as db:
        return int(db.execute("SELECT base_seq FROM replicas WHERE shard = 's1'").fetchone()[0])
