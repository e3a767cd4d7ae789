"""The rules of replication, one story each, message by message and fsync by fsync (nodes/DESIGN.md, R1–R8)."""

from __future__ import annotations

from typing import Any

import pytest

from bus_kv.core.machine import EntryRow
from bus_kv.errors import BusKVError, ShardUnavailable
from bus_kv.protocol.batch import BatchReply
from bus_kv.protocol.entry import Entry
from nodes.machine.control import _answer_fetch
from nodes.machine.status import Status
from tests.simulation import test_planted_replication as planted
from tests.support.trio import Trio


@pytest.fixture
def trio() -> Trio:
    three = Trio()
    three.serve()
    return three


def value_of(answers: list[Any]) -> bytes | None:
    (reply,) = answers
    assert isinstance(reply, BatchReply), reply
    assert reply.values is not None
    return reply.values[0]


# ---- R3, R4: what is committed, and what is told ----


def test_a_quorum_put_is_answered_when_two_of_three_have_it_durably(trio: Trio) -> None:
    answers = trio.put("n1", b"k", b"1")
    messages = trio.messages("n1")
    trio.fsync("n1")
    trio.deliver(messages, "n2")
    trio.answer("n2")
    assert answers == [], "received is not durable"
    trio.fsync("n2")
    trio.answer("n2")
    assert len(answers) == 1
    assert trio["n1"].commit_seq == trio["n1"].last[1]


def test_a_put_at_one_is_answered_by_the_own_disk_and_one_at_all_by_every_disk(trio: Trio) -> None:
    trio["n1"].members_for_all = 3
    one, all = trio.put("n1", b"a", b"1", "one"), trio.put("n1", b"b", b"2", "all")
    messages = trio.messages("n1")
    assert one == []
    trio.fsync("n1")
    assert len(one) == 1
    for backup in ("n2", "n3"):
        assert all == []
        trio.deliver(messages, backup)
        trio.fsync(backup)
        trio.answer(backup)
    assert len(all) == 1


def test_a_primary_answers_nothing_before_it_knows_that_it_is_active() -> None:
    trio = Trio()
    trio.open(trio.shard)
    trio.settle()
    assert trio["n1"].is_opened
    assert trio["n1"].commit_seq == 0
    assert isinstance(trio.get("n1", b"k", "one")[0], BusKVError)


def test_an_entry_of_an_earlier_epoch_is_committed_with_the_opening_entry_only(trio: Trio) -> None:
    """Copies on a majority are not enough: another log without it could still be chosen (Raft, figure 8)."""
    trio.put("n1", b"k", b"1")
    trio.deliver(trio.messages("n1"), "n2")
    trio.fsync("n1")
    trio.fsync("n2")
    shard = trio.record("n2", "n1", "n2", "n3", epoch=2)
    trio["n2"].promise(2, "t2")
    trio["n3"].promise(2, "t2")
    trio.open(shard)
    trio.fsync("n2")
    before, (message,) = trio["n2"].commit_seq, trio.messages("n2")
    trio.deliver([{**message, "entries": []}], "n1")
    trio.fsync("n1")
    trio.answer("n1")
    assert trio["n2"].replication is not None
    assert trio["n2"].replication.match["n1"] == 2, "the old entry is on two of three disks"
    assert trio["n2"].commit_seq == before
    trio.settle()
    trio.activate(shard)
    assert trio["n2"].commit_seq == trio["n2"].last[1]


# ---- R5: reads ----


def test_a_read_waits_for_a_round_that_begins_after_it(trio: Trio) -> None:
    first = trio.get("n1", b"k")
    trio.messages("n1")
    second = trio.get("n1", b"k")
    trio.answer("n1")
    trio.answer("n2")
    assert len(first) == 1
    assert second == [], "its round has not begun"
    trio.messages("n1")
    trio.answer("n1")
    trio.answer("n2")
    assert len(second) == 1


def test_members_are_asked_to_confirm_before_the_answer_is_made(trio: Trio) -> None:
    trio.get("n1", b"k")
    primary = trio.nodes["n1"].replica
    trio.turn("n1")
    primary.take_messages()
    asked = [fields["type"] for _, fields in trio.nodes["n1"].tells]
    assert ("confirm" in asked, primary.operations) == (True, 0)
    primary.settle()
    assert primary.operations == 1


