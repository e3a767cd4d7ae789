"""Real servers with our configurations: nats.conf, and the development one for each version."""

import contextlib
import re
import shutil
import socket
from pathlib import Path

import pytest
from nats.errors import NoRespondersError

from bus_kv.runtime.nats_server import (
    NatsCluster,
    NatsServer,
    NatsServerError,
    NatsServerMissing,
    find_nats_server,
    next_free_port,
    server_version,
)
from bus_kv.subjects import Subjects
from tests.support.cluster import Cluster, decode, until
from tests.support.nats import container_nats, greeting

NATS_CONF = Path(__file__).parents[2] / "nats.conf"


def binaries() -> list[Path]:
    """The server in use, and an older one that the system may have besides."""
    candidates = (find_nats_server(), shutil.which("nats-server", path="/usr/sbin"))
    return [Path(path) for path in dict.fromkeys(candidates) if path is not None]


@pytest.mark.parametrize("binary", binaries(), ids=str)
async def test_every_version_takes_the_development_configuration(
    binary: Path, tmp_path: Path
) -> None:
    async with NatsServer(tmp_path, binary=binary) as server:
        info = await greeting(server.url)
    assert info["max_payload"] == 1 << 20
    assert info["jetstream"] is True


@pytest.fixture
def current_binary(nats_binary: Path) -> Path:
    if server_version(nats_binary) < (2, 10, 0):
        pytest.skip("nats.conf is for nats-server 2.10 or later")
    return nats_binary


async def test_nats_conf_gives_the_limits_that_we_agree_with(
    current_binary: Path, tmp_path: Path
) -> None:
    async with NatsServer(tmp_path, binary=current_binary, config=NATS_CONF) as server:
        info = await greeting(server.url)
    assert info["max_payload"] == 1 << 20
    assert info["jetstream"] is True


async def test_the_cluster_of_nats_conf_works_as_its_comment_says(
    current_binary: Path, tmp_path: Path
) -> None:
    text, count = re.subn(
        r"^# (server_name: .*|cluster \{|  .*|\})$", r"\1", NATS_CONF.read_text(), flags=re.M
    )
    assert count == 6
    port = next_free_port(16222)
    config = tmp_path / "cluster.conf"
    config.write_text(text.replace("0.0.0.0:6222", f"127.0.0.1:{port}"))
    async with NatsServer(tmp_path / "n1", binary=current_binary, config=config) as server:
        info = await greeting(server.url)
    assert info["server_name"] == "n1"
    assert info["cluster"] == "bus_kv"


async def test_a_restart_keeps_port_and_data(nats_server: NatsServer) -> None:
    url, first = nats_server.url, nats_server.pid
    marker = nats_server.folder / "jetstream"
    assert marker.is_dir()
    await nats_server.restart()
    assert nats_server.url == url
    assert nats_server.pid != first
    await nats_server.kill()
    with pytest.raises(OSError, match="Connect call failed"):
        await greeting(url)
    await nats_server.start()
    await greeting(url)


async def test_a_taken_port_is_told_by_the_servers_own_words(
    nats_server: NatsServer, nats_binary: Path, tmp_path: Path
) -> None:
    taken = int(nats_server.url.rpartition(":")[2])
    second = NatsServer(tmp_path / "second", binary=nats_binary, port=taken)
    with pytest.raises(NatsServerError, match="address already in use") as caught:
        await second.start()
    assert "\n" not in str(caught.value)
    assert str(second.log_path) in str(caught.value)
    await second.stop()


async def test_a_store_that_cannot_be_written_is_told(nats_binary: Path, tmp_path: Path) -> None:
    (tmp_path / "jetstream").write_text("not a folder")
    with pytest.raises(NatsServerError, match="JetStream"):
        await NatsServer(tmp_path, binary=nats_binary).start()


async def test_a_folder_that_cannot_be_written_is_told(nats_binary: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NatsServerError, match=r"cannot write to .*file"):
        await NatsServer(tmp_path / "file", binary=nats_binary).start()


async def test_a_mistake_in_the_configuration_is_told(nats_binary: Path, tmp_path: Path) -> None:
    with pytest.raises(NatsServerError, match="no_such_option"):
        await NatsServer(tmp_path, binary=nats_binary, extra="no_such_option: 1").start()


async def test_the_shared_server_has_jetstream(nats_url: str) -> None:
    assert (await greeting(nats_url))["jetstream"] is True


async def test_a_container_serves_where_there_is_no_program() -> None:
    try:
        async with container_nats() as url:
            assert (await greeting(url))["jetstream"] is True
    except NatsServerMissing:
        pytest.skip("needs Docker and the image nats")


def test_the_next_free_port_is_past_a_taken_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert next_free_port(port) > port


async def test_a_coordinator_waits_for_the_other_servers_of_its_nats(
    nats_binary: Path, tmp_path: Path
) -> None:
    """The map's bucket has three replicas, although there was one server when the coordinator came."""
    servers = NatsCluster(tmp_path)
    first, *others = servers.servers
    await first.start()
    try:
        cluster = Cluster(first.url, "late", tmp_path, {})
        await cluster.open()
        try:
            cluster.start_coordinator()

            async def has_begun() -> bool:
                return cluster.has_handlers("c1")

            await until(has_begun)
            for server in others:
                await server.start()
            assert await _replicas_of_map(cluster) == 3
        finally:
            await cluster.close()
    finally:
        await servers.stop()


async def _replicas_of_map(cluster: Cluster) -> int:
    replicas: list[int] = []

    async def is_there() -> bool:
        with contextlib.suppress(NoRespondersError, TimeoutError):
            asked = f"$JS.API.STREAM.INFO.KV_{Subjects(cluster.root).bucket}"
            info = decode((await cluster.bus.client.request(asked, b"", timeout=2)).data)
            replicas[:] = [info["config"]["num_replicas"]] if "config" in info else []
        return bool(replicas)

    await until(is_there, deadline_s=40)
    return replicas[0]
