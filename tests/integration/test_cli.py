"""Every command of `bus-kv` against a real cluster: what it prints, and its exit code."""

import asyncio
import json
import os
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol

import pytest
import pytest_asyncio

from bus_kv.cli import cpu
from bus_kv.cli.local_cluster import ClusterError, LocalCluster
from bus_kv.runtime.connection import ConnectOptions
from bus_kv.runtime.nats_server import SYNC_ALWAYS_VERSION_MIN, server_version
from tests.support.command import DEADLINE_S, Ran, run_module, start_module, until_gone

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(
    nats_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LocalCluster]:
    options = ConnectOptions(servers=(nats_url,), root=f"test.cli-{secrets.token_hex(4)}")
    async with LocalCluster(tmp_path_factory.mktemp("cluster"), connection=options) as cluster:
        await cluster.wait_healthy()
        yield cluster


class Command(Protocol):
    async def __call__(self, *arguments: str, stdin: bytes = b"") -> Ran: ...


@pytest.fixture
def bus_kv(cluster: LocalCluster) -> Command:
    """Run a command on the cluster; keys are the test's own business."""
    connection = cluster.connection
    env = {"BUS_KV_NATS": connection.servers[0], "BUS_KV_ROOT": connection.root}

    async def run(*arguments: str, stdin: bytes = b"") -> Ran:
        return await run_module("bus_kv", *arguments, env=env, stdin=stdin)

    return run


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# ---- keys ----


async def test_put_get_delete(bus_kv: Command):
    assert (await bus_kv("put", "apple", "fruit")).text.startswith("created at version 1,")
    assert (await bus_kv("put", "apple", "tree")).text.startswith("replaced at version 1,")
    assert (await bus_kv("get", "apple")) == Ran(0, b"tree", "")
    reply = (await bus_kv("get", "apple", "--json")).document()
    assert reply.items() >= {"key": "apple", "found": True, "value": "tree", "shard": "s1"}.items()
    assert (await bus_kv("delete", "apple")).text.startswith("deleted at version 1,")
    again = await bus_kv("delete", "apple", "--json")
    assert (again.code, again.document()["found"], again.document()["version"]) == (0, False, None)


async def test_an_absent_key_is_exit_code_1(bus_kv: Command):
    assert await bus_kv("get", "nowhere") == Ran(1, b"", "bus-kv: key nowhere is absent\n")
    as_json = await bus_kv("get", "nowhere", "--json")
    assert (as_json.code, as_json.err) == (1, "")
    assert as_json.document()["found"] is False
    assert "value" not in as_json.document()


async def test_a_value_is_any_bytes_from_stdin_to_stdout(bus_kv: Command):
    value = bytes(range(256)) * 100
    assert (await bus_kv("put", "bytes", "-", stdin=value)).code == 0
    assert (await bus_kv("get", "bytes")).out == value
    assert "value_b64" in (await bus_kv("get", "bytes", "--json")).document()
    assert (await bus_kv("put", "dash", "--", "-5")).code == 0
    assert (await bus_kv("get", "dash")).out == b"-5"


async def test_conditions_and_lifetimes(bus_kv: Command):
    made = (await bus_kv("put", "lock", "me", "--if-absent", "--ttl", "1h", "--json")).document()
    held = await bus_kv("put", "lock", "you", "--if-absent")
    assert held.code == 1
    assert held.err.startswith("bus-kv: PRECONDITION_FAILED: ")
    refused = await bus_kv("put", "lock", "you", "--if-version", "9,9", "--json")
    assert (refused.code, refused.err) == (1, "")
    assert refused.document().items() >= {"code": "PRECONDITION_FAILED", "retry": False}.items()
    assert (await bus_kv("get", "lock", "--json")).document()["expires_at"] > 0
    version = ",".join(map(str, made["version"]))
    assert (await bus_kv("put", "lock", "you", "--if-version", version)).code == 0
    assert (await bus_kv("delete", "lock", "--if-version", version)).code == 1