def test_a_write_is_answered_before_it_is_applied(trio: Trio) -> None:
    answers = trio.put("n1", b"k", b"1")
    trio.fsync("n1")
    trio.deliver(trio.messages("n1"), "n2")
    trio.fsync("n2")
    primary = trio.nodes["n1"].replica
    before = primary.commit_seq
    trio.answer("n2")
    assert (len(answers), primary.commit_seq) == (1, before)
    assert trio["n1"].commit_seq == before + 1, "whoever looks sees it"


def test_a_round_is_asked_of_no_more_members_than_it_takes(trio: Trio) -> None:
    for _ in range(3):
        trio.get("n1", b"k")
        assert trio.messages("n1") == []
        assert [to for to, fields in trio.nodes["n1"].tells if fields["type"] == "confirm"] == [
            "n2"
        ]
        trio.answer("n1")
        trio.answer("n2")


def test_when_that_member_keeps_silent_all_are_asked_and_another_one_then(trio: Trio) -> None:
    got = trio.get("n1", b"k")
    trio.messages("n1")
    trio.nodes["n1"].tells.clear()
    trio.deliver(trio.remind("n1"), "n3")
    trio.answer("n3")
    assert len(got) == 1
    trio.get("n1", b"k")
    trio.messages("n1")
    assert [to for to, _ in trio.nodes["n1"].tells] == ["n3"]


def test_a_read_at_all_is_confirmed_by_every_member(trio: Trio) -> None:
    got = trio.get("n1", b"k", "all")
    messages = trio.messages("n1")
    for name in ("n2", "n3"):
        assert got == []
        trio.deliver(messages, name)
        trio.answer(name)
    assert len(got) == 1


def test_a_read_shows_committed_values_only(trio: Trio) -> None:
    trio.put("n1", b"k", b"new")
    trio.fsync("n1")
    got = trio.get("n1", b"k")
    trio.messages("n1")
    for message in trio.remind("n1"):
        trio.deliver([{**message, "entries": []}], "n2")
    trio.answer("n2")
    assert value_of(got) is None


def test_a_former_primary_answers_no_read(trio: Trio) -> None:
    got = trio.get("n1", b"k")
    trio.messages("n1")
    messages = trio.remind("n1")
    for name in ("n2", "n3"):
        trio[name].promise(2, "t2")
        trio.deliver(messages, name)
    trio.answer("n1")
    for name in ("n2", "n3"):
        trio.fsync(name)
        trio.answer(name)
    assert got == []
    trio["n1"].fail_waiting("the time is over")
    assert isinstance(got[0], ShardUnavailable)


# ---- R1, R2: promises, matching, cutting ----


def test_lower_epochs_and_other_tokens_are_refused_for_ever(trio: Trio) -> None:
    trio["n2"].promise(2, "t2")
    trio.put("n1", b"k", b"1")
    messages = trio.messages("n1")
    other = [{**m, "epoch": 2, "token": "another"} for m in messages]
    end = trio["n2"].last
    trio.deliver(messages + other, "n2")
    assert trio["n2"].last == end
    assert {f["type"] for _, f in trio.nodes["n2"].tells} == {"refused"}


def test_a_promise_is_durable_before_anything_is_acknowledged_under_it(trio: Trio) -> None:
    shard = trio.record("n2", "n1", "n2", "n3", epoch=2)
    trio["n2"].promise(2, "t2")
    trio.open(shard)
    trio.fsync("n2")
    trio.nodes["n3"].tells.clear()
    trio.deliver(trio.messages("n2"), "n3")
    assert trio.nodes["n3"].tells == []
    trio.fsync("n3")
    assert [f["epoch"] for _, f in trio.nodes["n3"].tells] == [2]
    trio.restart("n3")
    assert trio["n3"].promised == (2, "t2")


def test_what_a_former_primary_had_alone_is_cut_and_the_rest_matches(trio: Trio) -> None:
    trio.put("n1", b"lost", b"1", "one", client="c", numbers=[1])
    trio.fsync("n1")
    shard = trio.record("n2", "n2", "n3", epoch=2)
    for name in ("n2", "n3"):
        trio[name].promise(2, "t2")
    trio.open(shard)
    trio.settle()
    trio.activate(shard)
    trio.put("n2", b"kept", b"2")
    trio.settle()
    trio.restart("n1")
    learner = trio.record("n2", "n1", "n2", "n3", epoch=3)
    for name in ("n2", "n3"):
        trio[name].promise(3, "t3")
    trio.open(learner)
    trio.settle()
    trio.activate(learner)
    trio.settle()
    assert len({tuple(log) for log in trio.logs().values()}) == 1
    assert trio["n1"].fate((1, 2)) == trio["n2"].fate((1, 2)) == "rolled_back"
    again = trio.put("n2", b"lost", b"1", client="c", numbers=[1])
    trio.settle()
    assert again[0].versions() == [(3, 5)], "it never happened, so it is done now"


