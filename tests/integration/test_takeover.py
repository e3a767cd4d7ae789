"""Losses down to the last member, and what clients see of a takeover: nothing is lost, done twice or stale."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from nats.errors import NoRespondersError

import bus_kv
from bus_kv.runtime.nats_server import NatsServer
from tests.support.cluster import Bus, Cluster, Reply, cluster_on, decode, encode, until
from tests.support.recorded import Recorder
from tests.support.replicas import (
    LEVELS,
    NEVER_NOTICED,
    NODES,
    QUICK,
    assert_kept,
    log_of,
    until_folded,
    until_logs_equal,
    versions_in,
)


@pytest.fixture
async def cluster(nats_url: str, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster_on(nats_url, tmp_path, nodes=3, **QUICK) as cluster:
        yield cluster


@pytest.fixture
async def patient(nats_url: str, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster_on(nats_url, tmp_path, nodes=3, **NEVER_NOTICED) as cluster:
        yield cluster


# ---- who has left ----


async def test_a_copy_that_is_not_needed_is_wiped_and_its_node_can_come_back(
    nats_url: str, tmp_path: Path
) -> None:
    async with cluster_on(nats_url, tmp_path, nodes=3, wipe_after_s=0.2, **QUICK) as cluster:
        recorder = Recorder(cluster, levels=LEVELS)
        await recorder.until_more(200)
        await cluster.admin("config", replication_factor=2)

        async def is_wiped() -> bool:
            members = (await cluster.shard())["members"]
            left = [node for node in NODES if node not in members]
            return len(left) == 1 and not log_of(cluster, left[0])

        await until(is_wiped)
        members = (await cluster.shard())["members"]
        (left,) = (node for node in NODES if node not in members)
        await recorder.until_more(100)
        cluster.kill(left)
        cluster.restart(left)
        await cluster.wait_healthy()
        await cluster.admin("config", replication_factor=3)
        await cluster.until_members(*NODES)
        await recorder.until_more(100)
        await assert_kept(cluster, recorder, *NODES)


# ---- one after the other ----


async def lose(cluster: Cluster, node: str, how: str) -> None:
    if how == "kill":
        cluster.kill(node)
    else:
        code, text = await cluster.stop(node)
        assert code == 0, text


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_down_to_the_last_of_three_and_back(cluster: Cluster, how: str) -> None:
    recorder = Recorder(cluster, levels=LEVELS)
    await recorder.until_more(100)
    left = [*NODES]
    while len(left) > 1:
        primary = await cluster.primary()
        await lose(cluster, primary, how)
        left.remove(primary)
        await cluster.until_members(*left)
        await recorder.until_more(100)
    assert (await cluster.bus.ok("health"))["status"] == "ok"
    for node in NODES:
        if not cluster.is_running(node):
            cluster.restart(node)
    await cluster.until_members(*NODES)
    await recorder.until_more(100)
    await assert_kept(cluster, recorder, *NODES)


async def test_of_two_members_the_survivor_goes_on_alone(nats_url: str, tmp_path: Path) -> None:
    knobs: dict[str, Any] = {**QUICK, "replication_factor": 2, "layout_wait_s": 10}
    async with cluster_on(nats_url, tmp_path, nodes=2, **knobs) as cluster:
        await cluster.until_members("n1", "n2")
        recorder = Recorder(cluster, levels=LEVELS)
        await recorder.until_more(200)
        primary = await cluster.primary()
        [survivor] = {"n1", "n2"} - {primary}
        cluster.kill(primary)
        await cluster.until_members(survivor)
        await recorder.until_more(200)
        cluster.restart(primary)
        await cluster.until_members("n1", "n2")
        await recorder.until_more(100)
        await assert_kept(cluster, recorder, "n1", "n2")


@pytest.mark.parametrize("lost", ["primary", "backup"])
async def test_a_spare_node_fills_in_for_a_dead_one(
    nats_url: str, tmp_path: Path, lost: str
) -> None:
    async with cluster_on(nats_url, tmp_path, nodes=4, **QUICK) as cluster:
        recorder = Recorder(cluster, levels=LEVELS)
        await recorder.until_more(200)
        shard = await cluster.shard()
        [spare] = {"n1", "n2", "n3", "n4"} - set(shard["members"])
        dead = next(m for m in shard["members"] if (m == shard["primary"]) == (lost == "primary"))
        cluster.kill(dead)
        members = [spare, *(m for m in shard["members"] if m != dead)]
        await cluster.until_members(*members)
        await recorder.until_more(200)
        await assert_kept(cluster, recorder, *members)
        cluster.restart(dead)
        await cluster.wait_healthy()
        await cluster.until_members(*members)


async def test_an_empty_disk_comes_back_as_a_new_member(cluster: Cluster) -> None:
    recorder = Recorder(cluster, levels=LEVELS)
    await recorder.until_more(200)
    for node in ("n2", "n1"):
        cluster.kill(node)
        cluster.data(node).rename(cluster.folder / f"former-{node}")
        # Not before its loss is noticed: else the members waited for below could be those with the lost disk.
        await cluster.until_members(*(n for n in NODES if n != node))
        cluster.restart(node)
        await recorder.until_more(100)
        await cluster.until_members(*NODES)
    await assert_kept(cluster, recorder, *NODES)


async def test_after_all_were_killed_at_once_everything_is_there(cluster: Cluster) -> None:
    recorder = Recorder(cluster, levels=LEVELS)
    for _ in range(2):
        await recorder.until_more(150)
        for node in NODES:
            cluster.kill(node)
        for node in NODES:
            cluster.restart(node)
        await recorder.until_more(50)
    await cluster.until_members(*NODES)
    await assert_kept(cluster, recorder, *NODES)


# ---- exactly once ----


@pytest.mark.parametrize("remembers", ["in memory", "on disk"])
async def test_a_repeat_after_a_takeover_gives_the_first_result(
    nats_url: str, tmp_path: Path, remembers: str
) -> None:
    knobs = dict(NEVER_NOTICED)
    if remembers == "on disk":
        knobs |= {"dedup_runs_max": 1, "fold_interval_ms": 20}
    async with cluster_on(nats_url, tmp_path, nodes=3, **knobs) as cluster:
        put: dict[str, Any] = {"key": "a", "value": "1", "request_id": "me:7"}
        first = await cluster.bus.ok("put", **put)
        ops = [{"op": "put", "key": f"b{i}", "value": "1"} for i in range(3)]
        batch = await cluster.bus.ok("batch", ops=ops, request_id="me:5")
        deleted = await cluster.bus.ok("delete", key="a", request_id="me:8")
        if remembers == "on disk":
            await until_folded(cluster, *NODES)
        cluster.kill("n1")
        await cluster.admin("failover", shard="s1")
        assert await cluster.until_ok("put", **put) == first
        assert await cluster.until_ok("batch", ops=ops, request_id="me:5") == batch
        assert await cluster.until_ok("delete", key="a", request_id="me:8") == deleted
        # The one that missed the takeover knows as much when it is primary again.
        cluster.restart("n1")
        await cluster.until_members(*NODES)
        await cluster.admin("transfer", shard="s1", to="n1")
        assert await cluster.until_ok("put", **put) == first
        assert (await cluster.until_ok("get", key="a"))["found"] is False


async def test_a_write_of_unknown_outcome_is_done_once(patient: Cluster) -> None:
    """The frozen primary has the requests in its inbox, and finds them there when it goes on."""
    patient.pause("n1")
    puts = [{"key": f"a{i}", "value": str(i), "request_id": f"me:{i}"} for i in range(12)]
    asked = [patient.bus.ask("put", timeout_s=2.5, **put) for put in puts]
    replies = await asyncio.gather(*asked, return_exceptions=True)
    assert {r.code for r in replies if isinstance(r, Reply)} == {"OUTCOME_UNKNOWN"}
    await patient.admin("failover", shard="s1")
    versions = await put_again(patient, puts)
    patient.resume("n1")
    await patient.until_members(*NODES)
    assert await put_again(patient, puts) == versions
    assert versions_in(await until_logs_equal(patient, *NODES)) == {
        f"me:{i}": [version] for i, version in enumerate(versions)
    }


async def put_again(cluster: Cluster, puts: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Until each is acknowledged: their versions."""
    replies = await asyncio.gather(*[cluster.until_ok("put", **put) for put in puts])
    return [(reply["version"][0], reply["version"][1]) for reply in replies]