async def test_batch_and_scan(bus_kv: Command, tmp_path: Path):
    file = tmp_path / "operations.jsonl"
    puts = [{"op": "put", "key": f"scan/{i:04}", "value": str(i)} for i in range(1500)]
    file.write_text("".join(json.dumps(put) + "\n" for put in puts))
    results = (await bus_kv("batch", str(file), "--json")).document()["results"]
    assert [result["found"] for result in results] == [False] * 1500

    page = (await bus_kv("scan", "--prefix", "scan/", "--json")).document()
    assert [item["value"] for item in page["items"]] == [str(i) for i in range(100)]
    rest = ("scan", "--prefix", "scan/", "--json", "--limit", "20000", "--cursor", page["cursor"])
    items = (await bus_kv(*rest)).document()["items"]
    assert [item["value"] for item in items] == [str(i) for i in range(100, 1500)]

    narrow = ("scan", "--start", "scan/0001", "--end", "scan/0004", "--reverse", "--keys-only")
    table = await bus_kv(*narrow)
    assert [line.split()[0] for line in table.text.splitlines()] == [
        *("key", "scan/0003", "scan/0002", "scan/0001"),
    ]
    short = await bus_kv("scan", "--prefix", "scan/", "--limit", "1")
    assert "--cursor" in short.err


async def test_a_batch_with_a_failed_operation_is_exit_code_1(bus_kv: Command):
    operations = [
        {"op": "put", "key": "batch", "value_b64": "/w=="},
        {"op": "put", "key": "batch", "value": "x", "if_absent": True},
        {"op": "get", "key": "batch"},
    ]
    text = json.dumps(operations).encode()
    ran = await bus_kv("batch", "-", "--json", stdin=text)
    assert ran.code == 1
    _, failed, read = ran.document()["results"]
    assert failed["code"] == "PRECONDITION_FAILED"
    assert read["value_b64"] == "/w=="
    table = await bus_kv("batch", "-", stdin=text)
    assert "PRECONDITION_FAILED" in table.text
    atomic = await bus_kv("batch", "-", "--atomic", stdin=text)
    assert atomic.code == 1


NO_OPERATIONS = {
    b'{"op":"get"\n': "line 1",
    b'{"op":"get","key":"a"}\n{"op":"fly","key":"a"}\n': "operation 2",
    b"[1]": "operation 1",
    b"": "no operations",
}


async def test_a_file_that_holds_no_operations_is_told(bus_kv: Command):
    rans = await asyncio.gather(*(bus_kv("batch", "-", stdin=text) for text in NO_OPERATIONS))
    for ran, told in zip(rans, NO_OPERATIONS.values(), strict=True):
        assert ran.code == 1
        assert ran.err.startswith("bus-kv: MALFORMED_REQUEST: ")
        assert told in ran.err


# ---- the cluster ----


async def test_status_shards_and_nodes(bus_kv: Command):
    commands = ("status",), ("shards", "list"), ("nodes", "list")
    documents = await asyncio.gather(*(bus_kv(*words, "--json") for words in commands))
    status, shards, nodes = (ran.document() for ran in documents)
    assert status["health"]["status"] == "ok"
    assert status["stats"]["total_nodes"] == 3
    (shard,) = shards["shards"]
    assert shard.items() >= {"id": "s1", "start": "", "end": None, "state": "active"}.items()
    assert {"keys", "bytes", "load", "epoch", "primary", "members", "learners"} <= shard.keys()
    assert [(node["id"], node["state"]) for node in nodes["nodes"]] == [
        *(("n1", "up"), ("n2", "up"), ("n3", "up")),
    ]
    tables = await asyncio.gather(*(bus_kv(*words) for words in commands))
    assert [(ran.code, ran.err) for ran in tables] == [(0, "")] * 3
    for ran, word in zip(tables, ("ok", "s1", "n3"), strict=True):
        assert word in ran.text


async def test_options_come_from_flags_environment_and_file(cluster: LocalCluster, tmp_path: Path):
    (url,), root = cluster.connection.servers, cluster.connection.root
    config = tmp_path / "bus_kv.toml"
    config.write_text(f'nats = ["{url}"]\nroot = "{root}"\n')
    rans = await asyncio.gather(
        run_module("bus_kv", "status", "--nats", url, "--root", root),
        run_module("bus_kv", "status", env={"BUS_KV_NATS": url, "BUS_KV_ROOT": root}),
        run_module("bus_kv", "status", "--config", str(config)),
    )
    assert [ran.code for ran in rans] == [0, 0, 0]


