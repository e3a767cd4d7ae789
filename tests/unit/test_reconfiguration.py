"""Reconfiguration, step by step: who is sealed, what is opened, and what proves that a change of the map was made."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

from bus_kv.core.machine import (
    AppendCompleted,
    Publish,
    Received,
    Request,
    Responded,
    StoreCas,
    Stored,
    StoreGet,
)  # fmt: skip
from bus_kv.knobs import MILLISECOND_NS, SECOND_NS, Knobs
from bus_kv.protocol.codec import decode_cbor, encode_cbor, encode_json
from bus_kv.protocol.messages import Heartbeat, ReplicaReport
from bus_kv.protocol.shard_map import (
    Configuration,
    Keyspace,
    Member,
    Node,
    NodeState,
    Shard,
    ShardMap,
    ShardState,
    from_document,
    shard_to_document,
    to_document,
)  # fmt: skip
from bus_kv.subjects import Subjects
from coordinator.machine import plan
from coordinator.machine.attempt import Attempt
from coordinator.machine.coordinator import CoordinatorConfig, CoordinatorMachine
from coordinator.machine.plan import Heard
from coordinator.machine.roles import Roles, next_roles, whom_to_ask
from nodes.machine.node import NodeConfig, NodeMachine
from tests.simulation import test_planted_replication as planted

if TYPE_CHECKING:
    from collections.abc import Callable

MEMBERS = tuple(Member(f"n{i}", f"i{i}") for i in range(1, 6))


def shard_of(members: int = 3, **fields: Any) -> Shard:
    base = Shard(
        "s1", "default", b"", None, 5, "t5", MEMBERS[:members], "n1", ShardState.ACTIVE
    )  # fmt: skip
    return replace(base, **fields)


def map_of(shard: Shard, factor: int = 3, nodes: int = 5) -> ShardMap:
    known = {m.node: Node(m.node, m.incarnation, NodeState.UP) for m in MEMBERS[:nodes]}
    keyspaces = {"default": Keyspace(replication_factor=factor)}
    return ShardMap(7, shard.epoch, "w", keyspaces, {shard.id: shard}, known)


def beat(
    node: int, shard: Shard, status: str = "following", seq: int = 10, **fields: Any
) -> Heartbeat:
    values = {"epoch": shard.epoch, "token": shard.token, "last": (shard.epoch, seq), **fields}
    report = ReplicaReport(
        "s1", status=status, commit_seq=seq, folded=0, keys=0, bytes=0, operations=0, **values
    )
    return Heartbeat(f"n{node}", f"i{node}", (1, "r"), shards=[report])


def heard_of(shard: Shard, *beats: Heartbeat) -> Heard:
    del shard
    return Heard(beats={b.node: b for b in beats})


def all_well(shard: Shard) -> Heard:
    """Every member says what it should."""
    names = [int(m.node[1:]) for m in (*shard.members, *shard.learners)]
    beats = [beat(n, shard, "active" if f"n{n}" == shard.primary else "following") for n in names]
    return heard_of(shard, *beats)


# ---- step 1: the record ----


def test_an_unfinished_attempt_is_never_what_has_to_be_sealed() -> None:
    active = shard_of()
    first = plan.reconfigured(active, Roles(MEMBERS[1:3], "n2"), 6, "t6")
    second = plan.reconfigured(first, Roles(MEMBERS[2:3], "n3"), 7, "t7")
    wanted = Configuration(5, "t5", MEMBERS[:3])
    assert first.last_active == second.last_active == wanted
    assert (first.attempts, second.attempts) == ((), ((6, "t6"),))


@pytest.mark.parametrize(("members", "enough"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3)])
def test_as_many_are_sealed_as_no_majority_can_avoid(members: int, enough: int) -> None:
    shard = plan.reconfigured(shard_of(members), Roles(MEMBERS[:members], "n1"), 6, "t6")
    attempt = Attempt(shard, 0, 0)
    for i, member in enumerate(shard.members):
        assert attempt.is_sealed is (i >= enough)
        attempt.on_answer(member, {"type": "sealed", "epoch": 6, "token": "t6", "last": [5, i]})


def test_the_new_primary_is_sent_to_the_longest_sealed_log() -> None:
    attempt = Attempt(plan.reconfigured(shard_of(), Roles(MEMBERS[1:3], "n2"), 6, "t6"), 0, 0)
    for member, last in ((MEMBERS[1], [4, 99]), (MEMBERS[2], [5, 3])):
        fields = {"type": "sealed", "epoch": 6, "token": "t6", "last": last}
        attempt.on_answer(member, fields)
    ((to, message),) = attempt.messages()
    assert to == MEMBERS[1]
    assert (message["best"], message["source"]) == ((5, 3), ["n3", "i3"])


def test_answers_of_another_attempt_count_for_nothing() -> None:
    attempt = Attempt(plan.reconfigured(shard_of(), Roles(MEMBERS[1:3], "n2"), 6, "t6"), 0, 0)
    attempt.on_answer(MEMBERS[1], {"type": "sealed", "epoch": 6, "token": "other", "last": [5, 3]})
    attempt.on_answer(MEMBERS[1], {"type": "opened", "epoch": 5, "token": "t5"})
    assert not attempt.sealed
    assert not attempt.opened


# ---- who should have which part ----


def test_nothing_changes_while_all_is_well() -> None:
    shard = shard_of()
    assert next_roles(shard, map_of(shard), all_well(shard)) is None


@pytest.mark.parametrize("status", ["restarted", "promised"])
def test_a_primary_that_cannot_go_on_is_replaced_by_the_longest_log(status: str) -> None:
    shard = shard_of()
    beats = [beat(1, shard, status, 10), beat(2, shard, seq=11), beat(3, shard, seq=12)]
    assert next_roles(shard, map_of(shard), heard_of(shard, *beats)) == Roles(MEMBERS[:3], "n3")


def test_a_silent_primary_leaves_and_two_of_three_go_on() -> None:
    shard = shard_of()
    heard = all_well(shard)
    heard.silent.add("n1")
    roles = next_roles(shard, map_of(shard), heard)
    assert roles == Roles(MEMBERS[1:3], "n2")


def test_without_enough_to_seal_nothing_is_begun() -> None:
    """It could only leave the map under an epoch that nobody can open."""
    shard = shard_of()
    heard = all_well(shard)
    heard.silent |= {"n1", "n2"}
    assert next_roles(shard, map_of(shard), heard) is None


def test_the_survivor_of_two_goes_on_alone() -> None:
    shard = shard_of(2)
    heard = all_well(shard)
    heard.silent.add("n1")
    assert next_roles(shard, map_of(shard, nodes=2), heard) == Roles(MEMBERS[1:2], "n2")


def test_another_disk_under_the_same_name_is_another_member() -> None:
    shard = shard_of()
    heard = all_well(shard)
    heard.beats["n3"] = replace(heard.beats["n3"], incarnation="new")
    assert next_roles(shard, map_of(shard), heard) == Roles(MEMBERS[:2], "n1")


def test_a_spare_node_becomes_a_learner_and_then_a_member() -> None:
    shard = shard_of(2)
    heard = all_well(shard)
    heard.beats["n4"] = replace(beat(4, shard), shards=[])
    roles = next_roles(shard, map_of(shard), heard)
    assert roles == Roles(MEMBERS[:2], "n1", (MEMBERS[3],))
    learning = replace(shard, epoch=6, token="t6", learners=roles.learners)
    assert next_roles(learning, map_of(learning), heard) is None, "not heard of as a learner yet"
    caught_up = all_well(learning)
    roles = next_roles(learning, map_of(learning), caught_up)
    assert roles == Roles((*MEMBERS[:2], MEMBERS[3]), "n1")


def test_a_learner_that_lags_stays_one() -> None:
    shard = shard_of(2, learners=(MEMBERS[3],))
    heard = all_well(shard)
    heard.beats["n1"].shards[0].commit_seq = 100_000
    assert next_roles(shard, map_of(shard), heard) is None


def test_a_stranded_member_leaves() -> None:
    shard = shard_of()
    heard = all_well(shard)
    heard.beats["n2"].shards[0].status = "stranded"
    assert next_roles(shard, map_of(shard), heard) == Roles((MEMBERS[0], MEMBERS[2]), "n1")


def test_a_stranded_member_is_no_part_of_a_takeover() -> None:
    """It is sealed, and could never take the opening entry: the shard would not be served again (found by a seed)."""
    shard = shard_of()
    heard = all_well(shard)
    heard.silent.add("n1")
    heard.beats["n2"].shards[0].status = "stranded"
    heard.beats["n2"].shards[0].last = (1, 1)
    assert next_roles(shard, map_of(shard), heard) == Roles((MEMBERS[2],), "n3")


def test_an_attempt_with_a_stranded_member_gives_way_to_one_without() -> None:
    """Its primary is sent to open again and again, and W of its members never have the opening entry (a seed found a
    shard of which one of two was stranded: it was not served again)."""
    tried = plan.reconfigured(shard_of(), Roles(MEMBERS[1:3], "n3"), 6, "t6")
    heard = heard_of(tried, beat(2, tried), beat(3, tried, "opening", seq=11))
    heard.running["s1"] = (6, "t6")
    assert next_roles(tried, map_of(tried), heard) is None, "it is under way"
    heard.beats["n3"].shards[0].status = "stranded"
    assert next_roles(tried, map_of(tried), heard) is None, "n3 said so before it was chosen"
    heard.beats["n2"].shards[0].status = "stranded"
    assert next_roles(tried, map_of(tried), heard) == Roles((MEMBERS[2],), "n3")


def test_a_smaller_replication_factor_lets_a_backup_go() -> None:
    shard = shard_of()
    roles = next_roles(shard, map_of(shard, factor=2), all_well(shard))
    assert roles is not None
    assert (len(roles.members), roles.primary) == (2, "n1")


def test_an_operator_moves_the_primary() -> None:
    shard = shard_of()
    heard = all_well(shard)
    heard.transfers["s1"] = "n3"
    assert next_roles(shard, map_of(shard), heard) == Roles(MEMBERS[:3], "n3")


def test_one_that_was_down_lately_is_passed_over_as_a_primary() -> None:
    shard = shard_of()
    beats = [beat(1, shard, "restarted"), beat(2, shard, seq=12), beat(3, shard, seq=11)]
    heard = heard_of(shard, *beats)
    heard.unproven |= {"n1", "n2"}
    assert next_roles(shard, map_of(shard), heard) == Roles(MEMBERS[:3], "n3")


def test_where_all_were_down_lately_one_of_them_goes_on() -> None:
    shard = shard_of()
    beats = [beat(1, shard, "restarted"), beat(2, shard, seq=12), beat(3, shard, seq=11)]
    heard = heard_of(shard, *beats)
    heard.unproven |= {"n1", "n2", "n3"}
    assert next_roles(shard, map_of(shard), heard) == Roles(MEMBERS[:3], "n2")


@pytest.mark.parametrize("why", ["held", "not heard since"])
def test_one_that_may_be_gone_again_is_no_learner(why: str) -> None:
    shard = shard_of(2)
    heard = all_well(shard)
    heard.beats["n4"] = replace(beat(4, shard), shards=[])
    if why == "held":
        heard.held.add("n4")
    else:
        heard.since_ns["s1"], heard.heard_ns = 10, lambda node: 9 if node == "n4" else 11
    assert next_roles(shard, map_of(shard), heard) is None
    assert whom_to_ask(map_of(shard), heard) == (set() if why == "held" else {"n4"})


def test_learners_and_their_primaries_are_asked() -> None:
    shard = shard_of(2, learners=(MEMBERS[3],))
    assert whom_to_ask(map_of(shard), all_well(shard)) == {"n1", "n4"}


def test_without_automatic_failover_a_silent_primary_stays_one_until_an_operator_says_so() -> None:
    shard = shard_of()
    heard = all_well(shard)
    heard.auto_failover = False
    heard.silent.add("n1")
    assert next_roles(shard, map_of(shard), heard) is None
    heard.failovers.add("s1")
    assert next_roles(shard, map_of(shard), heard) == Roles(MEMBERS[1:3], "n2")


def test_without_automatic_failover_a_restarted_primary_goes_on_itself() -> None:
    shard = shard_of()
    beats = [beat(1, shard, "restarted", 10), beat(2, shard, seq=12), beat(3, shard, seq=11)]
    heard = heard_of(shard, *beats)
    heard.auto_failover = False
    assert next_roles(shard, map_of(shard), heard) == Roles(MEMBERS[:3], "n1")


def test_all_shards_of_a_dead_node_change_hands_in_one_change_of_the_map() -> None:
    base = shard_of()
    shards = {f"s{i}": replace(base, id=f"s{i}", token=f"t{i}") for i in range(200)}
    map = replace(map_of(base, nodes=3), shards=shards)
    reports = [replace(beat(1, base).shards[0], id=id) for id in shards]
    beats = [replace(beat(n, base), shards=reports) for n in (1, 2, 3)]
    heard = heard_of(base, *beats)
    heard.silent.add("n1")
    map = replace(map, nodes={**map.nodes, "n1": replace(map.nodes["n1"], state=NodeState.DOWN)})
    tokens = count()
    changed = plan.next_map(map, heard, Knobs(), lambda: f"new{next(tokens)}")
    assert changed.map_version == map.map_version + 1
    assert {shard.primary for shard in changed.shards.values()} == {"n2"}
    assert {shard.state for shard in changed.shards.values()} == {ShardState.RECOVERING}
    assert len({shard.epoch for shard in changed.shards.values()}) == 200


def many_of(members: int, *, count: int = 50) -> tuple[ShardMap, Heard]:
    """So many shards under n1, all of them well; one member short where `members` is 2."""
    base = shard_of(members)
    shards = {f"s{i}": replace(base, id=f"s{i}", token=f"t{i}") for i in range(count)}
    beats = [Heartbeat("n3", "i3", (1, "r"))]
    for n in range(1, members + 1):
        report = beat(n, base, "active" if n == 1 else "following").shards[0]
        reports = [replace(report, id=id, token=shard.token) for id, shard in shards.items()]
        beats.append(replace(beat(n, base), shards=reports))
    return replace(map_of(base, nodes=3), shards=shards), heard_of(base, *beats)


def begun(map: ShardMap, heard: Heard) -> int:
    """How many shards the next map reconfigures."""
    changed = plan.next_map(map, heard, Knobs(), lambda: "new")
    return [shard.state for shard in changed.shards.values()].count(ShardState.RECOVERING)


def test_shards_that_are_served_take_their_steps_a_few_at_a_time() -> None:
    """Each stands still for a moment; a dead node's shards do so anyway, and are not made to wait."""
    map, heard = many_of(2)
    assert begun(map, heard) == plan.PLANNED_MAX
    heard.changing = plan.PLANNED_MAX - 1
    assert begun(map, heard) == 1
    heard.silent.add("n1")
    assert begun(map, heard) == 50


