"""The client's machine alone: where gets at ONE go, how it follows the map, and what it sends once only."""

from typing import Any

import pytest

from bus_kv.client.calls import NoCoordinator
from bus_kv.client.results import Entry, Receipt
from bus_kv.client.session import LATE_NS_MIN, Session
from bus_kv.core.machine import Publish, Received, Request, Responded
from bus_kv.errors import (
    BusKVError,
    KeyspaceUnknown,
    NotPrimary,
    OutcomeUnknown,
    Overloaded,
    ShardUnavailable,
)  # fmt: skip
from bus_kv.knobs import KEY_BYTES_MAX, MILLISECOND_NS, SECOND_NS, Knobs
from bus_kv.protocol import batch as b
from bus_kv.protocol.batch import BatchReply, decode_batch
from bus_kv.protocol.codec import decode_cbor, encode_cbor, encode_json
from bus_kv.protocol.shard_map import Keyspace, Member, Shard, ShardMap, ShardState, delta
from bus_kv.subjects import Subjects

READ, WRITE = "bkv.shard.s1.read", "bkv.shard.s1.request"
MEMBERS = tuple(Member(f"n{i}", "i") for i in (1, 2, 3))


def shard_map(version: int, level: str = "quorum", epoch: int = 3) -> ShardMap:
    shard = Shard("s1", "default", b"", None, epoch, "t", MEMBERS, "n1", ShardState.ACTIVE)
    return ShardMap(
        version, keyspaces={"default": Keyspace(consistency=level)}, shards={"s1": shard}
    )


def map_of_three(version: int, state: ShardState = ShardState.ACTIVE) -> ShardMap:
    """Shards a and b under n1, c under n2; since version 8 under epoch 4, and n3."""
    epoch, first = (3, "n1") if version < 8 else (4, "n3")
    shards = {
        id: Shard(id, "default", start, end, epoch, "t", MEMBERS, primary, state)
        for id, start, end, primary in (
            ("a", b"", b"b", first), ("b", b"b", b"c", first), ("c", b"c", None, "n2"),
        )
    }  # fmt: skip
    return ShardMap(version, keyspaces={"default": Keyspace()}, shards=shards)


class Client:
    """A session that has read this map (version 7), and what it has sent and told."""

    def __init__(self, map: ShardMap | None = None) -> None:
        self.now_ns = 0
        self.outcomes: list[Any] = []
        self.said: list[Publish] = []
        self.session = Session(
            "c", Subjects(), Knobs(), 1 << 20, lambda _, outcomes: self.outcomes.extend(outcomes)
        )
        self.session.fetch_routes(0)
        (asked,) = self.sent()
        self.answer(asked, (map or shard_map(7)).public())

    def sent(self) -> list[Request]:
        effects = self.session.take_ready(self.now_ns).effects
        self.said += [effect for effect in effects if isinstance(effect, Publish)]
        return [effect for effect in effects if isinstance(effect, Request)]

    def answer(self, request: Request, fields: dict[str, Any] | None) -> None:
        body = None if fields is None else encode_cbor(fields)
        self.session.step(Responded(request.correlation, body), self.now_ns)

    def hear(self, change: dict[str, Any]) -> None:
        self.session.step(Received("map", "map", encode_json(change)), self.now_ns)

    def get(self, level: str | None = "one") -> Request:
        self.session.get(b"k", "get", self.now_ns, consistency=level)
        (request,) = self.sent()
        return request

    def put(self) -> Request:
        (request,) = self.put_to(b"k")
        return request

    def put_to(self, key: bytes) -> list[Request]:
        self.session.write(b.PUT, key, b"v", "put", self.now_ns)
        return self.sent()

    def later(self, delay_ms: int) -> list[Request]:
        self.now_ns += delay_ms * MILLISECOND_NS
        self.session.on_deadline(self.now_ns)
        return self.sent()


def found(**more: Any) -> dict[str, Any]:
    reply = BatchReply(bytes([b.FOUND]), 3, [42], values=[b"v"], read=(3, 42, 5))
    return {"batch": reply.to_wire(), **more}


def level_of(request: Request) -> str:
    return decode_batch(decode_cbor(request.body)["batch"]).consistency


def count_in(request: Request) -> int:
    return len(decode_batch(decode_cbor(request.body)["batch"]))