def test_an_acknowledgement_names_what_matches_not_the_end_of_the_log(trio: Trio) -> None:
    """n3 has an entry of epoch 1 that nobody else has. Under epoch 2 it must not count for what stands there."""
    trio.put("n1", b"k", b"1")
    trio.deliver(trio.messages("n1"), "n3")
    trio.fsync("n3")
    trio["n2"].promise(2, "t2")
    trio.open(trio.record("n2", "n2", "n3", epoch=2))
    trio.fsync("n2")
    trio.nodes["n3"].tells.clear()
    message = trio.messages("n2")[0]
    trio.deliver([{**message, "entries": []}], "n3")
    trio.fsync("n3")
    assert [f["match"] for _, f in trio.nodes["n3"].tells] == [1]
    assert trio["n3"].last == (1, 2)


def test_a_backup_commits_no_more_than_what_matches(trio: Trio) -> None:
    trio.put("n1", b"k", b"1")
    trio.deliver(trio.messages("n1"), "n3")
    trio.fsync("n3")
    trio["n2"].promise(2, "t2")
    trio.open(trio.record("n2", "n2", "n3", epoch=2))
    trio.fsync("n2")
    message = {**trio.messages("n2")[0], "entries": [], "commit": 2}
    trio.deliver([message], "n3")
    trio.fsync("n3")
    assert trio["n3"].commit_seq == 1


def test_a_log_that_lacks_what_is_committed_is_not_followed(trio: Trio) -> None:
    """It cannot happen while the other rules hold; if it does, the node stops before anything is lost."""
    trio.put("n1", b"k", b"1")
    trio.settle()
    assert trio["n3"].commit_seq == 2
    wrong = Trio()
    wrong.open(wrong.record("n2", "n2", "n3", epoch=2))
    wrong.fsync("n2")
    wrong.nodes["n2"].replica.step_down("a test")
    rows = wrong.nodes["n2"].log
    message = {
        "type": "append", "shard": "s1", "epoch": 2, "token": "t2", "from": "n2",
        "to": {"n2": "i", "n3": "i"}, "previous": (0, 0), "entries": [row.body for row in rows],
        "commit": 0, "round": 0,
    }  # fmt: skip
    trio.deliver([message], "n3")
    trio.fsync("n3")
    assert trio["n3"].commit_seq == 2
    assert trio.logs()["n3"] == [(1, 1), (1, 2)]


def test_a_gap_is_fetched(trio: Trio) -> None:
    trio.put("n1", b"a", b"1")
    trio.messages("n1")
    trio.put("n1", b"b", b"2")
    messages = trio.messages("n1")
    trio.fsync("n1")
    trio.deliver(messages, "n3")
    assert trio["n3"].last == (1, 1)
    trio.fetch("n3")
    trio.fsync("n3")
    trio.answer("n3")
    assert trio["n3"].last == trio["n1"].last
    assert trio["n1"].commit_seq == trio["n1"].last[1]


# ---- R7: takeover ----


def test_a_sealed_backup_answers_at_one_and_says_since_when_it_may_be_old(trio: Trio) -> None:
    trio.put("n1", b"k", b"1")
    trio.settle()
    trio["n2"].promise(2, "t2")
    trio.now_ns += 5_000_000_000
    (reply,) = trio.get_anywhere("n2", b"k")
    assert value_of([reply]) == b"1"
    assert reply.read is not None
    assert reply.read[2] == 5000


def test_who_has_not_followed_in_this_life_answers_nothing(trio: Trio) -> None:
    """Neither after a restart nor after an attempt to open that came to nothing: it may have missed much."""
    trio.put("n1", b"k", b"1")
    trio.settle()
    trio.restart("n2")
    trio.open(trio.record("n2", "n1", "n2", "n3", epoch=2))
    trio["n2"].promise(3, "t3")
    assert isinstance(trio.get_anywhere("n2", b"k")[0], BusKVError)