def test_shards_that_cannot_commit_are_not_made_to_wait() -> None:
    """Of two members the backup is dead: only without it can the primary go on."""
    map, heard = many_of(2)
    heard.silent.add("n2")
    heard.changing = plan.PLANNED_MAX
    assert begun(map, heard) == 50


# ---- what proves a change of the map ----


class Coordinator:
    """An active coordinator over a map in which n1, the primary of s1, has just restarted."""

    def __init__(self, knobs: Knobs | None = None, map: ShardMap | None = None) -> None:
        tokens = count()
        config = CoordinatorConfig("c1", Subjects("x"), lambda: f"token{next(tokens)}")
        self.machine = CoordinatorMachine(config, knobs or Knobs())
        self.now_ns = SECOND_NS
        self.map = map or map_of(shard_of(), nodes=3)
        self.machine.start(self.now_ns)
        self.answer(self.take(StoreGet), 0, None)
        cas = self.take(StoreCas)
        self.answer(cas, 1, cas.document)
        self.answer(self.take(StoreGet), 2, to_document(self.map))
        self.beat()

    def beat(self) -> None:
        statuses = {1: "restarted", 2: "following", 3: "following"}
        for node, status in statuses.items():
            heartbeat = beat(node, shard_of(), status)
            reports = [replace(heartbeat.shards[0], id=id) for id in self.map.shards]
            body = encode_json(replace(heartbeat, shards=reports).to_wire())
            self.step(Received("heartbeat", f"n{node}", body))

    def step(self, event: Any) -> None:
        self.machine.step(event, self.now_ns)

    def answer(self, question: Any, revision: int, document: Any) -> None:
        self.step(Stored(question.correlation, revision, document))

    def effects(self) -> list[Any]:
        return self.machine.take_ready(self.now_ns).effects

    def take(self, kind: Any) -> Any:
        return next(effect for effect in self.effects() if isinstance(effect, kind))

    def pass_ms(self, ms: int) -> None:
        self.now_ns += ms * MILLISECOND_NS
        self.machine.on_deadline(self.now_ns)


