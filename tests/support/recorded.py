"""Writers that remember what was acknowledged to them, and what a cluster's SQL and log files say about it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sqlite3
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tests.support.cluster import until

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.support.cluster import Cluster


async def sql(cluster: Cluster, query: str) -> list[list[Any]]:
    """The rows of a query, asked again as its failure allows."""
    rows: list[list[Any]] = (await cluster.until_ok("sql", query=query))["rows"]
    return rows


@dataclass(frozen=True)
class Operation:
    """A row of the oplog."""

    version: tuple[int, int]
    op: str
    key: str
    value: str | None
    request_id: str | None


async def oplog(cluster: Cluster, page_rows: int = 2000) -> list[Operation]:
    """All operations of the cluster's only shard, in order. A page of them has to fit into a message."""
    found: list[Operation] = []
    while True:
        after = found[-1].version[1] if found else 0
        rows = await sql(
            cluster,
            "SELECT epoch, seq, op, key_text, value_text, request_id FROM oplog "
            f"WHERE seq > {after} AND outcome <> 'rolled_back' ORDER BY seq, op LIMIT {page_rows}",
        )
        found += [Operation((epoch, seq), *rest) for epoch, seq, *rest in rows]
        if len(rows) < page_rows:
            return found


def assert_gapless(operations: list[Operation], told: int) -> None:
    """Every seq is there once. An epoch's opening takes one that is no operation, and what tells of a
    rollback does: there is none of these if no operation was `told` to be rolled back."""
    versions = [operation.version for operation in operations]
    for (epoch, seq), (next_epoch, next_seq) in pairwise(versions):
        openings = next_seq - seq - 1
        assert openings >= min(next_epoch - epoch, 1), (seq, next_seq)
        assert told or openings <= next_epoch - epoch, (seq, next_seq)


def entries_in_log(data: Path) -> tuple[int, int, int]:
    """How many entries the log of a node has, the first and the last seq of them."""
    with contextlib.closing(sqlite3.connect(f"file:{data / 'log.sqlite'}?mode=ro", uri=True)) as db:
        count, first, last = db.execute(
            "SELECT count(*), min(last), max(last) FROM entries"
        ).fetchone()
    return count, first, last


