"""What the replicas of shard s1 have on their disks, and what they say about themselves."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from typing import TYPE_CHECKING, Any, TypeAlias

from bus_kv.protocol.batch import APPLIED
from bus_kv.protocol.entry import applied_count, decode_entry
from nodes.log import LOG_NAME
from tests.support.cluster import until
from tests.support.state import State

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from bus_kv.protocol.entry import Entry
    from tests.support.cluster import Cluster
    from tests.support.recorded import Operation, Recorder
    from tests.support.state import Contents

NODES = ("n1", "n2", "n3")
LEVELS = ("quorum", "quorum", "all")
"""At which writers write, in turn."""
QUICK: dict[str, Any] = {"heartbeat_interval_s": 0.2}
"""A dead node is noticed within two seconds."""
NEVER_NOTICED: dict[str, Any] = {"heartbeat_misses_max": 1000, "probes_max": 1_000_000}
"""What happens to a dead node happens because an operator says so."""

Row: TypeAlias = tuple[Any, ...]


def _rows(data: Path, query: str) -> list[Row]:
    """Rows of a node's log, of a running process or not."""
    with contextlib.closing(sqlite3.connect(f"file:{data / LOG_NAME}?mode=ro", uri=True)) as db:
        return db.execute(query).fetchall()


def log_of(cluster: Cluster, node: str) -> list[Row]:
    """(last, epoch, checksum, body) of every entry, in order."""
    query = "SELECT last, epoch, checksum, body FROM entries WHERE shard = 's1' ORDER BY last"
    return _rows(cluster.data(node), query)


def cuts_of(cluster: Cluster, node: str) -> list[Entry]:
    """Entries that were taken out of a node's log because another log was chosen."""
    return [decode_entry(body) for (body,) in _rows(cluster.data(node), "SELECT body FROM cuts")]


async def until_logs_equal(cluster: Cluster, *nodes: str) -> list[Row]:
    """Return when these nodes have the same log, byte by byte: that log. Nobody must be writing."""
    logs: list[list[Row]] = []

    async def are_equal() -> bool:
        logs[:] = [log_of(cluster, node) for node in nodes]
        return all(log == logs[0] for log in logs)

    await until(are_equal)
    return logs[0]


def requests_in(entries: Iterable[Entry]) -> Iterator[tuple[str, tuple[int, int], bytes]]:
    """(request id, version, key) of every operation that took effect."""
    for entry in entries:
        seq = entry.first
        for outcomes, batch in entry.decoded():
            for i, outcome in enumerate(outcomes):
                if outcome in APPLIED and batch.client:
                    number, _ = batch.identity(i)
                    at = seq + applied_count(outcomes[:i])
                    yield f"{batch.client}:{number}", (entry.epoch, at), batch.keys[i]
            seq += applied_count(outcomes)


def versions_in(log: list[Row]) -> dict[str, list[tuple[int, int]]]:
    """Request id -> where it stands in a log: once, if it is a request for one operation."""
    found: dict[str, list[tuple[int, int]]] = {}
    for request_id, version, _ in requests_in(decode_entry(body) for *_, body in log):
        found.setdefault(request_id, []).append(version)
    return found


def assert_once_in_log(log: list[Row], done: dict[str, Operation]) -> None:
    """Every acknowledged request stands in the log once, where its receipt says."""
    found = versions_in(log)
    wrong = {id: found.get(id) for id, o in done.items() if found.get(id) != [o.version]}
    assert not wrong


async def heartbeats(cluster: Cluster, *nodes: str) -> dict[str, dict[str, Any]]:
    """The next heartbeat of each node."""
    found: dict[str, dict[str, Any]] = {}
    for node in nodes:
        beats = await cluster.bus.client.subscribe(f"{cluster.root}.event.heartbeat.{node}")
        found[node] = json.loads((await beats.next_msg(10)).data)
        await beats.unsubscribe()
    return found


async def until_folded(cluster: Cluster, *nodes: str) -> None:
    """Return when these nodes follow one epoch with the same log, and the state of each has all of it. Nobody must be
    writing."""

    async def is_folded() -> bool:
        beats = await heartbeats(cluster, *nodes)
        reports = [beat["shards"][0] for beat in beats.values() if beat["shards"]]
        ends = {(r["token"], *r["last"]) for r in reports}
        return len(reports) == len(nodes) and len(ends) == 1 and all(map(_is_folded, reports))

    await until(is_folded)


def _is_folded(report: dict[str, Any]) -> bool:
    follows = report["status"] in ("active", "following")
    return follows and report["folded"] == report["commit_seq"] == report["last"][1]


def state_of(cluster: Cluster, node: str) -> Contents:
    """What the state of a node that has ended holds."""
    [(incarnation,)] = _rows(
        cluster.data(node), "SELECT value FROM meta WHERE name = 'incarnation'"
    )
    state = State(cluster.data(node), incarnation=incarnation)
    try:
        return state.contents("s1")
    finally:
        state.store.close()


async def assert_kept(cluster: Cluster, recorder: Recorder, *members: str) -> None:
    """Every acknowledged write is there once: in what is read, in the oplog, in the log of each of these members."""
    await recorder.stop()
    await recorder.until_all_expired()
    await recorder.assert_values()
    await recorder.assert_oplog()
    assert_once_in_log(await until_logs_equal(cluster, *members), recorder.done)
