"""A node whose state has no space: what it takes and answers meanwhile, and that it goes on when there is some."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, assert_failure, cluster_on, until
from tests.support.recorded import Recorder, oplog
from tests.support.replicas import assert_once_in_log, until_logs_equal

FOLD_AT_ONCE = (
    "--knob=fold_interval_ms=20", "--knob=fold_bytes=10000", "--knob=log_keep_bytes=10000",
    "--knob=log_bytes_max=10000",
    "--knob=unfolded_bytes_max=60000",
)  # fmt: skip


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _fill(disk: Path) -> Path:
    """Take all space that is left."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return filler


async def test_a_state_without_space_stalls_until_there_is_some(
    small_disk: Path, nats_url: str, tmp_path: Path
) -> None:
    """A log that has been written around once goes on in its own space, so then the state alone stalls."""
    async with cluster_on(nats_url, tmp_path / "c", nodes=0) as cluster:
        cluster.start_node("n1", *FOLD_AT_ONCE, data=small_disk / "n1")
        cluster.start_coordinator()
        await cluster.wait_healthy()
        acked = await _put(cluster, times=3000)
        filler = _fill(small_disk)
        acked |= await _write_until_refused(cluster)
        await _until_health(cluster, "degraded", says="cannot write its state")
        await _assert_there(cluster, acked)
        filler.unlink()
        acked["after"] = (await cluster.until_ok("put", key="after", value="1"))["version"]
        await _until_health(cluster, "ok", says="")
        await _assert_there(cluster, acked)
        cluster.restart("n1")
        await _assert_there(cluster, acked)
        versions = [[*operation.version] for operation in await oplog(cluster, page_rows=200)]
        assert [v for v in acked.values() if v not in versions] == []


async def test_a_backup_without_space_stops_nobody_and_catches_up(
    small_disk: Path, nats_url: str, tmp_path: Path
) -> None:
    async with cluster_on(nats_url, tmp_path / "c", nodes=0, layout_wait_s=10) as cluster:
        cluster.start_coordinator()
        cluster.data("n3").parent.mkdir()
        cluster.data("n3").symlink_to(small_disk)
        for node in ("n1", "n2", "n3"):
            cluster.start_node(node)
        await cluster.wait_healthy()
        recorder = Recorder(cluster)
        await recorder.until_more(100)
        filler = _fill(small_disk)
        await recorder.until_more(100)
        reply = await cluster.bus.ask(
            "put", key="a", value="1", consistency="all", request_id="a:1"
        )
        assert_failure(reply, "CONSISTENCY_NOT_MET", 424, says="not every member")
        filler.unlink()
        await recorder.until_more(100)
        await recorder.stop()
        assert_once_in_log(await until_logs_equal(cluster, "n1", "n2", "n3"), recorder.done)
        assert cluster.exited() == []


async def _put(cluster: Cluster, times: int) -> dict[str, list[int]]:
    """Write so many times, each time some pages of the log; key -> version."""
    acked: dict[str, list[int]] = {}
    for i in range(times):
        acked[f"key-{i % 100}"] = (await cluster.until_ok("put", key=f"key-{i % 100}", value="1"))[
            "version"
        ]
    return acked


async def _write_until_refused(cluster: Cluster) -> dict[str, list[int]]:
    """Key -> version of what was acknowledged before the node takes no more."""
    acked: dict[str, list[int]] = {}
    for i in range(2000):
        reply = await cluster.bus.ask("put", key=f"more-{i}", value="v" * 1000)
        if reply.code is None:
            acked[f"more-{i}"] = reply.fields["version"]
        elif reply.code != "OUTCOME_UNKNOWN":
            assert_failure(reply, "OVERLOADED", 429, retry=True, says="disk")
            return acked
    raise AssertionError("a full disk took everything")


async def _until_health(cluster: Cluster, status: str, *, says: str) -> None:
    async def is_so() -> bool:
        health = await cluster.bus.ok("health")
        return health["status"] == status and says in str(health.get("reasons"))

    await until(is_so)


async def _assert_there(cluster: Cluster, acked: dict[str, list[int]]) -> None:
    for key, version in acked.items():
        assert (await cluster.until_ok("get", key=key))["version"] == version
