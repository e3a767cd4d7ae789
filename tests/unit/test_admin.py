"""Administration at the coordinator: what is asked, when it is answered, and what is left when it was not done."""

from typing import Any

import pytest

from bus_kv.core.timers import NEVER_NS
from bus_kv.errors import BusKVError, OutcomeUnknown, ShardUnavailable
from bus_kv.knobs import Knobs
from bus_kv.protocol.codec import encode_cbor, encode_json
from bus_kv.protocol.messages import Heartbeat
from bus_kv.protocol.shard_map import Keyspace, Member, Shard, ShardMap, ShardState
from coordinator.machine.admin import WAIT_NS, Admin
from coordinator.machine.failovers import Failovers
from coordinator.machine.plan import Heard

MEMBERS = (Member("n1", "i1"), Member("n2", "i2"))


def shard_map(version: int = 7, primary: str = "n1", epoch: int = 3, **keyspace: Any) -> ShardMap:
    shard = Shard("s1", "default", b"", None, epoch, "t", MEMBERS, primary, ShardState.ACTIVE)
    return ShardMap(version, keyspaces={"default": Keyspace(**keyspace)}, shards={"s1": shard})


class Desk:
    """An administration and what it has answered."""

    def __init__(self) -> None:
        self.heard = Heard()
        self.admin = Admin(self.heard, Failovers("c1"), Knobs())
        self.answers: list[Any] = []

    def ask(self, verb: str, *, map: ShardMap | None = None, **fields: Any) -> None:
        body = encode_json(fields)
        self.admin.on_request(verb, body, map or shard_map(), 0, self.answers.append)

    @property
    def codes(self) -> list[str]:
        return [a.code if isinstance(a, BusKVError) else "OK" for a in self.answers]


ORDERS: list[tuple[str, dict[str, Any], ShardMap]] = [
    ("failover", {"shard": "s1"}, shard_map(8, "n2", 4)),
    ("transfer", {"shard": "s1", "to": "n2"}, shard_map(8, "n2", 4)),
    ("config", {"keyspace": "default", "consistency": "one"}, shard_map(8, consistency="one")),
]


@pytest.mark.parametrize(("verb", "fields", "done"), ORDERS)
def test_an_order_is_answered_once_it_is_in_effect(
    verb: str, fields: dict[str, Any], done: ShardMap
) -> None:
    desk = Desk()
    desk.ask(verb, **fields)
    desk.admin.look(shard_map(), 1)
    assert desk.answers == []
    desk.admin.look(done, 2)
    assert desk.codes == ["OK"]
    assert desk.admin.next_ns() == NEVER_NS


@pytest.mark.parametrize(("verb", "fields", "done"), ORDERS)
@pytest.mark.parametrize("leads", [True, False])
def test_an_order_that_takes_too_long_is_forgotten_also_by_a_coordinator_that_leads_no_more(
    verb: str, fields: dict[str, Any], done: ShardMap, leads: bool
) -> None:
    desk = Desk()
    desk.ask(verb, **fields)
    desk.admin.look(shard_map() if leads else None, WAIT_NS - 1)
    assert desk.answers == []
    desk.admin.look(shard_map() if leads else None, WAIT_NS)
    (late,) = desk.answers
    assert isinstance(late, OutcomeUnknown)
    assert desk.admin.next_ns() == NEVER_NS
    heard = desk.heard
    assert (heard.failovers, heard.transfers, heard.settings) == (set(), {}, {})


@pytest.mark.parametrize(
    ("verb", "fields", "code"),
    [
        ("fly", {}, "UNKNOWN_VERB"),
        ("failover", {}, "SHARD_UNKNOWN"), ("failover", {"shard": "s9"}, "SHARD_UNKNOWN"),
        ("failover", {"shard": "s1", "to": "n2"}, "MALFORMED_REQUEST"),
        ("transfer", {"shard": "s1"}, "NODE_UNKNOWN"),
        ("transfer", {"shard": "s1", "to": "n9"}, "NODE_UNKNOWN"),
        ("config", {"keyspace": "x"}, "KEYSPACE_UNKNOWN"),
        ("config", {"consistency": "some"}, "MALFORMED_REQUEST"),
        ("config", {"replication_factor": 0}, "MALFORMED_REQUEST"),
        ("config", {"replication_factor": "3"}, "MALFORMED_REQUEST"),
        ("restore", {}, "MALFORMED_REQUEST"), ("check", {"x": 1}, "MALFORMED_REQUEST"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_at_once(
    verb: str, fields: dict[str, Any], code: str
) -> None:
    desk = Desk()
    desk.ask(verb, **fields)
    assert desk.codes == [code]
    assert desk.admin.next_ns() == NEVER_NS


def test_without_a_map_nothing_is_taken_on() -> None:
    desk = Desk()
    desk.admin.on_request("failover", encode_cbor({"shard": "s1"}), None, 0, desk.answers.append)
    assert isinstance(desk.answers[0], ShardUnavailable)


def test_a_look_at_the_map_tells_whether_nodes_remember_a_newer_one() -> None:
    desk = Desk()
    desk.ask("check")
    desk.admin.look(shard_map(), 1)
    desk.heard.beats["n1"] = Heartbeat("n1", "i1", (1, "r"), map_version=9)
    desk.ask("check")
    desk.admin.look(shard_map(), 2)
    assert desk.answers == [
        {"map_version": 7, "is_behind": False}, {"map_version": 7, "is_behind": True},
    ]  # fmt: skip
