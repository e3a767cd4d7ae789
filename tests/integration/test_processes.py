"""Processes that start wrong, share an id, are killed or frozen: what their user is told, and what survives."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from nats.errors import NoRespondersError

import bus_kv
from bus_kv.runtime.nats_server import NatsServer
from tests.support.cluster import Cluster, cluster_on, unique, until

PROGRAMS = ("coordinator", "nodes")
NOBODY_LISTENS = "nats://127.0.0.1:1"


@pytest.fixture
async def empty(nats_url: str, tmp_path: Path) -> AsyncIterator[Cluster]:
    """No process yet."""
    async with cluster_on(nats_url, tmp_path, nodes=0) as cluster:
        yield cluster


@pytest.fixture
async def single(nats_url: str, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster_on(nats_url, tmp_path, nodes=1) as cluster:
        yield cluster


def start(cluster: Cluster, program: str, *options: str) -> str:
    """Start a coordinator or a node with these options besides the usual; its name."""
    if program == "coordinator":
        cluster.start_coordinator("p", *options)
    else:
        cluster.start_node("p", *options)
    return "p"


def last_line(text: str) -> str:
    """The one line for the user: it follows whatever was logged."""
    assert "Traceback" not in text, text
    lines = [line for line in text.splitlines() if line.startswith("bus-kv: ")]
    assert len(lines) == 1, text
    assert lines[0] == text.splitlines()[-1]
    return lines[0]


# ---- starts that fail ----


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--id=a.b", "--id"), ("--id=", "--id"), ("--id=" + "x" * 65, "--id"), ("--id=ä", "--id"),
        ("--root=a..b", "root"), ("--root=", "root"), ("--root=a b", "root"), ("--root=>", "root"),
        ("--nats=http://x", "nats"), ("--nats=,", "nats"), ("--creds=/nowhere", "creds"),
        ("--config=/nowhere", "config"), ("--user=u", "password"),
        ("--knob=nope=1", "'nope'"), ("--knob=lease_s", "lease_s"), ("--knob=lease_s=x", "lease_s"),
        ("--knob=lease_s=0", "lease_s"), ("--knob=lease_s=-1", "lease_s"),
        ("--knob=lease_s=nan", "lease_s"), ("--knob=heartbeat_interval_s=inf", "heartbeat"),
        ("--knob=calls_max=1.5", "calls_max"),
    ],
)  # fmt: skip
async def test_a_wrong_option_is_named(empty: Cluster, option: str, says: str) -> None:
    for name in ("c1", "n1"):
        empty.start_coordinator(name, option) if name == "c1" else empty.start_node(name, option)
    for name in ("c1", "n1"):
        code, text = await empty.wait_exit(name, deadline_s=5)
        assert code in (1, 2)
        assert says in last_line(text)


@pytest.mark.parametrize("option", ["--weight=0", "--weight=-1", "--zone="])
async def test_a_wrong_description_of_a_node_is_named(empty: Cluster, option: str) -> None:
    code, text = await empty.wait_exit(start(empty, "nodes", option), deadline_s=5)
    assert code in (1, 2)
    assert option.partition("=")[0].strip("-") in last_line(text)


async def test_without_nats_a_start_ends_with_3(empty: Cluster) -> None:
    empty.spawn("c", "coordinator", "--id=c", f"--nats={NOBODY_LISTENS}")
    empty.start_node("n", f"--nats={NOBODY_LISTENS}")
    for name in ("c", "n"):
        code, text = await empty.wait_exit(name)
        assert code == 3
        assert "127.0.0.1:1" in last_line(text)


@pytest.mark.parametrize("program", PROGRAMS)
async def test_a_start_without_nats_can_be_stopped(empty: Cluster, program: str) -> None:
    name = start(empty, program, f"--nats={NOBODY_LISTENS}")

    async def is_ready() -> bool:
        return empty.has_handlers(name)

    await until(is_ready)
    code, text = await empty.stop(name, deadline_s=5)
    assert code == 0, text


@pytest.fixture
async def plain_nats(nats_binary: Path, tmp_path: Path) -> AsyncIterator[NatsServer]:
    """A server without JetStream that lets in user u with password p."""
    config = tmp_path / "plain.conf"
    config.write_text("authorization { user: u, password: p }\n")
    async with NatsServer(tmp_path / "plain", binary=nats_binary, config=config) as server:
        yield server


async def test_without_jetstream_a_coordinator_says_so(
    empty: Cluster, plain_nats: NatsServer
) -> None:
    options = (f"--nats={plain_nats.url}", "--user=u", "--password=p")
    code, text = await empty.wait_exit(start(empty, "coordinator", *options))
    assert code == 1
    assert "JetStream" in last_line(text)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("credentials", [(), ("--user=u", "--password=wrong")])
async def test_refused_credentials_end_a_start_at_once(
    empty: Cluster, plain_nats: NatsServer, program: str, credentials: tuple[str, ...]
) -> None:
    name = start(empty, program, f"--nats={plain_nats.url}", *credentials)
    code, text = await empty.wait_exit(name, deadline_s=5)
    assert code == 1
    assert "refused" in last_line(text)
    assert "wrong" not in text


# ---- one id, two processes ----


async def test_the_later_of_two_nodes_with_one_id_ends(single: Cluster, tmp_path: Path) -> None:
    single.spawn("twin", "nodes", "--id=n1", f"--data={tmp_path / 'twin'}")
    code, text = await single.wait_exit("twin")
    assert code == 1
    assert "n1 runs already" in last_line(text)
    await single.bus.ok("put", key="a", value="1")


async def test_a_frozen_node_that_was_replaced_ends_when_it_thaws(
    nats_url: str, tmp_path: Path
) -> None:
    async with cluster_on(nats_url, tmp_path, nodes=2) as cluster:
        cluster.pause("n2")
        cluster.spawn("twin", "nodes", "--id=n2", f"--data={tmp_path / 'twin'}")
        await _heard(cluster, "n2")
        cluster.resume("n2")
        code, text = await cluster.wait_exit("n2")
        assert code == 1
        assert "newer process runs as node n2" in last_line(text)
        await _heard(cluster, "n2")


async def _heard(cluster: Cluster, node: str) -> None:
    beats = await cluster.bus.client.subscribe(f"{cluster.root}.event.heartbeat.{node}")
    await beats.next_msg(10)
    await beats.unsubscribe()


async def test_a_node_may_have_the_longest_name(nats_url: str, tmp_path: Path) -> None:
    name = "n" * 64
    async with cluster_on(nats_url, tmp_path, nodes=0) as cluster:
        cluster.start_node(name)
        cluster.start_coordinator()
        await cluster.wait_healthy()
        await cluster.bus.ok("put", key="a", value="1")
        epoch = (await cluster.shard())["epoch"]
        ops = [{"op": "put", "key": "b", "value": "1"}]
        await cluster.bus.ok("shard.s1.request", epoch=epoch, ops=ops)
        cluster.start_node("m" * 64)
        await cluster.wait_healthy()
        # Through either node.
        for _ in range(8):
            await cluster.bus.ok("put", key="c", value="1")


# ---- crashes under load ----


class Writer:
    """Writes new keys all the time, each until it is acknowledged; remembers version and value of each."""

    def __init__(self, cluster: Cluster, tasks: int = 8) -> None:
        self.acked: dict[str, tuple[list[int], str]] = {}
        self._cluster = cluster
        self._stopping = False
        self._client = unique("writer")
        self._tasks = [asyncio.create_task(self._write(i)) for i in range(tasks)]

    async def _write(self, task: int) -> None:
        number = 0
        while not self._stopping:
            number += 1
            key, value = f"{self._client}-{task}-{number}", f"{task}:{number}"
            fields = {"key": key, "value": value, "request_id": f"{self._client}-{task}:{number}"}
            version = (await self._cluster.until_ok("put", deadline_s=30, **fields))["version"]
            self.acked[key] = (version, value)

    async def until_more(self, count: int = 50) -> None:
        """Return when this many more writes are acknowledged."""
        wanted = len(self.acked) + count

        async def are_there() -> bool:
            for task in self._tasks:
                if task.done():
                    task.result()
            return len(self.acked) >= wanted

        await until(are_there, deadline_s=30)

    async def stop(self) -> None:
        self._stopping = True
        async with asyncio.timeout(60):
            await asyncio.gather(*self._tasks)

    async def assert_all_there(self) -> None:
        """Each value is there, made by the version that was acknowledged: applied once."""
        keys = list(self.acked)
        for at in range(0, len(keys), 1000):
            ops = [{"op": "get", "key": key} for key in keys[at : at + 1000]]
            results = (await self._cluster.until_ok("batch", ops=ops))["results"]
            for key, result in zip(keys[at : at + 1000], results, strict=True):
                assert (result["version"], result["value"]) == self.acked[key]


async def test_kill_after_kill_loses_nothing(single: Cluster) -> None:
    writer = Writer(single)
    for _ in range(5):
        await writer.until_more()
        single.restart("n1")
    await writer.until_more()
    await writer.stop()
    await writer.assert_all_there()


async def test_a_repeat_after_a_kill_gives_the_first_result(single: Cluster) -> None:
    fields: dict[str, Any] = {"key": "a", "value": "1", "request_id": "me:7"}
    first = await single.bus.ok("put", **fields)
    ops = [{"op": "put", "key": f"b{i}", "value": "1"} for i in range(3)]
    batch = await single.bus.ok("batch", ops=ops, request_id="me:5")
    await single.bus.ok("delete", key="a", request_id="me:8")
    single.restart("n1")
    assert await single.until_ok("put", **fields) == first
    assert await single.bus.ok("batch", ops=ops, request_id="me:5") == batch
    assert (await single.bus.ok("get", key="a"))["found"] is False


async def test_a_lifetime_goes_on_after_a_kill(single: Cluster) -> None:
    await single.bus.ok("put", key="short", value="1", ttl_ms=1500)
    await single.bus.ok("put", key="long", value="1", ttl_ms=600_000)
    expires_at = (await single.bus.ok("get", key="long"))["expires_at"]
    single.restart("n1")
    assert (await single.until_ok("get", key="long"))["expires_at"] == expires_at

    async def is_absent() -> bool:
        return not (await single.bus.ok("get", key="short"))["found"]

    await until(is_absent)


async def test_a_stopped_node_finishes_what_it_took_on(single: Cluster) -> None:
    writer = Writer(single)
    await writer.until_more()
    code, text = await single.stop("n1")
    assert code == 0, text
    assert "bus-kv:" not in text
    single.restart("n1")
    await writer.until_more()
    await writer.stop()
    await writer.assert_all_there()


async def test_a_stopped_coordinator_ends_with_0(single: Cluster) -> None:
    code, text = await single.stop("c1")
    assert code == 0, text


# ---- the coordinator and the bus are away ----


async def test_the_data_path_needs_no_coordinator(single: Cluster) -> None:
    single.kill("c1")
    writer = Writer(single)
    await writer.until_more(200)
    single.restart("c1")
    # Only a coordinator gives a restarted node its shard back.
    single.restart("n1")
    await writer.until_more()
    await writer.stop()
    await writer.assert_all_there()


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_a_standby_takes_over(single: Cluster, how: str) -> None:
    single.start_coordinator("c2")
    version = (await single.bus.ok("put", key="a", value="1"))["version"]
    await _standby_ready(single)
    if how == "kill":
        single.kill("c1")
    else:
        await single.stop("c1")
    single.restart("n1")
    assert (await single.until_ok("get", key="a"))["version"] == version


async def _standby_ready(cluster: Cluster) -> None:
    """Both coordinators answer discovery."""

    async def are_there() -> bool:
        client, ids = cluster.bus.client, set()
        inbox = client.new_inbox()
        answers = await client.subscribe(inbox)
        await client.publish("$SRV.PING.bus_kv-coordinator", b"", reply=inbox)
        with contextlib.suppress(TimeoutError):
            while True:
                pong = json.loads((await answers.next_msg(0.2)).data)["metadata"]
                if pong["root"] == cluster.root:
                    ids.add(pong["coordinator"])
        await answers.unsubscribe()
        return ids == {"c1", "c2"}

    await until(are_there)


@pytest.mark.parametrize("down_s", [0, 5])
async def test_everything_comes_back_with_the_bus(
    nats_server: NatsServer, tmp_path: Path, down_s: float
) -> None:
    async with cluster_on(nats_server.url, tmp_path / "c", nodes=2) as cluster:
        async with bus_kv.connect(nats_server.url, root=cluster.root) as db:
            receipt = await db.put("a", "1")
            writer = Writer(cluster)
            await writer.until_more()
            await nats_server.kill()
            await asyncio.sleep(down_s)
            await nats_server.start()
            assert (await db.get("a")).version == receipt.version
            assert (await db.put("a", "2")).found is True
            await writer.until_more()
            await writer.stop()
            await writer.assert_all_there()
        # The coordinator is back as well.
        cluster.restart("n1")
        assert (await cluster.until_ok("get", key="a"))["value"] == "2"


async def test_a_node_stops_while_the_bus_is_away(nats_server: NatsServer, tmp_path: Path) -> None:
    async with cluster_on(nats_server.url, tmp_path / "c", nodes=1) as cluster:
        await cluster.bus.ok("put", key="a", value="1")
        await nats_server.kill()
        for name in ("n1", "c1"):
            code, text = await cluster.stop(name)
            assert code == 0, text


@pytest.mark.parametrize("lost", ["key", "bucket"])
async def test_a_store_that_forgot_the_map_makes_nobody_forget_data(
    nats_url: str, tmp_path: Path, lost: str
) -> None:
    """A new layout would put an empty shard in place of the one that is full (R10)."""
    async with cluster_on(nats_url, tmp_path, nodes=0) as cluster:
        cluster.start_node("n2")
        cluster.start_coordinator()
        await cluster.wait_healthy()
        await cluster.bus.ok("put", key="a", value="1")
        cluster.start_node("n1")
        await cluster.wait_healthy()
        jetstream, bucket = cluster.bus.client.jetstream(), f"bus_kv_{cluster.root}"
        if lost == "key":
            await (await jetstream.key_value(bucket)).delete("map")
        else:
            await jetstream.delete_key_value(bucket)
        cluster.restart("c1")
        for _ in range(120):
            with contextlib.suppress(NoRespondersError, TimeoutError):
                reply = await cluster.bus.ask("get", key="a", timeout_s=2)
                assert reply.code is not None or reply.fields["found"], "an empty shard answered"
            await asyncio.sleep(0.05)
