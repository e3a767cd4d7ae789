"""A node that was away for longer than the logs reach back comes in by a snapshot, and can be the primary then."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

from tests.support.cluster import cluster_on, until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.cluster import Cluster

COUNT = 2000


async def test_a_node_that_missed_more_than_the_log_has_takes_a_snapshot(
    nats_url: str, tmp_path: Path
) -> None:
    async with cluster_on(
        nats_url, tmp_path, nodes=3, log_keep_bytes=1, log_bytes_max=1, fold_interval_ms=20,
        heartbeat_interval_s=0.2,
    ) as cluster:  # fmt: skip
        bus = cluster.bus
        await bus.ok("put", key="before", value="1", request_id="c:1")
        cluster.kill("n3")

        async def is_out() -> bool:
            return (await cluster.shard())["members"] == ["n1", "n2"]

        await until(is_out, 30)
        for first in range(0, COUNT, 500):
            puts = [
                {"op": "put", "key": f"k{i:05}", "value": f"v{i}"}
                for i in range(first, first + 500)
            ]
            await cluster.until_ok("batch", ops=puts)
        await cluster.until_ok("delete", key="before", request_id="c:2")
        cluster.restart("n3")

        async def is_in() -> bool:
            return "n3" in (await cluster.shard())["members"]

        await until(is_in, 60)
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


def log_begins_at(cluster: Cluster, node: str) -> int:
    with closing(sqlite3.connect(cluster.data(node) / "log.sqlite")) as db:
        return int(db.execute("SELECT base_seq FROM replicas WHERE shard = 's1'").fetchone()[0])
