"""Commands that change who does what, and those that show it, on clusters of real processes."""

from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from bus_kv.subjects import Subjects
from tests.support.cluster import Cluster, cluster_on, until
from tests.support.command import Ran, run_module

Command: TypeAlias = Callable[..., Coroutine[Any, Any, Ran]]


@pytest.fixture
async def cluster(nats_url: str, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster_on(nats_url, tmp_path, nodes=3) as cluster:
        yield cluster


@pytest.fixture
def bus_kv(cluster: Cluster) -> Command:
    async def run(*arguments: str, stdin: bytes = b"") -> Ran:
        env = {"BUS_KV_NATS": cluster.url, "BUS_KV_ROOT": cluster.root}
        return await run_module("bus_kv", *arguments, env=env, stdin=stdin)

    return run


async def until_whole(cluster: Cluster) -> dict[str, Any]:
    """Return shard s1 of the map when it has its three members."""

    async def is_whole() -> bool:
        shard = await cluster.shard()
        return len(shard["members"]) == 3 and shard["state"] == "active"

    await until(is_whole)
    return await cluster.shard()


# ---- who is primary ----


async def test_failover_run_has_another_member_take_over(cluster: Cluster, bus_kv: Command) -> None:
    await bus_kv("put", "k", "v")
    before = await cluster.shard()
    ran = await bus_kv("failover", "run", "s1")
    after = await cluster.shard()
    assert ran.code == 0, ran.err
    assert ran.text.startswith("shard s1 is served by n")
    assert after["primary"] != before["primary"]
    assert after["epoch"] > before["epoch"]
    assert (await bus_kv("get", "k")).out == b"v"
    await until_whole(cluster)
    again = await bus_kv("failover", "run", "s1", "--json")
    document = again.document()
    assert document.keys() == {"id", "epoch", "primary", "members", "learners"}
    assert document["primary"] != after["primary"]


async def test_shards_transfer_makes_a_member_the_primary(
    cluster: Cluster, bus_kv: Command
) -> None:
    before = await cluster.shard()
    to = next(node for node in before["members"] if node != before["primary"])
    ran = await bus_kv("shards", "transfer", "s1", "--to", to)
    assert ran.text.startswith(f"shard s1 is served by {to} under epoch")
    after = await cluster.shard()
    assert (after["primary"], {*after["members"]}) == (to, {"n1", "n2", "n3"})
    same = await bus_kv("shards", "transfer", "s1", "--to", to, "--json")
    assert same.document()["epoch"] == after["epoch"]


async def test_who_is_not_there_is_named(bus_kv: Command) -> None:
    shard = await bus_kv("failover", "run", "s9")
    assert (shard.code, shard.err) == (1, "bus-kv: SHARD_UNKNOWN: there is no shard 's9'\n")
    node = await bus_kv("shards", "transfer", "s1", "--to", "n9", "--json")
    assert (node.code, node.document()["code"]) == (1, "NODE_UNKNOWN")
    assert "n1" in node.document()["message"]
    assert (await bus_kv("shards", "transfer", "s1")).code == 2
    assert (await bus_kv("failover", "run")).code == 2


async def test_without_a_coordinator_the_exit_code_is_3(cluster: Cluster, bus_kv: Command) -> None:
    cluster.kill("c1")
    for words in (
        ("failover", "run", "s1"), ("shards", "transfer", "s1", "--to", "n2"),
        ("config", "set", "consistency", "one"), ("doctor", "--restore-map", "--yes"),
    ):  # fmt: skip
        ran = await bus_kv(*words)
        assert (ran.code, ran.out) == (3, b"")
        assert ran.err.startswith("bus-kv: UNREACHABLE: no coordinator answers")
        assert ran.err.count("\n") == 1
    as_json = await bus_kv("failover", "run", "s1", "--json")
    assert (as_json.code, as_json.document()["code"]) == (3, "UNREACHABLE")
    assert (await bus_kv("config", "get")).code == 0


# ---- settings ----


async def test_config_shows_and_sets_the_default_of_requests(
    cluster: Cluster, bus_kv: Command
) -> None:
    shown = (await bus_kv("config", "get", "--json")).document()
    assert shown == {
        "keyspace": "default", "policy": "range", "consistency": "quorum", "replication_factor": 3,
        "heartbeat_interval_s": 0.5, "heartbeat_misses_max": 3, "heartbeat_good_min": 3,
        "auto_failover": True,
    }  # fmt: skip
    ran = await bus_kv("config", "set", "consistency", "one", "--keyspace", "default")
    assert ran.text == "consistency of keyspace default is one\n"
    put = (await bus_kv("put", "k", "v", "--json")).document()
    assert put["consistency"] == "one"
    reply = (await bus_kv("config", "set", "consistency", "all", "--json")).document()
    assert reply == {**shown, "consistency": "all"}
    lines = (await bus_kv("config", "get")).text.splitlines()
    assert ["consistency", "all"] in [line.split() for line in lines]


async def test_config_sets_how_many_members_a_shard_has(cluster: Cluster, bus_kv: Command) -> None:
    assert (await bus_kv("config", "set", "replication_factor", "2")).code == 0

    async def has_two() -> bool:
        return len((await cluster.shard())["members"]) == 2

    await until(has_two)
    await bus_kv("put", "k", "v", "--consistency", "all")
    assert (await bus_kv("config", "set", "replication_factor", "3")).code == 0
    await until_whole(cluster)


async def test_settings_that_cannot_be_are_refused(bus_kv: Command) -> None:
    wrong = [
        ("consistency", "some"), ("replication_factor", "two"), ("colour", "red"),
        ("auto_failover", "yes"), ("heartbeat_interval_s", "often"), ("heartbeat_good_min", "1.5"),
    ]  # fmt: skip
    for name, value in wrong:
        ran = await bus_kv("config", "set", name, value)
        assert (ran.code, ran.out) == (2, b"")
    for name, value in (("replication_factor", "99"), ("heartbeat_interval_s", "0")):
        refused = await bus_kv("config", "set", name, value)
        assert (refused.code, refused.err.split(":")[1]) == (1, " MALFORMED_REQUEST")
    for words in (("get",), ("set", "consistency", "one")):
        ran = await bus_kv("config", *words, "--keyspace", "nope")
        assert (ran.code, ran.err.split(":")[1]) == (1, " KEYSPACE_UNKNOWN")


# ---- what there is ----


async def test_status_and_shards_list_show_the_replicas(cluster: Cluster, bus_kv: Command) -> None:
    await bus_kv("put", "k", "v")
    (shard,) = (await bus_kv("shards", "list", "--json")).document()["shards"]
    assert {replica["node"]: replica["role"] for replica in shard["replicas"]} == {
        "n1": "primary", "n2": "member", "n3": "member",
    }  # fmt: skip
    assert (shard["members_wanted"], shard["under_replicated"]) == (3, False)
    assert all(
        replica.keys() == {"node", "role", "status", "last_seq", "commit_seq", "lag"}
        for replica in shard["replicas"]
    )
    stats = (await bus_kv("status", "--json")).document()["stats"]
    assert stats["shards"][0]["members_wanted"] == 3
    for words in (("status",), ("shards", "list")):
        assert "n1,n2,n3" in (await bus_kv(*words)).text

    async def has_no_lag() -> bool:
        (shard,) = (await cluster.bus.ok("stats"))["shards"]
        lags = [replica["lag"] for replica in shard["replicas"]]
        return lags == [0, 0, 0] and all(r["commit_seq"] == 2 for r in shard["replicas"])

    await until(has_no_lag)


async def test_a_shard_with_too_few_members_is_shown(cluster: Cluster, bus_kv: Command) -> None:
    cluster.kill("n3")

    async def is_short() -> bool:
        return "n3" not in (await cluster.shard())["members"]

    await until(is_short)
    (shard,) = (await bus_kv("shards", "list", "--json")).document()["shards"]
    assert (shard["under_replicated"], shard["members"]) == (True, ["n1", "n2"])

    async def row() -> list[str]:
        return (await bus_kv("status")).text.splitlines()[-1].split()

    async def is_level() -> bool:
        """By its newest heartbeat n2 has what the primary has."""
        return (await row())[-1] == "-"

    await until(is_level)
    header = (await bus_kv("status")).text.splitlines()[-2].split()
    assert dict(zip(header, await row(), strict=True)) == {
        "shard": "s1", "primary": "n1", "members": "n1,n2", "learners": "-", "missing": "1",
        "lag": "-",
    }  # fmt: skip
    ran = await bus_kv("doctor", "--json")
    checks = {check["check"]: check for check in ran.document()["checks"]}
    assert ran.code == 1
    assert {name for name, check in checks.items() if not check["ok"]} == {"nodes", "members"}
    assert "n3 is down" in checks["nodes"]["found"]
    assert "s1" in checks["members"]["found"]
    cluster.restart("n3")
    await until_whole(cluster)
    assert (await bus_kv("doctor")).code == 0


# ---- doctor ----


async def test_a_healthy_cluster_has_no_findings(bus_kv: Command) -> None:
    ran = await bus_kv("doctor")
    assert ran.code == 0
    assert "PROBLEM" not in ran.text
    checks = (await bus_kv("doctor", "--json")).document()["checks"]
    assert [check["check"] for check in checks] == [
        "nodes", "coordinator", "map", "service", "members",
    ]  # fmt: skip
    assert all(check["ok"] for check in checks)
    nothing = await bus_kv("doctor", "--restore-map", "--yes")
    assert (nothing.code, nothing.err.split(":")[1]) == (1, " MALFORMED_REQUEST")
    assert "nothing is lost" in nothing.err


async def test_a_map_that_the_store_has_lost_is_restored_from_the_nodes(
    cluster: Cluster, bus_kv: Command
) -> None:
    jetstream = cluster.bus.client.jetstream()
    store = await jetstream.key_value(Subjects(cluster.root).bucket)
    old = (await store.get("map")).value
    assert old is not None
    await bus_kv("put", "k", "v")
    await bus_kv("failover", "run", "s1")
    newest = (await until_whole(cluster))["epoch"]
    cluster.kill("c1")
    await store.put("map", old)
    cluster.restart("c1")

    async def is_noticed() -> bool:
        checks = (await bus_kv("doctor", "--json")).document()["checks"]
        return any(check["check"] == "map" and not check["ok"] for check in checks)

    await until(is_noticed, 30)
    assert "bus-kv doctor --restore-map" in (await bus_kv("doctor")).text
    for stdin in (b"", b"n\n"):
        asked = await bus_kv("doctor", "--restore-map", stdin=stdin)
        assert asked.code == 1
        assert "bus-kv: NOT_CONFIRMED: nothing was changed" in asked.err
    restored = await bus_kv("doctor", "--restore-map", stdin=b"y\n")
    assert restored.code == 0, restored.err
    assert restored.text.startswith("restored: map version ")
    await cluster.wait_healthy()
    assert (await until_whole(cluster))["epoch"] >= newest
    assert (await bus_kv("get", "k")).out == b"v"
    assert (await bus_kv("doctor")).code == 0