# ---- failures ----


async def test_no_nats_server_is_exit_code_3():
    url = f"nats://127.0.0.1:{unused_port()}"
    plain, as_json = await asyncio.gather(
        run_module("bus_kv", "get", "a", "--nats", url),
        run_module("bus_kv", "status", "--nats", url, "--json"),
    )
    assert plain.code == 3
    assert plain.err.startswith("bus-kv: UNREACHABLE: no NATS server answers at 127.0.0.1:")
    assert plain.err.count("\n") == 1
    assert (as_json.code, as_json.err) == (3, "")
    assert as_json.document()["code"] == "UNREACHABLE"


async def test_nats_without_a_node_is_exit_code_3(nats_url: str, root: str):
    where = ("--nats", nats_url, "--root", root)
    put, scan = await asyncio.gather(
        run_module("bus_kv", "put", "a", "b", *where), run_module("bus_kv", "scan", *where)
    )
    assert (put.code, scan.code) == (3, 3)
    assert "no node" in put.err
    assert root in put.err


WRONG = [
    ("fly",),
    ("get",),
    ("get", "a", "--consistency", "some"),
    ("put", "a", "b", "--ttl", "5"),
    ("put", "a", "b", "--ttl", "5s", "--ttl-ms", "5"),
    ("put", "a", "b", "--if-version", "x"),
    ("put", "a", "b", "--if-version", "1,2", "--if-absent"),
    ("get", "a", "--nats", "http://example.org"),
    ("get", "a", "--user", "me"),
    ("serve", "node", "--id"),
    ("up", "--nodes", "0"),
]


async def test_wrong_usage_is_exit_code_2():
    rans = await asyncio.gather(*(run_module("bus_kv", *arguments) for arguments in WRONG))
    assert {arguments: ran.code for arguments, ran in zip(WRONG, rans, strict=True)} == (
        dict.fromkeys(WRONG, 2)
    )
    assert all(ran.err and not ran.out for ran in rans)


async def test_failures_of_the_cluster_have_their_code(bus_kv: Command):
    unknown, missing = await asyncio.gather(
        bus_kv("get", "a", "--keyspace", "other"), bus_kv("batch", "no-such-file")
    )
    assert unknown.code == 1
    assert unknown.err.startswith("bus-kv: KEYSPACE_UNKNOWN: ")
    assert missing.code == 1
    assert missing.err.startswith("bus-kv: FILE: ")


async def test_help_and_version():
    helps = (), ("put",), ("shards", "list"), ("serve", "node"), ("serve", "coordinator")
    rans = await asyncio.gather(*(run_module("bus_kv", *words, "--help") for words in helps))
    assert [ran.code for ran in rans] == [0] * len(helps)
    assert "bus-kv put lock me --if-absent --ttl 60s" in rans[1].text
    assert "--data" in rans[3].text
    assert "--zone" not in rans[4].text
    assert (await run_module("bus_kv", "version", "--json")).document()["version"]


# ---- bench ----


THREADS_OF_A_NODE = {"event loop", "log", "state"}
BENCH = ("bench", "--seconds", "0.1", "--warmup", "0", "--keys", "1500", "--callers", "8")


async def test_bench_of_a_given_cluster_leaves_nothing_behind(bus_kv: Command, tmp_path: Path):
    ran = await bus_kv(*BENCH, "--data", str(tmp_path))
    assert ran.code == 0, ran.err
    for word in ("put", "get", "put_many", "scan", "echo", "log"):
        assert word in ran.text
    left = await bus_kv("scan", "--prefix", "bench", "--json")
    assert left.document()["items"] == []
    assert [*tmp_path.iterdir()] == []


