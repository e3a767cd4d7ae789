"""The verbs on the bus as a client in any language sees them: replies, failures, limits, exactly once."""

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.support.cluster import Bus, Cluster, assert_failure, cluster_on, unique, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEY_BYTES_MAX = 4096
VERBS: list[tuple[str, dict[str, Any]]] = [("get", {}), ("put", {"value": "1"}), ("delete", {})]
"""Each with what it needs besides a key."""
ENOUGH_TO_MEET_EVERY_NODE = 12
"""Any of three nodes may answer: so often that each does, but for one run in a hundred."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(
    nats_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Cluster]:
    """Three nodes, all members of shard s1; its primary is n1."""
    async with cluster_on(nats_url, tmp_path_factory.mktemp("contract"), nodes=3) as cluster:
        yield cluster


@pytest.fixture
def bus(cluster: Cluster) -> Bus:
    return cluster.bus


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    """A key of this test alone."""
    return unique(request.node.originalname)


# ---- one key ----


@pytest.mark.parametrize("codec", ["json", "cbor"])
async def test_a_key_lives_from_put_to_delete(bus: Bus, key: str, codec: str) -> None:
    def text(value: str) -> str | bytes:
        return value if codec == "json" else value.encode()

    created = await bus.ok("put", codec=codec, key=key, value="fruit")
    version = created["version"]
    assert created == {"version": version, "shard": "s1", "consistency": "quorum", "found": False}
    assert await bus.ok("get", codec=codec, key=key) == {
        "key": text(key), "found": True, "value": text("fruit"), "version": version,
        "shard": "s1", "node": "n1", "consistency": "quorum",
    }  # fmt: skip
    replaced = await bus.ok("put", codec=codec, key=key, value="tree")
    assert replaced["found"] is True
    assert replaced["version"] > version
    deleted = await bus.ok("delete", codec=codec, key=key)
    assert deleted["version"] > replaced["version"]
    assert deleted["found"] is True
    assert await bus.ok("get", codec=codec, key=key) == {
        "key": text(key), "found": False, "shard": "s1", "node": "n1", "consistency": "quorum",
    }  # fmt: skip


async def test_deleting_an_absent_key_writes_nothing(bus: Bus, key: str) -> None:
    before = await bus.ok("put", key=key + "-other", value="1")
    assert await bus.ok("delete", key=key) == {
        "version": None, "shard": "s1", "consistency": "quorum", "found": False,
    }  # fmt: skip
    after = await bus.ok("put", key=key + "-other", value="2")
    assert after["version"][1] == before["version"][1] + 1


async def test_json_carries_bytes_that_are_not_text_in_base64(bus: Bus, key: str) -> None:
    value = base64.b64encode(b"\xff\x00\xfe").decode()
    raw_key = base64.b64encode(key.encode() + b"\xff").decode()
    await bus.ok("put", key_b64=raw_key, value_b64=value)
    entry = await bus.ok("get", key_b64=raw_key)
    assert (entry["key_b64"], entry["value_b64"]) == (raw_key, value)
    assert "key" not in entry
    assert "value" not in entry


async def test_json_shows_text_that_came_in_base64_as_text(bus: Bus, key: str) -> None:
    await bus.ok("put", key_b64=base64.b64encode(key.encode()).decode(), value_b64="")
    assert (await bus.ok("get", key=key))["value"] == ""


async def test_both_codecs_see_the_same_data(bus: Bus, key: str) -> None:
    await bus.ok("put", key=key, value="größer ☃")
    assert (await bus.ok("get", codec="cbor", key=key))["value"] == "größer ☃".encode()


async def test_if_absent_writes_once(bus: Bus, key: str) -> None:
    await bus.ok("put", key=key, value="1", if_absent=True)
    reply = await bus.ask("put", key=key, value="2", if_absent=True)
    assert_failure(reply, "PRECONDITION_FAILED", 412, says="not absent")
    assert (await bus.ok("get", key=key))["value"] == "1"


@pytest.mark.parametrize("verb", ["put", "delete"])
async def test_if_version_writes_only_over_that_version(bus: Bus, key: str, verb: str) -> None:
    fields: dict[str, Any] = {"value": "3"} if verb == "put" else {}
    first = (await bus.ok("put", key=key, value="1"))["version"]
    second = (await bus.ok("put", key=key, value="2"))["version"]
    reply = await bus.ask(verb, key=key, if_version=first, **fields)
    assert_failure(reply, "PRECONDITION_FAILED", 412, says=str(second))
    assert (await bus.ok("get", key=key))["version"] == second
    assert (await bus.ok(verb, key=key, if_version=second, **fields))["found"] is True


async def test_if_version_of_an_absent_key_fails(bus: Bus, key: str) -> None:
    reply = await bus.ask("delete", key=key, if_version=[1, 1])
    assert_failure(reply, "PRECONDITION_FAILED", 412, says="absent")


async def test_a_lifetime_ends(bus: Bus, cluster: Cluster, key: str) -> None:
    await bus.ok("put", key=key, value="1", ttl_ms=200)
    expires_at = (await bus.ok("get", key=key)).get("expires_at")
    assert expires_at is None or isinstance(expires_at, int)
    await _until_absent(bus, key)
    scanned = await bus.ok("scan", prefix=key)
    assert scanned["items"] == []
    await bus.ok("put", key=key, value="2", if_absent=True)


async def test_a_later_put_without_a_lifetime_stays(bus: Bus, key: str) -> None:
    await bus.ok("put", key=key, value="1", ttl_ms=300)
    await bus.ok("put", key=key, value="2")
    await bus.ok("put", key=key + "-marker", value="1", ttl_ms=500)
    await _until_absent(bus, key + "-marker")
    entry = await bus.ok("get", key=key)
    assert entry["value"] == "2"
    assert "expires_at" not in entry


async def _until_absent(bus: Bus, key: str) -> None:
    async def is_absent() -> bool:
        return not (await bus.ok("get", key=key))["found"]

    await until(is_absent)


# ---- levels ----


async def test_a_one_read_says_how_old_its_state_is(bus: Bus, key: str) -> None:
    version = (await bus.ok("put", key=key, value="1"))["version"]
    entry = await bus.ok("get", key=key, consistency="one")
    assert entry["consistency"] == "one"
    assert entry["read"].keys() == {"epoch", "seq", "age_ms"}
    assert [entry["read"]["epoch"], entry["read"]["seq"]] >= entry.get("version", [0, 0])

    async def is_seen() -> bool:
        read = (await bus.ok("get", key=key, consistency="one"))["read"]
        return [read["epoch"], read["seq"]] >= version

    await until(is_seen)


async def test_all_is_met_by_three_members(bus: Bus, key: str) -> None:
    reply = await bus.ok("put", key=key, value="1", consistency="all")
    assert reply["consistency"] == "all"
    entry = await bus.ok("get", key=key, consistency="all")
    assert (entry["value"], entry["version"]) == ("1", reply["version"])
    assert entry["consistency"] == "all"


@asynccontextmanager
async def without_n3(nats_url: str, folder: Path, *, is_member: bool) -> AsyncIterator[Cluster]:
    """n3 of three members is dead: the shard waits for it, or has gone on without it."""
    misses_max = 1000 if is_member else 1
    async with cluster_on(nats_url, folder, nodes=3, heartbeat_misses_max=misses_max) as cluster:
        await cluster.lose("n3")
        if not is_member:
            await cluster.until_members("n1", "n2")
        yield cluster


@pytest.mark.parametrize("is_member", [True, False])
async def test_all_without_enough_members_is_written_at_quorum(
    nats_url: str, tmp_path: Path, is_member: bool
) -> None:
    put: dict[str, Any] = {
        "key": "a", "value": "1", "consistency": "all", "request_id": "me:1"
    }  # fmt: skip
    async with without_n3(nats_url, tmp_path, is_member=is_member) as cluster:
        bus = cluster.bus
        reply = await bus.ask("put", **put)
        assert_failure(reply, "CONSISTENCY_NOT_MET", 424, says="member")
        assert reply.fields["met"] == "quorum"
        entry = await bus.ok("get", key="a")
        assert (entry["value"], entry["version"]) == ("1", reply.fields["version"])
        # A repeat misses it again, and writes nothing.
        assert (await bus.ask("put", **put)).fields == reply.fields
        assert await bus.ok("get", key="a") == entry
        cluster.restart("n3")
        await cluster.until_members("n1", "n2", "n3")

        async def is_met() -> bool:
            again = await bus.ask("put", **put)
            assert again.fields["version"] == entry["version"]
            return again.code is None

        await until(is_met)


async def test_whoever_is_asked_tells_that_all_was_not_met(nats_url: str, tmp_path: Path) -> None:
    """Also a node that has to ask the primary, and of whatever is read."""
    requests: list[tuple[str, dict[str, Any]]] = [
        ("put", {"key": "a", "value": "2"}), ("get", {"key": "a"}), ("scan", {}),
        ("history", {"key": "a"}),
    ]  # fmt: skip
    async with without_n3(nats_url, tmp_path, is_member=True) as cluster:
        await cluster.bus.ok("put", key="a", value="1")
        asked = [cluster.bus.ask(verb, consistency="all", **f) for verb, f in requests * 6]
        for reply in await asyncio.gather(*asked):
            assert_failure(reply, "CONSISTENCY_NOT_MET", 424, says="member")
            assert reply.fields["met"] == "quorum"


# ---- sizes ----


@pytest.mark.parametrize("codec", ["json", "cbor"])
async def test_keys_have_at_most_4096_bytes(bus: Bus, key: str, codec: str) -> None:
    longest = key.ljust(KEY_BYTES_MAX, "x")
    await bus.ok("put", codec=codec, key=longest, value="1")
    for verb, fields in VERBS:
        reply = await bus.ask(verb, codec=codec, key=longest + "x", **fields)
        assert_failure(reply, "KEY_TOO_LARGE", 413, says="4096")
    assert (await bus.ok("get", codec=codec, key=longest))["found"] is True


async def test_the_largest_value_is_taken_through_every_node(bus: Bus, key: str) -> None:
    value_bytes_max = (await bus.ok("health"))["value_bytes_max"]
    longest_key, value = key.ljust(KEY_BYTES_MAX, "x"), b"v" * value_bytes_max
    for _ in range(ENOUGH_TO_MEET_EVERY_NODE):
        await bus.ok("put", codec="cbor", key=longest_key, value=value, ttl_ms=60_000)
        assert (await bus.ok("get", codec="cbor", key=longest_key))["value"] == value
    reply = await bus.ask("put", codec="cbor", key=key, value=value + b"v")
    assert_failure(reply, "VALUE_TOO_LARGE", 413, says=str(value_bytes_max))
    assert (await bus.ok("get", key=key))["found"] is False


async def test_what_does_not_fit_into_json_is_had_in_cbor(bus: Bus, key: str) -> None:
    value = b"\xff" * 900_000
    await bus.ok("put", codec="cbor", key=key, value=value)
    reply = await bus.ask("get", key=key)
    assert_failure(reply, "VALUE_TOO_LARGE", 413, says="ask in CBOR")
    assert (await bus.ok("get", codec="cbor", key=key))["value"] == value


# ---- exactly once ----


async def test_a_repeated_request_id_gives_the_first_result(bus: Bus, key: str) -> None:
    id = f"{unique('client')}:{2**64 - 1}"
    first = await bus.ok("put", key=key, value="1", request_id=id)
    await bus.ok("put", key=key, value="2")
    for body in ({"value": "1"}, {"value": "another"}, {"value": "3", "if_absent": True}):
        assert await bus.ok("put", key=key, request_id=id, **body) == first
    assert (await bus.ok("delete", key=key, request_id=id))["version"] == first["version"]
    assert (await bus.ok("get", key=key))["value"] == "2"


async def test_request_numbers_come_in_any_order_and_with_gaps(bus: Bus, key: str) -> None:
    client, numbers = unique("client"), [500, 3, 2**63, 499, 0, 77]
    firsts = [
        await bus.ok("put", key=key, value=str(n), request_id=f"{client}:{n}") for n in numbers
    ]
    again = [await bus.ok("put", key=key, value="x", request_id=f"{client}:{n}") for n in numbers]
    assert again == firsts
    assert (await bus.ok("get", key=key))["value"] == "77"


async def test_a_repeated_batch_gives_the_first_results(bus: Bus, key: str) -> None:
    id = f"{unique('client')}:9"
    ops = [{"op": "put", "key": f"{key}-{i}", "value": "1"} for i in range(3)]
    ops.append({"op": "delete", "key": f"{key}-0"})
    first = await bus.ok("batch", ops=ops, request_id=id)
    assert await bus.ok("batch", ops=ops, request_id=id) == first
    grown = [*ops, {"op": "put", "key": f"{key}-3", "value": "1"}]
    results = (await bus.ok("batch", ops=grown, request_id=id))["results"]
    assert results[:4] == first["results"]
    assert results[4]["found"] is False


async def test_a_failed_precondition_is_judged_again(bus: Bus, key: str) -> None:
    await bus.ok("put", key=key, value="1")
    fields: dict[str, Any] = {
        "key": key,
        "value": "2",
        "if_absent": True,
        "request_id": f"{unique('client')}:1",
    }
    assert (await bus.ask("put", **fields)).code == "PRECONDITION_FAILED"
    await bus.ok("delete", key=key)
    assert (await bus.ok("put", **fields))["found"] is False


# ---- shards ----


async def test_a_keyspace_that_is_not_there_is_named(bus: Bus, key: str) -> None:
    for verb, fields in VERBS:
        reply = await bus.ask(verb, keyspace="nope", key=key, **fields)
        assert_failure(reply, "KEYSPACE_UNKNOWN", 404, says="'nope'")
    assert (await bus.ask("scan", keyspace="nope")).code == "KEYSPACE_UNKNOWN"


async def test_a_shard_answers_on_its_own_subject(bus: Bus, cluster: Cluster, key: str) -> None:
    epoch = (await cluster.shard())["epoch"]
    ops = [{"op": "put", "key": key, "value": "1"}, {"op": "get", "key": key}]
    put, got = (await bus.ok("shard.s1.request", epoch=epoch, ops=ops))["results"]
    assert put == {
        "version": got["version"],
        "shard": "s1",
        "consistency": "quorum",
        "found": False,
    }
    assert got["value"] == "1"
    repeat = {"epoch": epoch, "ops": ops[:1], "request_id": f"{unique('client')}:1"}
    assert await bus.ok("shard.s1.request", **repeat) == await bus.ok("shard.s1.request", **repeat)


async def test_a_former_epoch_is_refused(bus: Bus, cluster: Cluster, key: str) -> None:
    epoch = (await cluster.shard())["epoch"] - 1
    for form in forms_of_a_request(key):
        reply = await bus.ask("shard.s1.request", epoch=epoch, **form)
        assert_failure(reply, "STALE_EPOCH", 421, retry=True, says="read the map")
    assert (await bus.ok("get", key=key))["found"] is False


async def test_whoever_does_not_know_an_epoch_cannot_tell_what_its_primary_does(
    bus: Bus, cluster: Cluster, key: str
) -> None:
    """A refusal for good would be wrong: the primary of that epoch may have the same request."""
    epoch = (await cluster.shard())["epoch"] + 1
    for form in forms_of_a_request(key):
        reply = await bus.ask("shard.s1.request", epoch=epoch, **form)
        assert_failure(reply, "OUTCOME_UNKNOWN", 504, retry=True, says="not known here")
    assert (await bus.ok("get", key=key))["found"] is False


def forms_of_a_request(key: str) -> list[dict[str, Any]]:
    return [{"ops": [{"op": "put", "key": key, "value": "1"}]}, {"scan": {}}]


async def test_health_and_stats_count_the_cluster(bus: Bus, cluster: Cluster) -> None:
    health, stats = await bus.ok("health"), await bus.ok("stats", codec="cbor")
    assert health["status"] == "ok"
    assert (health["nodes"], health["shards"]) == (3, 1)
    assert (stats["total_nodes"], stats["healthy_nodes"], stats["total_shards"]) == (3, 3, 1)


async def test_success_never_looks_like_a_failure_to_the_bench_of_the_cli(
    bus: Bus, cluster: Cluster, key: str
) -> None:
    epoch = (await cluster.shard())["epoch"]
    failing = [{"op": "delete", "key": key, "if_version": [9, 9]}, {"op": "get", "key": key}]
    asked = [
        await bus.ask(verb, **fields)
        for verb, fields in (
            ("put", {"key": key, "value": "1"}), ("get", {"key": key}), ("scan", {"prefix": key}),
            ("batch", {"ops": failing}), ("delete", {"key": key}), ("delete", {"key": key}),
            ("health", {}), ("stats", {}), ("map", {}),
            ("receipt", {"shard": "s1", "version": [epoch, 2]}),
            ("shard.s1.request", {"epoch": epoch, "ops": failing}),
            ("shard.s1.request", {"epoch": epoch, "scan": {}}),
        )
    ]  # fmt: skip
    for reply in asked:
        assert reply.code is None
        assert reply.body
        assert not reply.body.startswith(b"-")
        assert b"error" not in reply.body.lower()
        assert "Nats-Service-Error" not in reply.headers