def seals(effects: list[Any]) -> list[str]:
    requests = [effect for effect in effects if isinstance(effect, Request)]
    bodies = [decode_cbor(request.body) for request in requests]
    return [body["type"] for body in bodies if body["type"] == "seal"]


def test_nothing_is_sealed_before_the_change_is_known_to_be_made() -> None:
    coordinator = Coordinator()
    cas = coordinator.take(StoreCas)
    assert cas.document["shards"]["s1"]["state"] == "recovering"
    coordinator.step(Stored(cas.correlation, failure="no answer"))
    coordinator.pass_ms(300)
    effects = coordinator.effects()
    assert seals(effects) == []
    question = next(effect for effect in effects if isinstance(effect, StoreGet))
    coordinator.answer(question, 3, cas.document)
    assert len(seals(coordinator.effects())) == 3, "the map shows the own writer"


def test_a_change_that_another_made_is_not_ones_own() -> None:
    coordinator = Coordinator()
    cas = coordinator.take(StoreCas)
    coordinator.step(Stored(cas.correlation, failure="no answer"))
    coordinator.pass_ms(300)
    question = coordinator.take(StoreGet)
    other = {**cas.document, "writer": "somebody else"}
    coordinator.answer(question, 3, other)
    assert seals(coordinator.effects()) == []


