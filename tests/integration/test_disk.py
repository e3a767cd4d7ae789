"""A node and its data directory: whose it is, what is wrong with it, and what happens when it is full."""

import asyncio
import contextlib
import shutil
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.cluster import POLL_S, Cluster, cluster_on

KEYS = 200
LOG = "log.sqlite"
NEVER_MS = 10**13
"""Longer than the epoch is old: what a start has read from the log counts as waiting since then."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def templates(
    nats_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[dict[str, Path]]:
    """Data directories of node n1 with KEYS keys: one of a process that was stopped, one of a killed one.

    Nothing is folded, so a start reads every entry of the log; that is still all in the write-ahead log of SQLite.
    """
    folder = tmp_path_factory.mktemp("template")
    async with cluster_on(nats_url, folder, nodes=1, fold_interval_ms=NEVER_MS) as cluster:
        for i in range(KEYS):
            await cluster.bus.ok("put", key=f"key-{i}", value="v" * 2000)
        cluster.kill("n1")
        shutil.copytree(cluster.data("n1"), folder / "killed")
        cluster.restart("n1")
        await cluster.wait_healthy()
        await cluster.stop("n1")
        shutil.copytree(cluster.data("n1"), folder / "stopped")
        yield {"killed": folder / "killed", "stopped": folder / "stopped"}


@pytest.fixture
async def cluster(nats_url: str, tmp_path: Path) -> AsyncIterator[Cluster]:
    """No process yet."""
    async with cluster_on(nats_url, tmp_path, nodes=0) as cluster:
        yield cluster


async def refusal(cluster: Cluster, data: Path, *options: str, id: str = "n1") -> str:
    """Start a node on this directory, which must end with 1: the one line for its user."""
    cluster.start_node(id, *options, data=data)
    code, text = await cluster.wait_exit(id, deadline_s=6)
    lines = [line for line in text.splitlines() if line.startswith("bus-kv: ")]
    assert code == 1, text
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0]


# ---- whose directory ----


async def test_a_directory_in_use_is_refused(cluster: Cluster) -> None:
    cluster.start_node("n1")
    cluster.start_coordinator()
    await cluster.wait_healthy()
    line = await refusal(cluster, cluster.data("n1"), id="n2")
    assert str(cluster.data("n1")) in line
    assert "in use by another process" in line
    await cluster.bus.ok("put", key="a", value="1")


async def test_a_killed_process_leaves_no_lock(cluster: Cluster) -> None:
    cluster.start_node("n1")
    cluster.start_coordinator()
    await cluster.wait_healthy()
    version = (await cluster.bus.ok("put", key="a", value="1"))["version"]
    cluster.restart("n1")
    assert (await cluster.until_ok("get", key="a"))["version"] == version


async def test_the_directory_of_another_node_is_refused(
    cluster: Cluster, templates: dict[str, Path], tmp_path: Path
) -> None:
    data = shutil.copytree(templates["stopped"], tmp_path / "copy")
    line = await refusal(cluster, data, id="n2")
    assert "belongs to node n1, not n2" in line
    assert str(data) in line


@pytest.mark.parametrize("place", ["file", "below a file", "kernel"])
async def test_a_directory_that_cannot_be_is_refused(
    cluster: Cluster, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").touch()
    path = {
        "file": tmp_path / "file", "below a file": tmp_path / "file" / "x", "kernel": Path("/proc/x")
    }[place]  # fmt: skip
    line = await refusal(cluster, path)
    assert f"data directory {path} cannot be written" in line


# ---- damage ----


def _scribble(path: Path, *, at: float, bytes_count: int = 4096) -> None:
    """Overwrite some bytes of a file, `at` a fraction of its length."""
    with path.open("r+b") as file:
        file.seek(int(path.stat().st_size * at))
        file.write(b"\x5a" * bytes_count)


def _change(path: Path, *statements: str) -> object:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)
    return None


DAMAGE: dict[str, Callable[[Path], object]] = {
    "header overwritten": lambda log: _scribble(log, at=0),
    "middle overwritten": lambda log: _scribble(log, at=0.5, bytes_count=16384),
    "one byte of an entry": lambda log: _change(
        log, "UPDATE entries SET body = substr(body, 1, 50) || x'00' || substr(body, 52)"
        " WHERE last = 100"),
    "not a database": lambda log: log.write_bytes(b"this is no database\n" * 1000),
    "another database": lambda log: _change(log.with_suffix(".new"), "CREATE TABLE t (a)")
    or log.with_suffix(".new").replace(log),
    "half of it": lambda log: log.write_bytes(log.read_bytes()[: log.stat().st_size // 2]),
    "an entry missing": lambda log: _change(log, "DELETE FROM entries WHERE last = 100"),
    "text for an entry": lambda log: _change(log, "UPDATE entries SET body = 'x' WHERE last = 100"),
    "no identity": lambda log: _change(log, "DELETE FROM meta"),
    "no format": lambda log: _change(log, "DELETE FROM meta WHERE name = 'format_version'"),
    "odd format": lambda log: _change(log, "UPDATE meta SET value = 'x' WHERE name LIKE 'f%'"),
    "odd record": lambda log: _change(log, "UPDATE replicas SET record = '{'"),
    "empty record": lambda log: _change(log, "UPDATE replicas SET record = '{}'"),
    "list for a record": lambda log: _change(log, "UPDATE replicas SET record = '[]'"),
    "no table": lambda log: _change(log, "DROP TABLE entries"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
async def test_a_damaged_log_is_refused(
    cluster: Cluster, templates: dict[str, Path], tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    data = shutil.copytree(templates["stopped"], tmp_path / "copy")
    damage(data / LOG)
    line = await refusal(cluster, data)
    assert f"{data / LOG} is damaged" in line
    assert "backup" in line


async def test_a_damaged_write_ahead_log_is_refused(
    cluster: Cluster, templates: dict[str, Path], tmp_path: Path
) -> None:
    """SQLite alone would end its log silently at the damage, and forget what was acknowledged after it."""
    data = shutil.copytree(templates["killed"], tmp_path / "copy")
    _scribble(data / f"{LOG}-wal", at=0.5, bytes_count=64)
    line = await refusal(cluster, data)
    assert "is damaged" in line


async def test_a_newer_format_is_refused(
    cluster: Cluster, templates: dict[str, Path], tmp_path: Path
) -> None:
    data = shutil.copytree(templates["stopped"], tmp_path / "copy")
    _change(data / LOG, "UPDATE meta SET value = '99' WHERE name = 'format_version'")
    line = await refusal(cluster, data)
    assert "format 99, newer than" in line
    assert "start the release that wrote it" in line


# ---- a full disk ----


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _fill(disk: Path, leave_bytes: int = 0) -> Path:
    """Take all space but some."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    with filler.open("r+b") as file:
        file.truncate(filler.stat().st_size - leave_bytes)
    return filler