async def test_repeats_of_what_a_coordinator_said_change_nothing(patient: Cluster) -> None:
    bus, heard = patient.bus, list[tuple[str, bytes]]()

    async def hear(message: Any) -> None:
        heard.append((message.subject, message.data))

    inboxes = await bus.client.subscribe(f"{patient.root}.node.*.inbox", cb=hear)
    for _ in range(2):
        await patient.admin("failover", shard="s1")
        await patient.until_members(*NODES)
    await inboxes.unsubscribe()
    version = (await bus.ok("put", key="a", value="1", consistency="all"))["version"]
    shard = await patient.shard()
    said = [(s, b) for s, b in heard if decode(b)["type"] in ("seal", "open", "active")]
    assert {decode(body)["type"] for _, body in said} >= {"seal", "open"}
    inbox = bus.client.new_inbox()
    answers = await bus.client.subscribe(inbox)
    for subject, body in said:
        await bus.client.publish(subject, body, reply=inbox)
    # Each of the newest attempt's seals is answered again, all others are refused or left alone.
    await answers.next_msg(5)
    assert (await bus.ok("get", key="a", consistency="all"))["version"] == version
    after = (await bus.ok("put", key="a", value="2", consistency="all"))["version"]
    assert after == [version[0], version[1] + 1]
    assert await patient.shard() == shard
    assert patient.exited() == []