def test_only_the_attempt_that_opened_becomes_active() -> None:
    shard = shard_of(state=ShardState.RECOVERING, last_active=Configuration(4, "t4", MEMBERS[:3]))
    old, heard = map_of(shard), all_well(shard)
    heard.running = {"s1": (5, "t5")}
    heard.opened = {"s1": (5, "another")}
    assert plan.next_map(old, heard, Knobs(), lambda: "w") is old
    heard.opened = {"s1": (5, "t5")}
    new = plan.next_map(old, heard, Knobs(), lambda: "w")
    assert new.shards["s1"].state is ShardState.ACTIVE


# ---- attempts that come to nothing ----


def answer_requests(coordinator: Coordinator, effects: list[Any], answers: dict[str, Any]) -> None:
    """Answer the questions to these nodes."""
    for effect in effects:
        node = effect.subject.split(".")[2] if isinstance(effect, Request) else ""
        if node in answers:
            coordinator.step(Responded(effect.correlation, encode_cbor(answers[node])))


def test_a_primary_that_cannot_get_the_longest_log_makes_way_for_who_has_it() -> None:
    coordinator = Coordinator()
    cas = coordinator.take(StoreCas)
    record = cas.document["shards"]["s1"]
    epoch, token, primary = record["epoch"], record["token"], record["primary"]
    assert primary == "n1"
    coordinator.answer(cas, 3, cas.document)
    sealed = {"type": "sealed", "epoch": epoch, "token": token}
    ends = {"n1": {**sealed, "last": [5, 10]}, "n3": {**sealed, "last": [5, 3000]}}
    answer_requests(coordinator, coordinator.effects(), ends)
    refusal = {"type": "refused", "reason": "trimmed", "unreached": [epoch, token]}
    answer_requests(coordinator, coordinator.effects(), {"n1": refusal})
    again = coordinator.take(StoreCas).document["shards"]["s1"]
    assert (again["epoch"], again["primary"]) == (epoch + 1, "n3")


