"""Single stories in the simulator: one fault at one exact moment, and how it must end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cbor2
import pytest

from bus_kv.core.machine import Received
from bus_kv.knobs import Knobs
from bus_kv.protocol.codec import encode_json
from tests.simulator.cluster import Cluster
from tests.simulator.shape import Shape
from tests.simulator.traces import FOLDER, STORIES, text_of
from tests.simulator.world import MILLISECOND_NS, SECOND_NS, START_NS, World

if TYPE_CHECKING:
    from bus_kv.core.machine import Publish


def quiet_cluster(nodes: int) -> Cluster:
    """A cluster in which nothing fails by itself."""
    knobs = Knobs(heartbeat_interval_s=1.0, layout_wait_s=0.5, lease_s=1.0)
    shape = Shape(nodes, 1, 0, 0.0, 0.0, 0.0, SECOND_NS, knobs)
    cluster = Cluster(World(1), shape)
    cluster.start()
    return cluster


def tells_opened(message: Publish) -> bool:
    is_answer = message.subject.startswith("_INBOX.") and message.body[:1] != b"{"
    return is_answer and cbor2.loads(message.body).get("type") == "opened"


def test_a_primary_killed_after_opening_and_before_telling_gets_a_new_epoch() -> None:
    """Its opening entry is on disk, so the epoch can neither be opened again nor resumed (found by a seed: the
    coordinator asked it for ever to open the epoch that it had opened)."""
    cluster = quiet_cluster(nodes=1)
    world, node = cluster.world, cluster.nodes[0]

    def die_instead(message: Publish) -> None:
        if tells_opened(message):
            node.crash()
            node.cut_out = True
            world.after(SECOND_NS, come_back)

    def come_back() -> None:
        node.cut_out = False
        cluster.start_node(node)

    node.tap = die_instead
    world.run_until(START_NS + 30 * SECOND_NS, done=lambda: cluster.is_serving)
    assert cluster.is_serving
    assert cluster.map().shards["s1"].epoch == 2


def test_a_shard_that_never_served_goes_to_another_node_when_its_first_dies() -> None:
    cluster = quiet_cluster(nodes=2)
    world, first = cluster.world, cluster.nodes[0]

    def die_instead(message: Publish) -> None:
        if tells_opened(message):
            first.crash()
            first.cut_out = True

    first.tap = die_instead
    world.run_until(START_NS + 30 * SECOND_NS, done=lambda: cluster.is_serving)
    assert cluster.is_serving
    assert cluster.map().shards["s1"].primary == "n2"


def test_a_node_alone_in_the_world_recovers_from_a_kill_within_seconds() -> None:
    cluster = quiet_cluster(nodes=1)
    world, node = cluster.world, cluster.nodes[0]
    world.run_until(START_NS + 10 * SECOND_NS, done=lambda: cluster.is_serving)
    node.crash()
    cluster.start_node(node)
    world.run_until(START_NS + 20 * SECOND_NS, done=lambda: cluster.is_serving)
    assert cluster.is_serving
    assert cluster.map().shards["s1"].epoch == 2


@pytest.mark.parametrize("name", STORIES)
def test_a_story_goes_as_its_trace_says(name: str) -> None:
    """When a change of the protocol is meant, `python -m tests.simulator.traces` writes the traces anew."""
    assert (FOLDER / f"{name}.txt").read_text() == text_of(name)


def test_a_forward_that_is_lost_just_before_a_new_epoch_is_sent_again() -> None:
    """Nobody answers it, and the map changes before anybody is suspected: it must not wait for its whole time."""
    cluster = quiet_cluster(nodes=3)
    world, (primary, _, gateway) = cluster.world, cluster.nodes
    world.run_until(START_NS + 10 * SECOND_NS, done=lambda: cluster.is_serving)
    assert cluster.map().shards["s1"].primary == "n1"
    answers: list[bytes] = []

    def note(message: Publish) -> None:
        if message.subject == reply:
            answers.append(message.body)

    reply = f"_INBOX.n3.{gateway.life}.0"
    gateway.tap = note
    primary.cut_in = True
    put = Received("verb", "put", b'{"key":"a","value":"1"}', reply)
    gateway.receive(gateway.life, put)
    sent_ns = world.now_ns
    world.run_until(sent_ns + 20 * MILLISECOND_NS, done=lambda: False)
    primary.cut_in = False
    transfer = encode_json({"shard": "s1", "to": "n2"})
    cluster.bus.publish(gateway, "sim.admin.transfer", transfer, reply)
    world.run_until(sent_ns + 10 * SECOND_NS, done=lambda: bool(answers))
    assert b'"version"' in answers[0]
    assert world.now_ns < sent_ns + SECOND_NS