# ---- the former primary ----


async def test_a_former_primary_that_thaws_serves_nothing(patient: Cluster) -> None:
    """It finds requests of its epoch in its inbox before it hears that it was replaced."""
    bus = patient.bus
    await bus.ok("put", key="a", value="old")
    epoch = (await patient.shard())["epoch"]
    patient.pause("n1")
    await patient.admin("failover", shard="s1")
    # Under an id: the frozen node may be the one that is asked first, and pass it on when it goes on.
    put = {"key": "a", "value": "new", "request_id": "me:1"}
    version = (await put_again(patient, [put]))[0]
    late, get = {"op": "put", "key": "a", "value": "late"}, {"op": "get", "key": "a"}
    requests: list[dict[str, Any]] = [
        {"ops": [get]}, {"ops": [get], "consistency": "all"}, {"scan": {}},
        {"history": {"key": "a"}}, {"ops": [late], "request_id": "late:1"},
        {"ops": [late], "request_id": "late:2", "consistency": "all"},
        {"ops": [late, get], "request_id": "late:3"},
        {"ops": [{**late, "if_absent": True}], "request_id": "late:4"},
    ]  # fmt: skip
    inbox = bus.client.new_inbox()
    answers = await bus.client.subscribe(inbox)
    for request in requests:
        body = encode({"epoch": epoch, **request}, "json")
        await bus.client.publish(f"{bus.root}.shard.s1.request", body, reply=inbox)
    await bus.client.flush()
    patient.resume("n1")
    # Both the former and the new primary answer each.
    told = [decode((await answers.next_msg(5)).data) for _ in range(2 * len(requests))]
    codes = [answer.get("code") for answer in told]
    assert codes.count("STALE_EPOCH") >= len(requests)
    assert {*codes} <= {"STALE_EPOCH", "NOT_PRIMARY", "OUTCOME_UNKNOWN", "SHARD_UNAVAILABLE"}
    await patient.until_members(*NODES)
    entry = await patient.until_ok("get", key="a")
    assert (entry["value"], entry["version"]) == ("new", [*version])