def found_all(request: Request) -> dict[str, Any]:
    count = count_in(request)
    reply = BatchReply(
        bytes([b.FOUND]) * count, 3, [42] * count, values=[b"v"] * count, read=(3, 42, 5)
    )
    return {"batch": reply.to_wire()}


# ---- coalescing ----


def test_gets_of_long_keys_travel_in_messages_that_fit() -> None:
    client, count = Client(), 800
    for i in range(count):
        key = b"%d" % i
        client.session.get(key.ljust(KEY_BYTES_MAX), "get", client.now_ns, consistency="quorum")
    requests = client.sent()
    assert all(len(request.body) <= 1 << 20 for request in requests)
    for request in requests:
        client.answer(request, found_all(request))
        requests += client.sent()
    assert len(client.outcomes) == count
    assert len({entry.key for entry in client.outcomes}) == count
    assert len(requests) < 8


def test_a_get_is_sent_again_as_it_was() -> None:
    client = Client()
    first = client.get("quorum")
    client.answer(first, ShardUnavailable("not now").to_body())
    (again,) = client.later(1000)
    for request in (first, again):
        batch = decode_batch(decode_cbor(request.body)["batch"])
        assert (batch.kinds, batch.keys, batch.values) == (bytes([b.GET]), [b"k"], [])


@pytest.mark.parametrize(
    "messages", [[64], [200], [128, 128], [150, 150], [500, 500]], ids=lambda m: sum(m)
)
def test_calls_travel_in_one_message_or_in_two_large_ones(messages: list[int]) -> None:
    """So that the nodes work on one while the client works on the other, round after round."""
    callers = sum(messages)
    client = Client()

    def ask(count: int) -> list[Request]:
        for _ in range(count):
            client.session.get(b"k", "get", client.now_ns)
        return client.sent()

    under_way = ask(callers)
    assert [*map(count_in, under_way)] == messages
    for _ in range(10):
        answered = under_way.pop(0)
        client.answer(answered, found_all(answered))
        under_way += ask(count_in(answered))  # each caller has its next question
        assert [*map(count_in, under_way)] == messages


def test_few_calls_wait_for_those_that_are_under_way() -> None:
    client = Client()
    first = client.get("quorum")
    few = Knobs().client_fill_operations // 2 - 1
    for _ in range(few):
        client.session.get(b"k", "get", client.now_ns)
    assert client.sent() == []
    client.answer(first, found_all(first))
    (second,) = client.sent()
    assert count_in(second) == few


def test_calls_that_trickle_in_leave_as_soon_as_they_are_worth_a_message() -> None:
    """Not only when an answer comes: one that was lost would hold up all that gather behind it."""
    client = Client()

    def ask(count: int) -> list[int]:
        for _ in range(count):
            client.session.get(b"k", "get", client.now_ns)
        return [*map(count_in, client.sent())]

    fill = Knobs().client_fill_operations // 2
    assert ask(2 * fill) == [fill, fill]
    assert [ask(1) for _ in range(fill - 1)] == [[]] * (fill - 1)
    assert ask(1) == [fill]


def test_few_calls_leave_when_an_answer_is_late() -> None:
    """A message that waits for a disk, say, is no reason for others to wait."""
    client, patience_ms = Client(), LATE_NS_MIN // MILLISECOND_NS
    slow = client.get("quorum")
    client.session.get(b"k", "get", client.now_ns)
    assert client.session.next_deadline_ns() == client.now_ns + LATE_NS_MIN
    assert client.later(patience_ms - 1) == []
    (quick,) = client.later(1)
    for message in (quick, slow):
        client.answer(message, found_all(message))


def test_what_is_usual_is_not_late() -> None:
    client, usual_ms = Client(), 40
    for _ in range(50):
        request = client.get("quorum")
        client.later(usual_ms)
        client.answer(request, found_all(request))
    client.get("quorum")
    client.session.get(b"k", "get", client.now_ns)
    assert client.later(usual_ms) == []
    assert len(client.later(usual_ms)) == 1


# ---- a primary that is silent ----