@pytest.mark.parametrize("leave_bytes", [0, 8192, 24576])
async def test_a_full_disk_at_start_is_refused(
    small_disk: Path, nats_url: str, tmp_path: Path, leave_bytes: int
) -> None:
    _fill(small_disk, leave_bytes)
    async with cluster_on(nats_url, tmp_path / "c", nodes=0) as cluster:
        line = await refusal(cluster, small_disk / "n1")
        assert str(small_disk / "n1") in line
        assert "space" in line


async def test_a_disk_that_fills_stops_writes_until_there_is_space(
    small_disk: Path, nats_url: str, tmp_path: Path
) -> None:
    async with cluster_on(nats_url, tmp_path / "c", nodes=0) as cluster:
        cluster.start_node("n1", data=small_disk / "n1")
        cluster.start_coordinator()
        await cluster.wait_healthy()
        acked = await _write_until_full(cluster, small_disk)
        reply = await cluster.bus.ask("put", key="full", value="1")
        assert (reply.code, reply.fields["retry"]) == ("SHARD_UNAVAILABLE", True)
        assert "space" in reply.message
        assert (await cluster.bus.ok("get", key="key-0"))["version"] == acked["key-0"]
        assert (await cluster.bus.ok("health"))["status"] == "degraded"
        (small_disk / "filler").unlink()
        acked["after"] = (await cluster.until_ok("put", key="after", value="1"))["version"]
        await cluster.wait_healthy()
        await _assert_all_there(cluster, acked)
        cluster.restart("n1")
        await cluster.until_ok("get", key="after")
        await _assert_all_there(cluster, acked)


async def _write_until_full(cluster: Cluster, disk: Path) -> dict[str, list[int]]:
    """Key -> version of each write that was acknowledged before the node says that it has no space."""
    acked: dict[str, list[int]] = {}
    filler = _fill(disk, leave_bytes=1 << 20)
    for i in range(200):
        reply = await cluster.bus.ask("put", key=f"key-{i}", value="v" * 100_000)
        if reply.code is None:
            acked[f"key-{i}"] = reply.fields["version"]
        elif reply.code == "SHARD_UNAVAILABLE":
            break
        else:
            # The write that found no space: it waits for it, and so its outcome is open.
            assert reply.code == "OUTCOME_UNKNOWN"
    assert filler.exists()
    assert acked
    return acked


async def _assert_all_there(cluster: Cluster, acked: dict[str, list[int]]) -> None:
    found = {k: (await cluster.bus.ok("get", key=k))["version"] for k in acked}
    assert found == acked


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_a_node_whose_disk_is_full_ends_and_starts_again_with_all_it_acknowledged(
    small_disk: Path, nats_url: str, tmp_path: Path, how: str
) -> None:
    async with cluster_on(nats_url, tmp_path / "c", nodes=0) as cluster:
        cluster.start_node("n1", data=small_disk / "n1")
        cluster.start_coordinator()
        await cluster.wait_healthy()
        acked = await _write_until_full(cluster, small_disk)
        if how == "stop":
            code, text = await cluster.stop("n1")
            assert code in (0, 1), text
        (small_disk / "filler").unlink()
        cluster.restart("n1")
        await cluster.until_ok("get", key="key-0")
        await _assert_all_there(cluster, acked)


async def test_a_directory_that_is_taken_away_is_told(cluster: Cluster) -> None:
    """Writes go on into the files that are open, or the node ends and says why: never a traceback."""
    cluster.start_node("n1")
    cluster.start_coordinator()
    await cluster.wait_healthy()
    shutil.rmtree(cluster.data("n1"))
    with contextlib.suppress(TimeoutError):
        await cluster.bus.ask("put", key="a", value="1", timeout_s=2)
    await asyncio.sleep(POLL_S)
    assert "Traceback" not in cluster.log("n1")