def test_a_new_primary_says_at_once_that_the_longest_log_begins_too_far_behind() -> None:
    node = NodeMachine(NodeConfig("n2", "i2", (1, "r"), Subjects("x"), 1 << 20), Knobs())
    node.new_replica(shard_of()).promise(5, "t5")
    record = plan.reconfigured(shard_of(), Roles(MEMBERS[:3], "n2"), 6, "t6")
    message = {
        "type": "open", "record": shard_to_document(record), "best": (5, 9), "source": ["n1", "i1"]
    }  # fmt: skip
    node.step(Received("node", "n2", encode_cbor(message), "reply"), SECOND_NS)
    effects = node.take_ready(SECOND_NS).effects
    [question] = [effect for effect in effects if isinstance(effect, Request)]
    trimmed = encode_cbor({"type": "trimmed"})
    node.step(Responded(question.correlation, trimmed), SECOND_NS)
    [refusal] = replies(node.take_ready(SECOND_NS).effects)
    assert (refusal["type"], refusal["unreached"]) == ("refused", [6, "t6"])


def test_the_record_stays_small_while_nodes_beat_and_never_answer() -> None:
    """For a day: attempts follow one another ever more slowly."""
    coordinator = Coordinator(Knobs(heartbeat_interval_s=60.0))
    begun: list[int] = []
    while coordinator.now_ns < 24 * 3600 * SECOND_NS:
        while effects := coordinator.effects():
            for effect in effects:
                if isinstance(effect, StoreCas) and effect.key == "map":
                    begun.append(coordinator.now_ns)
                    coordinator.map = from_document(effect.document)
                    coordinator.answer(effect, 3 + len(begun), effect.document)
                elif isinstance(effect, StoreCas):
                    coordinator.answer(effect, 3, effect.document)
                elif isinstance(effect, StoreGet):
                    coordinator.answer(effect, 3 + len(begun), to_document(coordinator.map))
        coordinator.pass_ms(60_000)
        coordinator.beat()
    attempts = coordinator.map.shards["s1"].attempts
    assert len(attempts) == len(begun) - 1
    assert begun[1] - begun[0] <= 60 * SECOND_NS
    assert len(attempts) < 40


