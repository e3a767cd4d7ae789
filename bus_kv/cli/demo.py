"""`python -m bus_kv.cli.demo`: the main job on real data, in a cluster of its own, and checked.

Loads the Unicode character database, reads all of it back, scans a block, overwrites and deletes,
then kills the primary in the middle of a stream of writes and proves that nothing acknowledged is
lost. At last it asks two questions in SQL and tells the history of a key. What the cluster must
hold is kept beside it in a dict; every difference ends the demo with exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import unicodedata
from bisect import bisect_left
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import bus_kv
from bus_kv.cli.command import be_quiet
from bus_kv.cli.local_cluster import ClusterError, LocalCluster
from bus_kv.cli.output import print_table
from bus_kv.cli.unicode_data import key_of, named_characters, record
from bus_kv.errors import BusKVError
from bus_kv.runtime.nats_bus import BusError
from bus_kv.runtime.nats_server import NatsServerError
from bus_kv.runtime.process import FAILED, OK

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from bus_kv.client.client import Client

EMOTICONS = range(0x1F600, 0x1F650)
"""The block of the smileys."""
_TASKS = 256
_PART = 1000
_PARTS_IN_FLIGHT = 8
_SINGLE_PUTS_MAX = 30_000
"""So many are put one by one, by many tasks; the rest with put_many."""
_DELETED_MAX = 2000
_STREAM_WRITERS = 64
_STREAM_WRITES_EACH = 60
_KILL_AFTER_WRITES = 1000
"""Acknowledged writes of the stream after which the primary is killed."""
_STREAM_DEADLINE_S = 60.0
_LONG_S = 0.25
"""A write that took longer had to wait."""
_DEAD_S_MAX = 1.5
"""The killed primary stays dead until another one serves, but not longer than this."""


_CHARACTERS_MIN = 5000
"""Fewer would make its steps meet in the same keys."""


class Mismatch(Exception):
    """The cluster does not hold what it must."""


@dataclass
class Demo:
    """A connection, what the cluster must hold, and the account of what was done."""

    db: Client
    cluster: LocalCluster
    code_points: list[int]
    expected: dict[bytes, bytes] = field(default_factory=dict)
    account: list[tuple[str, int, float]] = field(default_factory=list)
    """(what, operations, seconds)."""

    async def timed(self, what: str, count: int, work: Awaitable[Any]) -> Any:
        started = perf_counter()
        result = await work
        seconds = perf_counter() - started
        self.account.append((what, count, seconds))
        say(f"  {what}: {count:,} in {seconds:.2f} s")
        return result


def say(text: str = "") -> None:
    print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bus_kv.cli.demo", description=__doc__)
    parser.add_argument("--characters", type=int, help="how many, around the smileys")
    parser.add_argument("--nodes", type=int, default=3, help="nodes of its cluster")
    arguments = parser.parse_args()
    if arguments.characters is not None and arguments.characters < _CHARACTERS_MIN:
        parser.error(f"--characters must be at least {_CHARACTERS_MIN}")
    import uvloop

    be_quiet()
    try:
        uvloop.run(_demo(arguments.characters, arguments.nodes))
    except Mismatch as error:
        return _fail(f"MISMATCH: {error}")
    except BusKVError as error:
        return _fail(f"{error.code}: {error.message}")
    except (ClusterError, NatsServerError, BusError) as error:
        return _fail(f"CLUSTER: {error}")
    except (KeyboardInterrupt, asyncio.CancelledError):
        return _fail("INTERRUPTED: stopped before it was done")
    return OK


def _fail(reason: str) -> int:
    print(f"bus-kv: {reason}", file=sys.stderr, flush=True)
    return FAILED


async def _demo(characters: int | None, nodes: int) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with tempfile.TemporaryDirectory(prefix="bus_kv-demo-", ignore_cleanup_errors=True) as name:
        say(f"A cluster: nats-server, a coordinator and {nodes} nodes, each a process of its own")
        async with LocalCluster(Path(name), nodes=nodes) as cluster:
            await cluster.wait_healthy()
            say(f"  healthy, at {cluster.connection.addresses}")
            async with bus_kv.connect(options=cluster.connection) as db:
                demo = Demo(db, cluster, _choose(characters))
                await _main_job(demo)
                _print_account(demo)


def _choose(characters: int | None) -> list[int]:
    """All named characters, or so many with the smileys in the middle."""
    code_points = named_characters()
    if characters is None:
        return code_points
    first = max(bisect_left(code_points, EMOTICONS.start) - characters // 2, 0)
    return code_points[first : first + characters]


async def _main_job(demo: Demo) -> None:
    await _load(demo)
    await _compare(demo, "read back and compared")
    await _scan(demo)
    await _change(demo)
    await _crash(demo)
    await _compare(demo, "read back and compared at the end")
    await _ask_in_sql(demo)
    await _history(demo)
    say("\nEverything is as it must be: nothing lost, nothing changed, nothing left over.")


# ---- the steps ----


async def _load(demo: Demo) -> None:
    version, count = unicodedata.unidata_version, len(demo.code_points)
    say(f"\nThe Unicode character database {version}: {count:,} named characters, as JSON records")
    demo.expected = {key_of(c): record(c) for c in demo.code_points}
    items = [*demo.expected.items()]
    single = items[: min(_SINGLE_PUTS_MAX, len(items) // 2)]
    await demo.timed("put one by one, from 256 tasks", len(single), _put_singly(demo.db, single))
    rest = items[len(single) :]
    await demo.timed("put_many", len(rest), _in_parts(rest, demo.db.put_many))


async def _put_singly(db: Client, items: list[tuple[bytes, bytes]]) -> None:
    """The client gathers calls that are made at the same time into one message."""
    left = iter(items)

    async def put_some() -> None:
        for key, value in left:
            await db.put(key, value)

    async with asyncio.TaskGroup() as group:
        for _ in range(_TASKS):
            group.create_task(put_some())


async def _in_parts(items: Sequence[Any], work: Callable[[Sequence[Any]], Awaitable[Any]]) -> None:
    """`work` on parts of the items, some of them at the same time."""
    parts = iter([items[i : i + _PART] for i in range(0, len(items), _PART)])

    async def work_some() -> None:
        for part in parts:
            await work(part)

    async with asyncio.TaskGroup() as group:
        for _ in range(_PARTS_IN_FLIGHT):
            group.create_task(work_some())


async def _compare(demo: Demo, what: str) -> None:
    """Every key that was ever written, one by one, and then that a scan finds no other."""
    keys = [key_of(c) for c in demo.code_points]

    async def compare(part: Sequence[bytes]) -> None:
        for entry in await demo.db.get_many(part):
            _check(entry.key, entry.value, demo.expected.get(entry.key))

    say()
    await demo.timed(what, len(keys), _in_parts(keys, compare))
    found = await demo.timed("scanned", len(demo.expected), _scanned_keys(demo.db))
    if found != sorted(demo.expected):
        raise Mismatch(f"a scan finds {len(found):,} keys, not {len(demo.expected):,}")


async def _scanned_keys(db: Client) -> list[bytes]:
    return [entry.key async for entry in db.scan(keys_only=True)]


def _check(key: bytes, value: bytes | None, wanted: bytes | None) -> None:
    if value != wanted:
        raise Mismatch(f"{key.decode()} holds {value!r} and should hold {wanted!r}")


async def _scan(demo: Demo) -> None:
    say("\nThe block of the smileys, by a range scan")
    start, end = key_of(EMOTICONS.start), key_of(EMOTICONS.stop)
    entries = [entry async for entry in demo.db.scan(start, end)]
    wanted = [item for item in demo.expected.items() if start <= item[0] < end]
    if [(entry.key, entry.value) for entry in entries] != wanted:
        raise Mismatch(f"the scan finds {len(entries)} characters, not {len(wanted)}")
    say("  " + "".join(chr(int(entry.key[2:], 16)) for entry in entries))


async def _change(demo: Demo) -> None:
    say("\nChanges")
    smileys = [c for c in demo.code_points if c in EMOTICONS]
    changed = [(key_of(c), record(c, note="overwritten")) for c in smileys]
    await demo.timed("overwritten", len(changed), demo.db.put_many(changed))
    demo.expected.update(changed)
    doomed = [key_of(c) for c in demo.code_points[:_DELETED_MAX] if c not in EMOTICONS]
    receipts = await demo.timed("deleted", len(doomed), demo.db.delete_many(doomed))
    if not all(receipt.found for receipt in receipts):
        raise Mismatch("a key that was there could not be deleted")
    for key in doomed:
        del demo.expected[key]


# ---- the crash ----


@dataclass
class _Stream:
    """Writers, each with its own keys, writing again and again; what was acknowledged to them, and when."""

    acknowledged: int = 0
    durations_s: list[float] = field(default_factory=list)
    killed_at: float = inf
    accepted_at: float | None = None
    """When a write was acknowledged that had begun after the kill."""
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    accepted: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, started: float) -> None:
        """A write that had started then was acknowledged now."""
        now = perf_counter()
        self.acknowledged += 1
        self.durations_s.append(now - started)
        if self.acknowledged == _KILL_AFTER_WRITES:
            self.reached.set()
        if started > self.killed_at and self.accepted_at is None:
            self.accepted_at = now
            self.accepted.set()


async def _crash(demo: Demo) -> None:
    primary = await _primary(demo)
    say(f"\nA stream of writes; in the middle of it, kill -9 for {primary}, the primary")
    stream = _Stream()
    count = _STREAM_WRITERS * _STREAM_WRITES_EACH
    async with asyncio.timeout(_STREAM_DEADLINE_S), asyncio.TaskGroup() as group:
        group.create_task(
            demo.timed("written, one crash included", count, _write_all(demo, stream))
        )
        group.create_task(_kill_and_restart(demo.cluster, primary, stream))
    if stream.accepted_at is None:
        raise Mismatch("no write was begun after the kill and acknowledged")
    waited = sum(duration_s > _LONG_S for duration_s in stream.durations_s)
    say(
        f"  writes were accepted again {stream.accepted_at - stream.killed_at:.2f} s after the kill"
    )
    say(
        f"  all {stream.acknowledged:,} acknowledged; {waited} of them waited, the longest "
        f"{max(stream.durations_s):.2f} s; the primary is {await _primary(demo)}"
    )


async def _primary(demo: Demo) -> str:
    return str((await demo.db.map())["shards"][0]["primary"])


async def _write_all(demo: Demo, stream: _Stream) -> None:
    targets = demo.code_points[-_STREAM_WRITERS:]
    async with asyncio.TaskGroup() as group:
        for code_point in targets:
            group.create_task(_write(demo, stream, code_point))


async def _write(demo: Demo, stream: _Stream, code_point: int) -> None:
    """The client sends again what was not answered, and the shard recognizes a repeat."""
    key = key_of(code_point)
    for i in range(_STREAM_WRITES_EACH):
        value = record(code_point, write=i)
        started = perf_counter()
        await demo.db.put(key, value)
        demo.expected[key] = value
        stream.note(started)


async def _kill_and_restart(cluster: LocalCluster, primary: str, stream: _Stream) -> None:
    await stream.reached.wait()
    stream.killed_at = perf_counter()
    await cluster.kill(primary)
    say(f"  {primary} killed after {stream.acknowledged:,} acknowledged writes")
    with suppress(TimeoutError):
        async with asyncio.timeout(_DEAD_S_MAX):
            await stream.accepted.wait()
    others = "writes go on without it" if stream.accepted.is_set() else "nobody writes yet"
    say(f"  {others}; starting {primary} again")
    await cluster.restart(primary)


# ---- questions ----

_CATEGORIES = """
SELECT value_text->>'$.category' AS category, count(*) AS characters
FROM kv GROUP BY ALL ORDER BY characters DESC LIMIT 5
"""
_OPERATIONS = """
SELECT op, outcome, count(*) AS operations, count(DISTINCT key) AS keys
FROM oplog GROUP BY ALL ORDER BY operations DESC
"""


async def _ask_in_sql(demo: Demo) -> None:
    say("\nSQL over the data: the largest categories of characters")
    await _answer(demo, _CATEGORIES)
    say("\nSQL over the operation log: what was done")
    await _answer(demo, _OPERATIONS)
    count = (await demo.db.sql("SELECT count(*) FROM kv")).rows[0][0]
    if count != len(demo.expected):
        raise Mismatch(f"SQL counts {count} keys, not {len(demo.expected)}")


async def _answer(demo: Demo, query: str) -> None:
    result = await demo.db.sql(query)
    print_table(result.columns, result.rows)


async def _history(demo: Demo) -> None:
    key = key_of(EMOTICONS.start)
    say(f"\nThe history of {key.decode()}, newest first")
    versions = [version async for version in demo.db.history(key)]
    if not versions or versions[0].value != demo.expected[key]:
        raise Mismatch(f"the history of {key.decode()} does not begin with its value")
    for version in versions:
        note = json.loads(version.value or b"{}").get("note", "")
        say(f"  {version.op} at version {version.version} by request {version.request_id} {note}")


def _print_account(demo: Demo) -> None:
    say()
    rows = [
        [what, count, seconds, round(count / seconds) if seconds else None]
        for what, count, seconds in demo.account
    ]
    print_table(["what", "keys", "seconds", "keys/s"], rows)


if __name__ == "__main__":
    sys.exit(main())
