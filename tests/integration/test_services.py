"""Discovery by NATS' service framework (ADR-32): `$SRV.PING`, `INFO` and `STATS` of every process."""

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import jsonschema
import pytest
import pytest_asyncio

from tests.support.cluster import Cluster, cluster_on

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAME = {"type": "string", "pattern": r"^[A-Za-z0-9_-]+$"}
TEXT_MAP = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
IDENTITY = {
    "name": NAME,
    "id": {"type": "string", "minLength": 1},
    "version": {
        "type": "string",
        "pattern": r"^\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?$",
    },
    "metadata": TEXT_MAP,
}
ENDPOINT = {"name": NAME, "subject": {"type": "string", "minLength": 1}, "queue_group": NAME}


def schema(verb: str, **more: Any) -> dict[str, Any]:
    """A response as the `nats` command demands it: every field there, and of its type."""
    properties = {"type": {"const": f"io.nats.micro.v1.{verb}_response"}, **IDENTITY, **more}
    return closed(properties)


def closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(properties),
        "additionalProperties": False,
    }  # fmt: skip


SCHEMAS = {
    "PING": schema("ping"),
    "INFO": schema(
        "info",
        description={"type": "string"},
        endpoints={"type": "array", "minItems": 1,
                   "items": closed({**ENDPOINT, "metadata": TEXT_MAP})},
    ),
    "STATS": schema(
        "stats",
        started={"type": "string", "format": "date-time",
                 "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$"},
        endpoints={
            "type": "array",
            "minItems": 1,
            "items": closed({
                **ENDPOINT, "num_requests": COUNT, "num_errors": COUNT,
                "last_error": {"type": "string"}, "processing_time": COUNT,
                "average_processing_time": COUNT,
            }),
        },
    ),
}  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(
    nats_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Cluster]:
    async with cluster_on(nats_url, tmp_path_factory.mktemp("services"), nodes=2) as cluster:
        yield cluster


async def discover(cluster: Cluster, subject: str, count: int) -> list[dict[str, Any]]:
    """The first `count` answers to a subject of discovery that come from this cluster."""
    client = cluster.bus.client
    inbox = client.new_inbox()
    answers = await client.subscribe(inbox)
    await client.publish(subject, b"", reply=inbox)
    found: list[dict[str, Any]] = []
    while len(found) < count:
        answer = json.loads((await answers.next_msg(5)).data)
        if answer["metadata"].get("root") == cluster.root:
            found.append(answer)
    await answers.unsubscribe()
    return found


@pytest.mark.parametrize("verb", SCHEMAS)
async def test_every_process_answers_on_all_three_subjects(cluster: Cluster, verb: str) -> None:
    everyone = await discover(cluster, f"$SRV.{verb}", 3)
    assert sorted(a["name"] for a in everyone) == [
        "bus_kv-coordinator", "bus_kv-node", "bus_kv-node",
    ]  # fmt: skip
    nodes = await discover(cluster, f"$SRV.{verb}.bus_kv-node", 2)
    assert {a["metadata"]["node"] for a in nodes} == {"n1", "n2"}
    for known in everyone:
        (alone,) = await discover(cluster, f"$SRV.{verb}.{known['name']}.{known['id']}", 1)
        assert alone["id"] == known["id"]
        jsonschema.validate(alone, SCHEMAS[verb])


async def test_each_instance_has_its_own_id_and_a_restarted_one_a_new_one(
    nats_url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    async with cluster_on(nats_url, tmp_path_factory.mktemp("id"), nodes=1) as cluster:
        before = await discover(cluster, "$SRV.PING.bus_kv-node", 1)
        cluster.restart("n1")
        await cluster.wait_healthy()
        after = await discover(cluster, "$SRV.PING.bus_kv-node", 1)
        assert before[0]["id"] != after[0]["id"]


async def test_info_tells_how_to_reach_each_verb(cluster: Cluster) -> None:
    for node in await discover(cluster, "$SRV.INFO.bus_kv-node", 2):
        subjects = {e["name"]: e["subject"] for e in node["endpoints"]}
        for verb in ("get", "put", "delete", "batch", "scan", "health", "stats", "map"):
            assert subjects[verb] == f"{cluster.root}.{verb}"
        assert node["description"]
        health = await cluster.bus.ok("health")
        assert node["metadata"]["value_bytes_max"] == str(health["value_bytes_max"])
        assert len(json.dumps(node)) < 16_384


async def test_stats_count_requests_and_failures(cluster: Cluster) -> None:
    before = await _counters(cluster)
    for _ in range(5):
        await cluster.bus.ok("put", key="a", value="1")
    await cluster.bus.ask("get")
    after = await _counters(cluster)
    assert after["put"][0] - before["put"][0] == 5
    assert after["put"][1] == before["put"][1]
    assert (after["get"][0] - before["get"][0], after["get"][1] - before["get"][1]) == (1, 1)
    failing = [
        endpoint["last_error"]
        for node in await discover(cluster, "$SRV.STATS.bus_kv-node", 2)
        for endpoint in node["endpoints"]
        if endpoint["last_error"]
    ]
    assert any(re.match(r"400:\s*MALFORMED_REQUEST", text) for text in failing)


async def _counters(cluster: Cluster) -> dict[str, tuple[int, int]]:
    """Verb -> (requests, failures) of both nodes together."""
    totals: dict[str, tuple[int, int]] = {}
    for node in await discover(cluster, "$SRV.STATS.bus_kv-node", 2):
        for endpoint in node["endpoints"]:
            requests, failures = totals.get(endpoint["name"], (0, 0))
            totals[endpoint["name"]] = (
                requests + endpoint["num_requests"], failures + endpoint["num_errors"]
            )  # fmt: skip
    return totals