# ---- R1: the report of a seal ----


def test_a_seal_report_covers_what_is_still_on_its_way_to_the_disk() -> None:
    """It will be acknowledged: the answer waits for the disk, and names it."""
    config = NodeConfig("n2", "i2", (1, "r"), Subjects("x"), 1 << 20)
    node = NodeMachine(config, Knobs())
    shard = shard_of(token="t5")
    replica = node.new_replica(shard)
    replica.promise(5, "t5")
    for _ in range(2):
        ready = node.take_ready(SECOND_NS)
        if ready.append is not None:
            node.step(AppendCompleted(ready.append.ticket), SECOND_NS)
    primary = NodeMachine(NodeConfig("n1", "i1", (1, "r"), Subjects("x"), 1 << 20), Knobs())
    opening = primary.new_replica(shard)
    opening.open(replace(shard, state=ShardState.RECOVERING), 0)
    rows, _ = opening.take_rows()
    message = {
        "type": "append", "shard": "s1", "epoch": 5, "token": "t5", "from": "n1",
        "to": {"n1": "i1", "n2": "i2", "n3": "i3"}, "previous": (0, 0),
        "entries": [row.body for row in rows if hasattr(row, "body")], "commit": 0, "round": 0,
    }  # fmt: skip
    node.step(Received("replicate", "s1", encode_cbor(message)), SECOND_NS)
    in_flight = node.take_ready(SECOND_NS).append
    assert in_flight is not None
    later = plan.reconfigured(shard, Roles(MEMBERS[1:3], "n2"), 6, "t6")
    seal = {"type": "seal", "record": shard_to_document(later), "incarnation": "i2"}
    node.step(Received("node", "n2", encode_cbor(seal), "reply"), SECOND_NS)
    ready = node.take_ready(SECOND_NS)
    assert replies(ready.effects) == []
    assert ready.append is not None
    node.step(AppendCompleted(ready.append.ticket), SECOND_NS)
    (report,) = replies(node.take_ready(SECOND_NS).effects)
    assert (report["type"], report["last"]) == ("sealed", [5, 1])