@pytest.mark.parametrize("level", ["quorum", "all"])
def test_only_at_all_is_silence_no_reason_to_send_again_soon(level: str) -> None:
    """It may be another member that is waited for: the primary will say so in its time."""
    client, knobs = Client(), Knobs()
    client.session.write(b.PUT, b"k", b"v", "put", client.now_ns, consistency=level)
    (sent,) = client.sent()
    assert client.later(knobs.suspect_after_ms) == []
    assert len(client.said) == 1, "it is suspected"
    client.later(knobs.suspect_after_ms)
    again = client.later(knobs.suspect_after_ms)
    assert len(again) == (level == "quorum")
    assert client.outcomes == []
    reply = BatchReply(bytes([b.CREATED]), 3, [42])
    client.answer(again[0] if again else sent, {"batch": reply.to_wire()})
    (receipt,) = client.outcomes
    assert receipt.version == (3, 42)


# ---- gets at ONE ----


def test_a_get_at_one_goes_to_any_replica_and_tells_how_fresh_it_is() -> None:
    client = Client()
    request = client.get()
    assert request.subject == READ
    assert "epoch" not in decode_cbor(request.body)
    client.answer(request, found(node="n2"))
    (entry,) = client.outcomes
    assert isinstance(entry, Entry)
    assert entry.read is not None
    assert (entry.read.epoch, entry.read.seq, entry.read.age_ms) == (3, 42, 5)


@pytest.mark.parametrize("level", ["quorum", "all", None])
def test_a_get_at_another_level_goes_to_the_primary(level: str | None) -> None:
    client = Client()
    request = client.get(level)
    assert request.subject == WRITE
    assert decode_cbor(request.body)["epoch"] == 3


@pytest.mark.parametrize("failure", [None, NotPrimary("not here").to_body()])
def test_when_no_replica_has_an_answer_the_primary_is_asked_at_once(
    failure: dict[str, Any] | None,
) -> None:
    client = Client()
    client.answer(client.get(), failure)
    (again,) = client.sent()
    assert (again.subject, level_of(again)) == (WRITE, "one")
    client.answer(again, found())
    assert isinstance(client.outcomes[0], Entry)


def test_a_replica_that_is_silent_is_not_waited_for_long() -> None:
    client = Client()
    client.get()
    assert client.session.next_deadline_ns() == Knobs().suspect_after_ms * MILLISECOND_NS
    (again,) = client.later(Knobs().suspect_after_ms)
    assert again.subject == WRITE


def test_after_the_primary_has_failed_too_the_replicas_have_another_chance() -> None:
    client = Client()
    client.answer(client.get(), None)
    (at_primary,) = client.sent()
    client.answer(at_primary, None)
    later = [request.subject for request in client.later(500)]
    assert READ in later
    assert not client.outcomes


def test_a_replica_with_too_much_to_do_is_asked_again_after_a_pause() -> None:
    client = Client()
    client.answer(client.get(), Overloaded("too much").to_body())
    assert client.sent() == []
    assert [request.subject for request in client.later(500)] == [READ]


def test_a_shard_without_a_primary_is_still_read_at_one() -> None:
    client = Client()
    recovering = shard_map(8, epoch=4)
    shard = recovering.shards["s1"]
    record = {"s1": Shard(**{**_fields(shard), "state": ShardState.RECOVERING})}
    client.hear(delta(shard_map(7), ShardMap(8, keyspaces=recovering.keyspaces, shards=record)))
    assert client.get().subject == READ


def _fields(shard: Shard) -> dict[str, Any]:
    return {name: getattr(shard, name) for name in Shard.__slots__}


# ---- the map ----


def test_a_default_level_that_changes_reaches_a_running_client() -> None:
    client = Client()
    assert level_of(client.put()) == "quorum"
    client.hear(delta(shard_map(7), shard_map(8, "one")))
    assert client.get(None).subject == READ
    put = client.put()
    assert level_of(put) == "one"
    reply = BatchReply(bytes([b.CREATED]), 3, 43)
    client.answer(put, {"batch": reply.to_wire()})
    (receipt,) = client.outcomes
    assert isinstance(receipt, Receipt)
    assert (receipt.version, receipt.consistency) == ((3, 43), "one")


def test_a_change_that_was_missed_has_the_map_read() -> None:
    client = Client()
    client.hear(delta(shard_map(8), shard_map(9, "one")))
    assert [request.subject for request in client.sent()] == ["bkv.map"]


def test_a_change_that_is_known_or_is_none_changes_nothing() -> None:
    client = Client()
    client.hear(delta(shard_map(6), shard_map(7, "one")))
    assert client.sent() == []
    assert level_of(client.put()) == "quorum"