class Recorder:
    """Writes all the time over few keys: puts, overwrites, deletes, lifetimes. Every task has keys of its own.

    What it has written it reads back now and then. Tasks write at `levels` in turn; a write at ALL that only QUORUM
    was met for is acknowledged as well.
    """

    def __init__(
        self, cluster: Cluster, tasks: int = 6, keys: int = 8, levels: Sequence[str] = ("quorum",)
    ) -> None:
        self.done: dict[str, Operation] = {}
        """Request id -> what was acknowledged."""
        self.mortal: set[str] = set()
        """Keys that were written once, with a lifetime."""
        self._cluster, self._keys = cluster, keys
        self._stopping = False
        self._tasks = [
            asyncio.create_task(self._write(f"w{i}", levels[i % len(levels)])) for i in range(tasks)
        ]

    async def _write(self, client: str, level: str) -> None:
        choose, number, present = random.Random(client), 0, set[str]()
        while not self._stopping:
            number += 1
            key, value = f"{client}-{choose.randrange(self._keys)}", f"{number}" * 20
            chance = choose.random()
            if chance < 0.1:
                key = f"{client}-mortal-{number}"
                ttl_ms = 1 + number % 400
                await self._ask("put", f"{client}:{number}", key, value, level, ttl_ms=ttl_ms)
                self.mortal.add(key)
            elif chance < 0.3 and key in present:
                await self._ask("delete", f"{client}:{number}", key, None, level)
                present.discard(key)
            else:
                reply = await self._ask("put", f"{client}:{number}", key, value, level)
                assert reply.get("found", key in present) is (key in present), (client, number)
                present.add(key)
            if chance > 0.7:
                await self._read_back(f"{client}:{number}")

    async def _ask(
        self, op: str, request_id: str, key: str, value: str | None, level: str, **more: Any
    ) -> dict[str, Any]:
        fields = {"key": key, "request_id": request_id, "consistency": level, **more}
        if value is not None:
            fields["value"] = value
        reply: dict[str, Any] = await self._cluster.until_ok(
            op, deadline_s=30, or_code="CONSISTENCY_NOT_MET", **fields
        )
        epoch, seq = reply["version"]
        self.done[request_id] = Operation((epoch, seq), op, key, value, request_id)
        return reply

    async def _read_back(self, request_id: str) -> None:
        """Nobody else writes this key, so a read at QUORUM has to show the write that was acknowledged last."""
        written = self.done[request_id]
        entry = await self._cluster.until_ok("get", deadline_s=30, key=written.key)
        assert (entry.get("value"), entry.get("version")) == (written.value, [*written.version])

    async def until_more(self, count: int) -> None:
        """Return when this many more writes are acknowledged."""
        wanted = len(self.done) + count

        async def are_there() -> bool:
            for task in self._tasks:
                if task.done():
                    task.result()
            return len(self.done) >= wanted

        await until(are_there, deadline_s=30)

    async def stop(self) -> None:
        self._stopping = True
        async with asyncio.timeout(60):
            await asyncio.gather(*self._tasks)

    def of_key(self) -> dict[str, list[Operation]]:
        """What was acknowledged for each key, newest first."""
        found: dict[str, list[Operation]] = {}
        for operation in sorted(self.done.values(), key=lambda o: o.version, reverse=True):
            found.setdefault(operation.key, []).append(operation)
        return found

    # ---- what has to be there ----

    async def assert_values(self) -> None:
        """Each key is as its last acknowledged write left it."""
        last = {k: o[0] for k, o in self.of_key().items() if k not in self.mortal}
        keys = [*last]
        ops = [{"op": "get", "key": key} for key in keys]
        results = (await self._cluster.until_ok("batch", ops=ops))["results"]
        for key, result in zip(keys, results, strict=True):
            if last[key].op == "delete":
                assert result["found"] is False, key
            else:
                assert (tuple(result["version"]), result["value"]) == (
                    last[key].version, last[key].value,
                )  # fmt: skip

    async def assert_oplog(self) -> None:
        """Every acknowledged operation stands in the oplog once, and nothing else but the ends of lifetimes."""
        operations = await oplog(self._cluster)
        counted = "SELECT count(*) FROM oplog WHERE outcome = 'rolled_back'"
        told = sum(row[0] for row in await sql(self._cluster, counted))
        assert_gapless(operations, told)
        requested = [o for o in operations if o.op != "expire"]
        assert len({o.request_id for o in requested}) == len(requested)
        assert {o.request_id: o for o in requested} == self.done
        expired = [o.key for o in operations if o.op == "expire"]
        assert sorted(expired) == sorted(self.mortal)

    async def assert_history(self) -> None:
        """The history of each key is what was acknowledged."""
        for key, operations in self.of_key().items():
            if key not in self.mortal:
                assert await self._history(key) == operations, key

    async def _history(self, key: str) -> list[Operation]:
        found: list[Operation] = []
        cursor: dict[str, Any] = {}
        while True:
            page = await self._cluster.until_ok("history", key=key, limit=200, **cursor)
            found += [
                Operation(tuple(v["version"]), v["op"], key, v["value"], v["request_id"])
                for v in page["versions"]
            ]
            if page["cursor"] is None:
                return found
            cursor = {"cursor": page["cursor"]}

    async def until_all_expired(self) -> None:
        keys = sorted(self.mortal)

        async def are_gone() -> bool:
            ops = [{"op": "get", "key": key} for key in keys]
            results = (await self._cluster.until_ok("batch", ops=ops))["results"]
            return not any(result["found"] for result in results)

        await until(are_gone)
