"""What a person types: the `nats` command against a running cluster."""

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from bus_kv.runtime.nats_server import find_nats_cli
from tests.support.cluster import Cluster, cluster_on

pytestmark = pytest.mark.asyncio(loop_scope="module")

COMMAND_S = 30


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(
    nats_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Cluster]:
    async with cluster_on(nats_url, tmp_path_factory.mktemp("cli"), nodes=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def nats_cli() -> Path:
    cli = find_nats_cli()
    if cli is None:
        pytest.skip("needs the nats command")
    return cli


@pytest.fixture
def nats(nats_cli: Path, cluster: Cluster, tmp_path: Path) -> "Command":
    return Command(nats_cli, cluster.url, tmp_path)


class Command:
    """The `nats` command, with no settings but the server's URL."""

    def __init__(self, cli: Path, url: str, home: Path) -> None:
        self._cli, self._url, self._home = cli, url, home

    async def __call__(self, *arguments: str) -> str:
        """What it wrote to stdout; it must succeed."""
        return (await self.run(*arguments)).stdout

    async def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = await asyncio.to_thread(self._run, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._cli, f"--server={self._url}", *arguments],
            capture_output=True, text=True, timeout=COMMAND_S, stdin=subprocess.DEVNULL,
            env={"HOME": str(self._home), "XDG_CONFIG_HOME": str(self._home)}, check=False,
        )  # fmt: skip


async def test_request_and_answer(nats: Command, cluster: Cluster) -> None:
    put = await nats("req", f"{cluster.root}.put", '{"key":"apple","value":"fruit"}', "--raw")
    assert json.loads(put)["found"] is False
    got = json.loads(await nats("req", f"{cluster.root}.get", '{"key":"apple"}', "--raw"))
    assert (got["value"], got["version"]) == ("fruit", json.loads(put)["version"])


async def test_a_failure_shows_in_the_headers(nats: Command, cluster: Cluster) -> None:
    shown = await nats.run("req", f"{cluster.root}.get", "{}")
    assert "Nats-Service-Error-Code: 400" in shown.stdout + shown.stderr
    assert "get needs a key" in shown.stdout


async def test_services_are_listed(nats: Command) -> None:
    listed = json.loads(await nats("micro", "list", "--json"))
    names = {service["name"] for service in listed}
    assert {"bus_kv-node", "bus_kv-coordinator"} <= names


async def test_a_service_is_described(nats: Command, cluster: Cluster) -> None:
    listed = json.loads(await nats("micro", "list", "bus_kv-node", "--json"))
    own = [s["id"] for s in listed if s["metadata"]["root"] == cluster.root]
    assert len(own) == 2
    shown = await nats("micro", "info", "bus_kv-node", own[0])
    assert f"{cluster.root}.get" in shown
    stats = await nats("micro", "stats", "bus_kv-node")
    assert own[1] in stats


async def test_a_service_is_asked_by_its_name(nats: Command) -> None:
    shown = await nats("micro", "request", "bus_kv-node", "health")
    assert '"status"' in shown


async def test_a_monitor_checks_health(nats: Command, cluster: Cluster) -> None:
    checked = await nats(
        "server", "check", "request", "--subject", f"{cluster.root}.health", "--payload", "{}",
        "--match-payload", '"status":"ok"', "--response-critical", "1s",
    )  # fmt: skip
    assert checked.startswith("OK")


async def test_the_map_is_readable_in_its_bucket(nats: Command, cluster: Cluster) -> None:
    text = await nats("kv", "get", f"bus_kv_{cluster.root}", "map", "--raw")
    document = json.loads(text)
    assert document["shards"]["s1"]["primary"] == "n1"
    assert document["map_version"] == (await cluster.bus.ok("map"))["map_version"]
    leader = json.loads(await nats("kv", "get", f"bus_kv_{cluster.root}", "leader", "--raw"))
    assert leader["holder"] == "c1"


async def test_the_bench_takes_every_reply_for_a_success(
    nats: Command, cluster: Cluster, tmp_path: Path
) -> None:
    payload = tmp_path / "payload"
    for verb, body in (("put", '{"key":"b","value":"1"}'), ("get", '{"key":"b"}'), ("stats", "{}")):
        payload.write_text(body)
        await nats(
            "bench", "service", "request", f"{cluster.root}.{verb}", "--msgs=50",
            f"--payload={payload}", "--no-progress",
        )  # fmt: skip