@pytest.mark.parametrize("change", [{}, {"map_version": "x"}, {"map_version": 9, "previous": 7}])
def test_what_is_no_change_has_the_map_read(change: dict[str, Any]) -> None:
    client = Client()
    client.hear(change)
    assert [request.subject for request in client.sent()] == ["bkv.map"]


def test_an_answer_from_a_node_with_a_newer_map_has_it_read() -> None:
    client = Client()
    client.answer(client.get(), found(map_version=8))
    assert [request.subject for request in client.sent()] == ["bkv.map"]
    client.answer(client.get("quorum"), found(map_version=7))
    assert client.sent() == []


# ---- administration ----


def test_administration_is_asked_for_once() -> None:
    client = Client()
    client.session.administer("failover", {"shard": "s1"}, "token", client.now_ns)
    (request,) = client.sent()
    assert request.subject == "bkv.admin.failover"
    assert client.later(11_000) == []
    assert not client.outcomes
    assert client.later(1000) == []
    (outcome,) = client.outcomes
    assert isinstance(outcome, OutcomeUnknown)


def test_what_only_reads_is_asked_again_until_a_standby_has_become_active() -> None:
    client = Client()
    client.session.administer("failovers", {}, "token", client.now_ns)
    client.sent()
    (again,) = client.later(Knobs().client_attempt_ms)
    client.answer(again, Overloaded("later").to_body())
    (third,) = client.later(1000)
    client.answer(third, {"failovers": []})
    assert client.outcomes == [{"failovers": []}]
    client.session.administer("failovers", {}, "token", client.now_ns)
    client.sent()
    for _ in range(7):
        client.later(Knobs().client_attempt_ms)
    assert isinstance(client.outcomes[1], OutcomeUnknown)


def test_a_refusal_of_administration_is_told_and_not_repeated() -> None:
    client = Client()
    client.session.administer("failover", {"shard": "s1"}, "token", client.now_ns)
    (request,) = client.sent()
    client.answer(request, Overloaded("later").to_body())
    assert client.later(1000) == []
    assert isinstance(client.outcomes[0], Overloaded)


def test_nobody_to_administer_is_told_at_once() -> None:
    client = Client()
    client.session.administer("failover", {"shard": "s1"}, "token", client.now_ns)
    (request,) = client.sent()
    client.answer(request, None)
    assert isinstance(client.outcomes[0], NoCoordinator)


def test_calls_of_different_patience_end_each_in_its_time() -> None:
    client = Client()
    knobs = Knobs()
    client.session.call("sql", {"query": "SELECT 1"}, "sql", 0)
    client.session.call("history", {"key": b"k"}, "history", 0)
    client.session.call("get", {"key": b"k"}, "get", 0)
    assert len(client.sent()) == 3
    again = [request.subject for request in client.later(knobs.client_attempt_ms)]
    again += [request.subject for request in client.later(500)]
    assert again == ["bkv.get"]
    assert client.session.next_deadline_ns() == (knobs.page_within_ms + 500) * MILLISECOND_NS
    assert client.now_ns < 3 * SECOND_NS
    assert not any(isinstance(outcome, BusKVError) for outcome in client.outcomes)


# ---- a primary that does not answer ----


def writes(sent: list[Request]) -> list[Request]:
    return [request for request in sent if request.subject.endswith(".request")]


def suspects_of(client: Client) -> list[str]:
    return [publish.subject for publish in client.said]


def test_who_meets_nobody_or_no_answer_says_so_on_the_bus() -> None:
    for fails in ("nobody", "silence"):
        client = Client()
        request = client.put()
        if fails == "nobody":
            client.answer(request, None)
            client.sent()
        else:
            client.later(Knobs().suspect_after_ms)
        assert suspects_of(client) == ["bkv.event.suspect.n1"], fails


def test_a_primary_that_answers_others_is_not_suspected() -> None:
    client = Client()
    slow = client.put()
    client.later(Knobs().suspect_after_ms - 1)
    client.session.submit_many(
        b.PUT, [b"m"] * 300, [b"v"] * 300, [*range(300)], client.now_ns, "default", None, None
    )
    (quick, *_) = client.sent()
    reply = BatchReply(bytes([b.CREATED]) * 300, 3, 42)
    client.answer(quick, {"batch": reply.to_wire()})
    client.later(1)
    assert suspects_of(client) == []
    client.later(Knobs().suspect_after_ms)
    assert suspects_of(client) == ["bkv.event.suspect.n1"]
    assert slow.subject == WRITE