async def test_bench_starts_a_private_cluster(nats_binary: Path, tmp_path: Path):
    ran = await run_module(
        *("bus_kv", *BENCH, "--distribution", "zipfian", "--json", "--data", str(tmp_path)),
        env={"NATS_SERVER": str(nats_binary)},
    )
    assert ran.code == 0, ran.err
    document = ran.document()
    assert document["settings"]["private_cluster"]
    measured = [(row["workload"], row["callers"]) for row in document["workloads"]]
    names = ("put", "get", "put_many", "scan")
    assert measured == [(name, callers) for name in names for callers in (1, 8)]
    assert [row["callers"] for row in document["floor"]["echo"]] == [1, 8]
    assert [row["entry_operations"] for row in document["floor"]["log"]] == [1, 8, 1000]
    for row in (*document["workloads"], *document["floor"]["echo"], *document["floor"]["log"]):
        assert row["operations_per_s"] > 0
        assert row["latency_ms"].keys() == {"p50", "p90", "p99", "max"}
    for row in document["workloads"]:
        assert row["echo_ratio"] > 0
        assert (row["log_ratio"] is not None) == (row["workload"] in ("put", "put_many"))
    assert [*tmp_path.iterdir()] == []


async def test_bench_tells_what_the_fold_costs(nats_binary: Path, tmp_path: Path):
    ran = await run_module(
        *("bus_kv", *BENCH, "get", "--fold", "--json", "--data", str(tmp_path)),
        env={"NATS_SERVER": str(nats_binary)},
    )
    assert ran.code == 0, ran.err
    (row,) = ran.document()["fold"]
    assert (row["workload"], row["callers"]) == ("get", 8)
    assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
    assert [*tmp_path.iterdir()] == []


async def test_bench_compares_with_jetstream(nats_binary: Path, tmp_path: Path):
    ran = await run_module(
        *("bus_kv", *BENCH, "put", "--jetstream", "--rounds", "1", "--json"),
        *("--data", str(tmp_path)),
        env={"NATS_SERVER": str(nats_binary)},
    )
    assert ran.code == 0, ran.err
    document = ran.document()
    assert [shard["id"] for shard in document["settings"]["shards"]] == ["s1"]
    fsynced = server_version(nats_binary) >= SYNC_ALWAYS_VERSION_MIN
    names = ["put", "lone put", "lone put, JetStream fsynced"]
    names = [name for name in names if fsynced or "fsynced" not in name]
    assert [row["name"] for row in document["jetstream"]] == names
    for row in document["jetstream"]:
        assert row["unit"] == ("p50 ms" if "lone" in row["name"] else "keys/s")
        for side in ("ours", "jetstream", "ratio"):
            assert 0 < row[side]["min"] <= row[side]["median"] <= row[side]["max"]
    assert [*tmp_path.iterdir()] == []


@pytest.mark.skipif(not cpu.is_available(), reason="needs /proc")
async def test_bench_tells_who_takes_the_cpu(nats_binary: Path, tmp_path: Path):
    ran = await run_module(
        *("bus_kv", *BENCH, "--seconds", "0.5", "--profile", "--json", "--data", str(tmp_path)),
        env={"NATS_SERVER": str(nats_binary)},
    )
    assert ran.code == 0, ran.err
    profiles = ran.document()["profile"]
    assert [(p["workload"], p["callers"]) for p in profiles] == [("put", 8), ("put_many", 8)]
    for profile in profiles:
        assert profile["operations_per_s"] > 0
        used = {(part["process"], part["thread"]): part["cpu_us"] for part in profile["parts"]}
        roles = {part["process"]: part["role"] for part in profile["parts"]}
        assert roles.keys() == {"client", "nats-server", "c1", "n1", "n2", "n3"}
        primary = next(process for process, role in roles.items() if role == "primary")
        assert {thread for process, thread in used if process == primary} >= THREADS_OF_A_NODE
        assert used["client", "event loop"] > 0
        assert used[primary, "event loop"] > 0
        assert profile["cpu_us"] == pytest.approx(sum(used.values()))
    assert [*tmp_path.iterdir()] == []


async def test_bench_tables_of_comparison_and_profile(nats_binary: Path, tmp_path: Path):
    brief = (*BENCH, "--rounds", "1", "--data", str(tmp_path))
    env = {"NATS_SERVER": str(nats_binary)}
    compared = await run_module("bus_kv", *brief, "get", "--jetstream", env=env)
    assert compared.code == 0, compared.err
    assert "shard s1 has the members n" in compared.text
    assert "JetStream KV R3" in compared.text
    if cpu.is_available():
        profiled = await run_module("bus_kv", *brief, "put", "--profile", env=env)
        assert profiled.code == 0, profiled.err
        for word in ("put, 8 callers", "CPU us/key", "primary", "log", "state", "sum"):
            assert word in profiled.text


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--jetstream", "--profile"), "--jetstream and --profile are given together"),
        (("--jetstream", "scan"), "--jetstream cannot measure scan"),
        (("--profile", "--nats", "nats://127.0.0.1:1"), "leave out --nats"),
    ],
)
async def test_bench_says_what_does_not_go_together(words: tuple[str, ...], reason: str):
    ran = await run_module("bus_kv", "bench", *words)
    assert ran.code == 2
    assert reason in ran.err