def test_all_shards_of_a_takeover_are_sealed_by_one_message_to_each_member() -> None:
    shards = {id: shard_of(id=id) for id in ("s1", "s2")}
    coordinator = Coordinator(map=replace(map_of(shard_of(), nodes=3), shards=shards))
    cas = coordinator.take(StoreCas)
    coordinator.answer(cas, 3, cas.document)
    asked = [effect for effect in coordinator.effects() if isinstance(effect, Request)]
    bodies = [decode_cbor(request.body) for request in asked]
    assert [body["type"] for body in bodies] == ["seals"] * 3
    records = [item["record"] for item in bodies[1]["items"]]
    assert [record["id"] for record in records] == ["s1", "s2"]
    sealed = [
        {"type": "sealed", "epoch": r["epoch"], "token": r["token"], "last": [5, 10]}
        for r in records
    ]
    for request, items in zip(asked[:2], (sealed, [{}, sealed[1]]), strict=True):
        answer = encode_cbor({"type": "seals", "items": items})
        coordinator.step(Responded(request.correlation, answer))
    opened = [effect for effect in coordinator.effects() if isinstance(effect, Request)]
    assert [decode_cbor(r.body)["record"]["id"] for r in opened] == ["s2"], "s1 has one promise"


def test_promises_that_are_asked_for_together_are_told_together_once_they_are_durable() -> None:
    node = NodeMachine(NodeConfig("n2", "i2", (1, "r"), Subjects("x"), 1 << 20), Knobs())
    for id in ("s1", "s2"):
        node.new_replica(shard_of(id=id)).promise(5, "t5")
    later = [
        plan.reconfigured(shard_of(id=id), Roles(MEMBERS[1:3], "n2"), 6, f"t{id}")
        for id in ("s1", "s2", "s3")
    ]
    items = [{"record": shard_to_document(record), "incarnation": "i2"} for record in later]
    message = encode_cbor({"type": "seals", "items": items})
    node.step(Received("node", "n2", message, "reply"), SECOND_NS)
    ready = node.take_ready(SECOND_NS)
    assert replies(ready.effects) == []
    assert ready.append is not None
    assert [row.promised_epoch for row in ready.append.replicas] == [6, 6]
    node.step(AppendCompleted(ready.append.ticket), SECOND_NS)
    (answer,) = replies(node.take_ready(SECOND_NS).effects)
    told = [(item["type"], item.get("token")) for item in answer["items"]]
    assert told == [("sealed", "ts1"), ("sealed", "ts2"), ("refused", None)]


def replies(effects: list[Any]) -> list[dict[str, Any]]:
    sent = [e for e in effects if isinstance(e, Publish) and e.subject == "reply"]
    return [decode_cbor(publish.body) for publish in sent]


# ---- broken rules make these stories fail ----


@pytest.mark.parametrize(
    ("plant", "story"),
    [
        (planted.seals_the_pending_attempt, test_an_unfinished_attempt_is_never_what_has_to_be_sealed),
        (planted.too_few_sealed, lambda: test_as_many_are_sealed_as_no_majority_can_avoid(3, 2)),
        (planted.newest_heartbeat_wins, test_the_new_primary_is_sent_to_the_longest_sealed_log),
        (planted.unanswered_cas_is_success, test_nothing_is_sealed_before_the_change_is_known_to_be_made),
        (planted.report_leaves_out_what_is_in_flight, test_a_seal_report_covers_what_is_still_on_its_way_to_the_disk),
        (planted.active_cas_checks_only_the_state, test_only_the_attempt_that_opened_becomes_active),
    ],
)  # fmt: skip
def test_a_broken_rule_makes_its_story_fail(
    plant: Callable[[pytest.MonkeyPatch], None], story: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plant(monkeypatch)
    with pytest.raises((AssertionError, ValueError, StopIteration)):
        story()