async def test_a_former_primary_that_was_not_told_serves_nothing(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """The seal did not reach it, so when it is back it takes itself for the primary, until it has read the map."""
    async with cluster_on(nats_server.url, tmp_path / "c", nodes=3, **NEVER_NOTICED) as cluster:
        await cluster.bus.ok("put", key="a", value="old", consistency="all")
        epoch = (await cluster.shard())["epoch"]
        cluster.pause("n1")
        await nats_server.kill()
        await nats_server.start()
        await until(partial(fails_over, cluster))
        await cluster.until_ok("put", key="a", value="new", request_id="me:1")
        client = await Bus.open(nats_server.url, cluster.root)
        answers = Answers(client, epoch)
        await answers.begin()
        cluster.resume("n1")
        await cluster.until_members(*NODES)
        told = await answers.end()
        await client.close()
        assert [answer for answer in told if "code" not in answer] == []
        assert (await cluster.until_ok("get", key="a"))["value"] == "new"


class Answers:
    """Asks the primary of an epoch all the time, and keeps what anybody answers."""

    def __init__(self, bus: Bus, epoch: int) -> None:
        get, put = {"op": "get", "key": "a"}, {"op": "put", "key": "a", "value": "late"}
        requests: list[dict[str, Any]] = [{"ops": [get]}, {"ops": [put], "request_id": "late:1"}]
        self._bodies = [encode({"epoch": epoch, **request}, "json") for request in requests]
        self._bus, self._stopping = bus, False
        self._told: list[bytes] = []

    async def begin(self) -> None:
        self._inbox = self._bus.client.new_inbox()
        await self._bus.client.subscribe(self._inbox, cb=self._on_answer)
        self._asking = asyncio.create_task(self._ask())

    async def _on_answer(self, message: Any) -> None:
        self._told.append(message.data)

    async def _ask(self) -> None:
        """So often that some are asked in the moment between its return and its reading of the map."""
        subject = f"{self._bus.root}.shard.s1.request"
        while not self._stopping:
            for body in self._bodies:
                await self._bus.client.publish(subject, body, reply=self._inbox)
            await self._bus.client.flush()
            await asyncio.sleep(0.001)

    async def end(self) -> list[dict[str, Any]]:
        """What was answered. (NATS itself answers with an empty body, when nobody listens.)"""
        self._stopping = True
        await self._asking
        return [decode(body) for body in self._told if body]


async def fails_over(cluster: Cluster) -> bool:
    """A coordinator is there again, and does what it is told."""
    with contextlib.suppress(NoRespondersError):
        return bool(await cluster.admin("failover", shard="s1"))
    return False


async def test_a_member_that_was_replaced_while_it_was_frozen_answers_no_reads(
    nats_url: str, tmp_path: Path
) -> None:
    """At ONE any replica answers; this one would not hear of anything new any more."""
    async with cluster_on(nats_url, tmp_path, nodes=4, **QUICK) as cluster:
        await cluster.bus.ok("put", key="a", value="1", consistency="all")
        shard = await cluster.shard()
        frozen = next(m for m in shard["members"] if m != shard["primary"])
        cluster.pause(frozen)
        members = {"n1", "n2", "n3", "n4"} - {frozen}
        await cluster.until_members(*members)
        cluster.resume(frozen)
        await cluster.wait_healthy()
        ops = [{"op": "get", "key": "a"}]
        answers = [await cluster.bus.ok("shard.s1.read", ops=ops) for _ in range(60)]
        assert {answer["results"][0]["node"] for answer in answers} == members


# ---- the bus ----


async def test_nats_restarts_under_three_members(nats_server: NatsServer, tmp_path: Path) -> None:
    async with cluster_on(nats_server.url, tmp_path / "c", nodes=3) as cluster:
        recorder = Recorder(cluster, levels=LEVELS)
        for _ in range(2):
            await recorder.until_more(150)
            await nats_server.kill()
            await nats_server.start()
        await recorder.until_more(100)
        await cluster.until_members(*NODES)
        await assert_kept(cluster, recorder, *NODES)


# ---- the Python client ----


async def test_the_python_client_goes_through_takeovers(cluster: Cluster) -> None:
    """Every call succeeds, and its receipt stays true."""
    receipts: dict[str, Any] = {}

    async def write(db: bus_kv.Client, task: int) -> None:
        for number in itertools.count():
            key = f"{task}-{number}"
            receipts[key] = (await db.put(key, key)).version
            assert (await db.get(key)).version == receipts[key]

    async def until_more() -> None:
        wanted = len(receipts) + 200

        async def are_there() -> bool:
            return len(receipts) >= wanted

        await until(are_there)

    async with bus_kv.connect(cluster.url, root=cluster.root) as db:
        async with asyncio.TaskGroup() as group:
            writers = [group.create_task(write(db, task)) for task in range(8)]
            for node in ("n2", "n3"):
                await until_more()
                await cluster.admin("transfer", shard="s1", to=node)
            await until_more()
            cluster.restart("n3")
            await until_more()
            for writer in writers:
                writer.cancel()
        keys = [*receipts]
        assert [entry.version for entry in await db.get_many(keys)] == [*receipts.values()]