# ---- up ----


Up = tuple[asyncio.subprocess.Process, dict[str, Any]]


@pytest_asyncio.fixture(loop_scope="session")
async def start_up() -> AsyncIterator[Callable[..., Coroutine[Any, Any, Up]]]:
    """Run `bus-kv up --json`; gives the process, and what it says when it is healthy."""
    started: list[asyncio.subprocess.Process] = []

    async def start(data: Path, *more: str) -> Up:
        process = await start_module("bus_kv", "up", "--data", str(data), "--json", *more)
        started.append(process)
        assert process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            line = await process.stdout.readline()
        assert line, "bus-kv up has ended"
        return process, json.loads(line)

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def ended(process: asyncio.subprocess.Process) -> tuple[int, str]:
    async with asyncio.timeout(DEADLINE_S):
        _, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, err.decode()


@pytest.mark.usefixtures("nats_binary")
async def test_up_keeps_data_and_leaves_no_process(start_up, tmp_path: Path):
    process, about = await start_up(tmp_path)
    assert about["processes"].keys() == {"nats-server", "c1", "n1", "n2", "n3"}
    url = about["nats"][0]
    assert (await run_module("bus_kv", "put", "apple", "fruit", "--nats", url)).code == 0
    second = await run_module("bus_kv", "up", "--data", str(tmp_path))
    assert second.code == 1
    assert "is in use" in second.err
    process.send_signal(signal.SIGINT)
    assert await ended(process) == (0, "")
    for pid in about["processes"].values():
        await until_gone(pid)

    process, about = await start_up(tmp_path)
    url = about["nats"][0]
    assert (await run_module("bus_kv", "get", "apple", "--nats", url)).out == b"fruit"
    process.kill()
    await ended(process)
    for pid in about["processes"].values():
        await until_gone(pid)


async def test_up_reports_a_death_and_goes_on(start_up, nats_url: str, root: str, tmp_path: Path):
    where = ("--nats", nats_url, "--root", root)
    process, about = await start_up(tmp_path, *where)
    assert about["processes"].keys() == {"c1", "n1", "n2", "n3"}
    shards = await run_module("bus_kv", "shards", "list", "--json", *where)
    victim = "n3" if shards.document()["shards"][0]["primary"] != "n3" else "n2"
    os.kill(about["processes"][victim], signal.SIGKILL)
    async with asyncio.timeout(DEADLINE_S):
        told = (await process.stderr.readline()).decode()
    assert told.startswith(f"bus-kv: {victim} ended with signal SIGKILL")
    assert (await run_module("bus_kv", "put", "apple", "fruit", *where)).code == 0
    process.terminate()
    assert await ended(process) == (0, "")
    for pid in about["processes"].values():
        await until_gone(pid)


async def test_up_without_the_given_nats_is_exit_code_3(tmp_path: Path):
    url = f"nats://127.0.0.1:{unused_port()}"
    ran = await run_module("bus_kv", "up", "--data", str(tmp_path), "--nats", url)
    assert ran.code == 3
    assert ran.err.startswith("bus-kv: UNREACHABLE: ")


async def test_up_without_a_place_for_data_says_so(tmp_path: Path):
    (tmp_path / "file").write_text("")
    ran = await run_module("bus_kv", "up", "--data", str(tmp_path / "file"))
    assert ran.code == 1
    assert "cannot be written" in ran.err


async def test_a_cluster_whose_nodes_all_end_says_why(nats_url: str, root: str, tmp_path: Path):
    options = ConnectOptions(servers=(nats_url,), root=root)
    (tmp_path / "n1").write_text("in the way")
    async with LocalCluster(tmp_path, nodes=1, connection=options) as cluster:
        with pytest.raises(ClusterError, match="n1 ended with exit code 1: data directory"):
            await cluster.wait_healthy()