class Measured(bytes):
    """Bytes that know how often they were measured."""

    times = 0

    def __len__(self) -> int:
        Measured.times += 1
        return super().__len__()


def test_an_entry_that_comes_too_early_is_kept_at_the_same_cost_however_many_are(
    trio: Trio,
) -> None:
    """Else a replica that lags falls ever further behind (found by `bus-kv chaos --fault wipe-disk`)."""
    trio.put("n1", b"missed", b"1")
    trio.messages("n1")
    Measured.times = 0
    for i in range(200):
        trio.put("n1", b"k%d" % i, b"1")
        for message in trio.messages("n1"):
            entries = [Measured(body) for body in message["entries"]]
            trio.deliver([{**message, "entries": entries}], "n3")
    assert Measured.times < 200 * 10
    assert trio["n3"].pull.is_on


def test_a_new_primary_takes_over_the_longest_sealed_log(trio: Trio) -> None:
    done = trio.put("n1", b"k", b"1")
    trio.deliver(trio.messages("n1"), "n3")
    for name in ("n1", "n3"):
        trio.fsync(name)
    trio.answer("n3")
    assert len(done) == 1
    shard = trio.record("n2", "n2", "n3", epoch=2)
    for name in ("n2", "n3"):
        trio[name].promise(2, "t2")
        trio.fsync(name)
    best = trio["n3"].last
    trio["n2"].pull.start(trio.members[2], best, lambda: trio.open(shard))
    trio.fetch("n2")
    trio.settle()
    trio.activate(shard)
    got = trio.get("n2", b"k")
    trio.settle()
    assert value_of(got) == b"1"


def test_a_restarted_primary_does_not_resume(trio: Trio) -> None:
    trio.restart("n1")
    assert trio["n1"].status is Status.RESTARTED
    assert isinstance(trio.get("n1", b"k", "one")[0], BusKVError)
    with pytest.raises(AssertionError, match="R7"):
        trio.open(trio.shard)


@pytest.mark.parametrize("primary", ["n1", "n2"])
def test_a_write_that_was_everywhere_stays_so_when_a_member_is_replaced(primary: str) -> None:
    trio = Trio()
    for node in trio.nodes.values():
        node.replica.members_for_all = 3
    trio.serve()
    trio.put("n1", b"k", b"1")
    trio.settle()
    assert trio["n1"].fate((1, 2)) == "all"
    trio[primary].promise(2, "t2")
    shard = trio.record(primary, "n1", "n2", epoch=2)  # n3 is lost, its successor has nothing yet
    trio.open(shard)
    trio.fsync(primary)
    other = "n2" if primary == "n1" else "n1"
    trio.deliver(trio.remind(primary), other)
    trio.fsync(other)
    trio.answer(other)
    trio.activate(shard)
    trio.put(primary, b"k", b"2")
    trio.settle()
    assert trio[primary].fate((1, 2)) == "all"
    assert trio[primary].fate((2, 4)) == "quorum"


def test_a_repeat_shares_the_fate_of_the_first_while_that_is_uncommitted(trio: Trio) -> None:
    first = trio.put("n1", b"k", b"1", client="c", numbers=[7])
    again = trio.put("n1", b"k", b"1", client="c", numbers=[7])
    end = trio["n1"].last
    trio.settle()
    assert trio["n1"].last == end
    assert first[0].versions() == again[0].versions() == [(1, 2)]


def test_a_request_is_known_after_a_takeover(trio: Trio) -> None:
    trio.put("n1", b"k", b"1", client="c", numbers=[7])
    trio.settle()
    for name in ("n2", "n3"):
        trio[name].promise(2, "t2")
    shard = trio.record("n2", "n2", "n3", epoch=2)
    trio.open(shard)
    trio.settle()
    trio.activate(shard)
    again = trio.put("n2", b"k", b"1", client="c", numbers=[7])
    trio.settle()
    assert again[0].versions() == [(1, 2)]


# ---- broken rules make these stories fail ----