def test_the_map_is_asked_of_any_node_and_of_the_store_when_that_knows_nothing_newer() -> None:
    client = Client()
    asked: list[bool] = []
    for version in (7, 7, 8, 8):
        client.session.fetch_routes(client.now_ns)
        (request,) = client.sent()
        asked.append(bool(decode_cbor(request.body).get("cached")))
        client.answer(request, shard_map(version).public())
    assert asked == [True, False, False, True]


def test_what_a_silent_primary_has_is_sent_to_the_next_one_under_the_same_number() -> None:
    client = Client()
    first = client.put()
    client.later(Knobs().suspect_after_ms)
    client.hear(delta(shard_map(7), shard_map(8, epoch=4)))
    (again,) = writes(client.later(10))
    assert decode_cbor(again.body)["epoch"] == 4
    numbers = [decode_batch(decode_cbor(r.body)["batch"]).numbers for r in (first, again)]
    assert numbers[0] == numbers[1]


def test_of_a_silent_primary_one_message_at_a_time_is_asked() -> None:
    client = Client()
    client.put()
    client.later(Knobs().suspect_after_ms)
    client.session.submit_many(
        b.PUT, [b"m"] * 1000, [b"v"] * 1000, [*range(1000)], client.now_ns, "default", None, None
    )
    assert client.sent() == []
    assert len(writes(client.later(Knobs().client_attempt_ms))) == 1


def test_of_a_silent_primary_one_message_at_a_time_is_asked_for_all_its_shards() -> None:
    client = Client(map_of_three(7))
    (trial,) = client.put_to(b"a")
    client.later(Knobs().suspect_after_ms)
    assert client.put_to(b"b") == [], "it would wait there, too"
    assert [sent.subject for sent in client.put_to(b"c")] == ["bkv.shard.c.request"]
    reply = BatchReply(bytes([b.CREATED]), 3, [42])
    client.answer(trial, {"batch": reply.to_wire()})
    assert [sent.subject for sent in client.sent()] == ["bkv.shard.b.request"]


def test_what_waits_for_a_shard_is_not_sent_to_a_primary_that_does_not_serve_yet() -> None:
    client = Client(map_of_three(7))
    client.put_to(b"a")
    client.later(Knobs().suspect_after_ms)
    client.put_to(b"b")
    client.hear(delta(map_of_three(7), map_of_three(8, ShardState.RECOVERING)))
    assert writes(client.sent()) == []
    assert suspects_of(client) == ["bkv.event.suspect.n1"]
    client.hear(delta(map_of_three(8, ShardState.RECOVERING), map_of_three(9)))
    assert {sent.subject for sent in client.later(10)} == {
        "bkv.shard.a.request", "bkv.shard.b.request",
    }  # fmt: skip


def test_a_shard_that_cannot_commit_holds_up_no_other_one_of_its_primary() -> None:
    client = Client(map_of_three(7))
    for _ in range(3):
        client.put_to(b"a")
    client.later(Knobs().suspect_after_ms)
    client.put_to(b"b")
    asked: list[str] = []
    for _ in range(6):
        client.put_to(b"a")
        asked += [sent.subject for sent in writes(client.later(Knobs().suspect_after_ms))]
    assert "bkv.shard.b.request" in asked


def test_of_two_primaries_that_hear_a_request_the_other_one_ends_no_silence() -> None:
    """The next one listens before it serves, and leaves what is of an earlier epoch to the silent one."""
    client = Client(map_of_three(7))
    (first,) = client.put_to(b"a")
    client.later(Knobs().suspect_after_ms)
    client.answer(first, OutcomeUnknown("not known here").to_body())
    client.put_to(b"b")
    assert client.put_to(b"a") == [], "one message at a time still"


def test_before_a_keyspace_is_said_to_be_unknown_the_map_is_read() -> None:
    client = Client()
    client.session.write(b.PUT, b"k", b"v", "put", client.now_ns, "young")
    (asked,) = client.sent()
    assert decode_cbor(asked.body) == {}
    client.answer(asked, shard_map(7).public())
    client.later(100)
    assert isinstance(client.outcomes[0], KeyspaceUnknown)