STORIES = [
    (
        planted.backup_acknowledges_before_fsync,
        test_a_quorum_put_is_answered_when_two_of_three_have_it_durably,
    ),
    (planted.read_joins_a_round_under_way, test_a_read_waits_for_a_round_that_begins_after_it),
    (planted.read_from_the_tail, test_a_read_shows_committed_values_only),
    (planted.read_without_a_round, test_a_former_primary_answers_no_read),
    (
        planted.ack_names_the_end_of_the_log,
        test_an_acknowledgement_names_what_matches_not_the_end_of_the_log,
    ),
    (planted.commit_seq_beyond_the_match, test_a_backup_commits_no_more_than_what_matches),
    (
        planted.older_epochs_are_counted,
        test_an_entry_of_an_earlier_epoch_is_committed_with_the_opening_entry_only,
    ),
    (
        planted.promise_forgotten_at_restart,
        test_a_promise_is_durable_before_anything_is_acknowledged_under_it,
    ),
    (
        planted.higher_epoch_without_a_promise,
        test_a_promise_is_durable_before_anything_is_acknowledged_under_it,
    ),
    (
        planted.dedup_not_shared_while_uncommitted,
        test_a_repeat_shares_the_fate_of_the_first_while_that_is_uncommitted,
    ),
    (planted.epoch_opened_twice, test_a_restarted_primary_does_not_resume),
]


@pytest.mark.parametrize(("plant", "story"), STORIES)
def test_a_broken_rule_makes_its_story_fail(
    plant: Any, story: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = Trio()
    three.serve()
    plant(monkeypatch)
    with pytest.raises((AssertionError, ValueError, KeyError, pytest.fail.Exception)):
        story(three)


# ---- logs that begin later ----


@pytest.mark.parametrize(
    ("begins", "expected"), [((3, 9), "trimmed"), ((4, 3), "trimmed"), ((2, 3), "elsewhere")]
)
def test_a_log_that_begins_behind_what_is_asked_for_is_trimmed(
    trio: Trio, begins: tuple[int, int], expected: str
) -> None:
    """Also in a later epoch at a lower seq: "elsewhere" would be asked for ever."""
    replica, answers = trio["n1"], list[dict[str, Any]]()
    body = Entry("s1", begins[0], begins[1] + 1, begins[1] + 1, begins, 0).encode()
    rows = [None, [EntryRow("s1", begins[1] + 1, begins[0], body)]]
    _answer_fetch(replica, replica.promised, (3, 5), answers.append, rows, None)
    assert [answer["type"] for answer in answers] == [expected]


def test_members_put_off_their_first_fold_by_different_times() -> None:
    """They have the same log at the same time; a majority is to answer while one of them folds."""
    trio = Trio()
    trio.serve()
    trio.put("n1", b"k", b"v")
    trio.settle()
    assert len({trio[name].folder.next_ns() for name in trio.nodes}) == 3


def test_a_turn_looks_at_who_has_answered_somebody(trio: Trio) -> None:
    """What he asks for next, in that very moment, is for this turn: a delete_prefix goes on so. One acknowledgement
    that answers nobody is nothing to look at."""
    primary = trio["n1"]
    answers = trio.put("n1", b"k", b"1")
    trio.turn("n1")
    trio.deliver(trio.messages("n1"), "n2", "n3")
    for name in ("n2", "n3"):
        trio.fsync(name)
    acknowledged = [fields for n in ("n2", "n3") for _, fields in trio.nodes[n].tells]
    assert not primary.on_replica_answer(acknowledged[0])
    assert answers == []
    trio.fsync("n1")
    assert len(answers) == 1
    assert not primary.on_replica_answer(acknowledged[-1])
    answers = trio.put("n1", b"k", b"2")
    trio.turn("n1")
    trio.deliver(trio.messages("n1"), "n2")
    trio.fsync("n1")
    trio.nodes["n2"].tells.clear()
    trio.fsync("n2")
    assert answers == []
    assert primary.on_replica_answer(trio.nodes["n2"].tells[-1][1])
    assert len(answers) == 1


def test_a_turn_looks_at_a_backup_whose_epoch_a_confirm_round_begins(trio: Trio) -> None:
    """Its promise has to become durable, and it listens anew."""
    trio.get("n1", b"k")
    trio.messages("n1")
    question = next(f for _, f in trio.nodes["n1"].tells if f["type"] == "confirm")
    assert not trio["n2"].backup.on_confirm(question)
    assert trio["n2"].backup.on_confirm({**question, "epoch": 2, "token": "t2"})
    assert trio["n2"].promised == (2, "t2")
