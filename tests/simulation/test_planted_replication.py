"""Broken rules of replication (R1–R8: nodes/DESIGN.md). Some are caught by the checkers within a few seeds; those that
need more luck are caught by the stories in unit/test_replication.py and unit/test_reconfiguration.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from bus_kv.protocol.shard_map import Configuration, ShardState
from coordinator.machine import plan
from coordinator.machine.attempt import Attempt
from coordinator.machine.coordinator import CoordinatorMachine
from nodes.machine import control
from nodes.machine.backup import Backup
from nodes.machine.replica import Replica
from nodes.machine.replication import Replication
from nodes.machine.status import Status
from nodes.machine.table import UNKNOWN
from nodes.machine.writer import Writer
from tests.simulation.test_seeds import run_all
from tests.simulator.faults import Faults
from tests.simulator.state import Shard as State
from tests.simulator.world import Violation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bus_kv.core.machine import Load, ReplicaRow, Stored
    from bus_kv.protocol.shard_map import Shard
    from coordinator.machine.roles import Roles
    from tests.simulator.disk import Disk
    from tests.simulator.process import Process


def backup_acknowledges_before_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup tells what it has received as if it were durable."""
    on_append = Backup.on_append

    def hasty(self: Backup, fields: dict[str, Any]) -> None:
        on_append(self, fields)
        replica = self._replica
        durable, replica.durable_seq = replica.durable_seq, replica.last[1]
        promise, replica.durable_promise = replica.durable_promise, replica.promised
        self.acknowledge()
        replica.durable_seq, replica.durable_promise = durable, promise

    monkeypatch.setattr(Backup, "on_append", hasty)


def too_few_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """n−W members are taken for enough."""

    def is_sealed(self: Attempt) -> bool:
        last = self.shard.last_active
        return last is None or len(self.sealed) >= len(last.members) - (len(last.members) // 2 + 1)

    monkeypatch.setattr(Attempt, "is_sealed", property(is_sealed))


def seals_the_pending_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt that never was active is sealed instead of the configuration that was."""
    reconfigured = plan.reconfigured

    def wrong(shard: Shard, roles: Roles, epoch: int, token: str) -> Shard:
        new = reconfigured(shard, roles, epoch, token)
        if shard.state is ShardState.ACTIVE or shard.last_active is None:
            return new
        return replace(new, last_active=Configuration(shard.epoch, shard.token, shard.members))

    monkeypatch.setattr(plan, "reconfigured", wrong)


def unanswered_cas_is_success(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of the map whose answer does not come is taken for done."""
    on_stored = CoordinatorMachine._on_stored

    def trusting(self: CoordinatorMachine, stored: Stored) -> None:
        pending = stored.correlation == self._store_pending and self._wanted is not None
        if pending and stored.failure is not None and not stored.conflict:
            assert self._wanted is not None
            self._store_pending = 0
            self._timers.stop("store")
            return self._take_map(self._wanted)
        return on_stored(self, stored)

    monkeypatch.setattr(CoordinatorMachine, "_on_stored", trusting)


def active_cas_checks_only_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever attempt is in the map becomes ACTIVE when some attempt has opened."""
    next_map = plan.next_map

    def wrong(old: Any, heard: Any, knobs: Any, token: Any) -> Any:
        for id in [*heard.opened]:
            if id in old.shards:
                heard.opened[id] = (old.shards[id].epoch, old.shards[id].token)
        return next_map(old, heard, knobs, token)

    def keep(self: CoordinatorMachine, map: Any) -> None:
        opened = {id: attempt for id, attempt in self._attempts.items() if attempt.opened}
        take_map(self, map)
        for id, attempt in opened.items():
            self._attempts.setdefault(id, attempt)

    take_map = CoordinatorMachine._take_map
    monkeypatch.setattr(CoordinatorMachine, "_take_map", keep)
    monkeypatch.setattr("coordinator.machine.coordinator.next_map", wrong)
    monkeypatch.setattr(plan, "next_map", wrong)


def higher_epoch_without_a_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup takes entries of a higher epoch, and goes on taking those of the epoch that it had promised."""
    on_append = Backup.on_append

    def lax(self: Backup, fields: dict[str, Any]) -> None:
        kept = self._replica.promised
        on_append(self, fields)
        if self._replica.promised != kept and kept[0]:
            self._replica.promised = kept

    monkeypatch.setattr(Backup, "on_append", lax)


def report_leaves_out_what_is_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A seal report names what is durable now, although more will be acknowledged."""
    on_seal = control.Control._on_seal

    def short(self: control.Control, fields: dict[str, Any], reply: Callable) -> None:
        held = self._node.replicas.get(fields["record"]["id"])
        durable = [s.end for s in held.tail.segments if s.last <= held.durable_seq] if held else []

        def tell(answer: dict[str, Any]) -> None:
            if answer["type"] == "sealed" and held is not None:
                answer["last"] = durable[-1] if durable else held.tail.base
            reply(answer)

        on_seal(self, fields, tell)

    monkeypatch.setattr(control.Control, "_on_seal", short)


def commit_seq_beyond_the_match(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup commits what the primary has committed, whatever its own log holds there."""
    acknowledge = Backup.acknowledge

    def bold(self: Backup) -> bool:
        replica = self._replica
        if replica.status is Status.FOLLOWING:
            replica.commit_soon(min(self._primary_commit, replica.durable_seq))
        return acknowledge(self)

    monkeypatch.setattr(Backup, "acknowledge", bold)


def ack_names_the_end_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup acknowledges all it has, its unmatched end included."""
    acknowledge = Backup.acknowledge

    def generous(self: Backup) -> bool:
        matched, self._matched = self._matched, self._replica.last[1]
        commit, self._primary_commit = self._primary_commit, min(self._primary_commit, matched)
        is_first = acknowledge(self)
        self._matched, self._primary_commit = matched, commit
        return is_first

    monkeypatch.setattr(Backup, "acknowledge", generous)


def promise_forgotten_at_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that comes back does not know what it has promised."""

    def forget(self: Replica, row: ReplicaRow) -> None:
        self.promised = self.durable_promise = (0, "")

    monkeypatch.setattr(Replica, "restore", forget)


def newest_heartbeat_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The new primary begins with the log that it has."""
    open = Attempt._open
    monkeypatch.setattr(Attempt, "_open", lambda self, to: {**open(self, to), "best": (0, 0)})


def read_from_the_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read is answered from writes that are not committed yet."""
    committed = Writer._committed

    def latest(writer: Writer, keys: Sequence[bytes]) -> tuple[list[Any], bool]:
        records, is_known = committed(writer, keys)
        for segment in writer._replica.tail.segments:
            records = [*map(segment.writes.get, keys, records)]
        return records, is_known or UNKNOWN not in records

    monkeypatch.setattr(Writer, "_committed", latest)


def read_without_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A QUORUM read is answered by a primary that may have been replaced."""

    def at_once(
        self: Replica, level: str, deadline_ns: int, respond: Callable, reply: Any, seq: int,
        is_read: bool = True, round: int = 0,
    ) -> None:  # fmt: skip
        if is_read:
            return respond(reply)
        return answer_read(self, level, deadline_ns, respond, reply, seq, is_read, round)

    answer_read = Replica.answer_read
    monkeypatch.setattr(Replica, "answer_read", at_once)


def read_joins_a_round_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read is confirmed by answers that may have been given before it came."""

    def join(self: Replication, of_all: bool = False) -> int:
        if self.round and self.quorum(self.rounds) < self.round:
            return self.round
        return want(self, of_all)

    want = Replication.want_round
    monkeypatch.setattr(Replication, "want_round", join)


def dedup_not_shared_while_uncommitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request is known only once it is committed: its repeat before that is taken for new."""
    accept = Writer.accept

    def unknown(self: Writer, batch: Any, raw: bytes, time_ms: int, decision: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self, "remember", lambda logged: None)
            accept(self, batch, raw, time_ms, decision)
        self._replica.tail.segments[-1].remembered = False

    monkeypatch.setattr(Writer, "accept", unknown)


def dedup_lost_in_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a learner takes has the records, and not the requests that made them."""

    def load(self: State, chunk: Load) -> None:
        honest(self, chunk)
        self.requests = []

    honest = State.load
    monkeypatch.setattr(State, "load", load)


def all_is_every_reachable_member(monkeypatch: pytest.MonkeyPatch) -> None:
    """ALL is answered when a majority has it."""
    monkeypatch.setattr(Replication, "all", Replication.quorum)


def epoch_opened_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A primary that restarted opens the epoch that it had opened once more."""

    def forget(self: Replica, row: ReplicaRow) -> None:
        restore(self, row)
        self.opened_epoch = row.opened_epoch - 1

    restore = Replica.restore
    monkeypatch.setattr(Replica, "restore", forget)


def older_epochs_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A primary commits entries of earlier epochs by counting copies, before its own opening entry is there."""

    def progress(self: Replica) -> bool:
        assert self.replication is not None
        if self.status in (Status.OPENED, Status.ACTIVE):
            count = self.replication.quorum(self.replication.match)
            self.commit_soon(min(count, self.durable_seq))
        return honest(self)

    honest = Replica._progress
    monkeypatch.setattr(Replica, "_progress", progress)


def cut_below_commit_seq(monkeypatch: pytest.MonkeyPatch) -> None:
    """What conflicts is cut together with the last committed entry before it."""

    def deep(self: Replica, count: int) -> None:
        cut(self, count)
        self._rows[-1] = replace(self._rows[-1], last=self.commit_seq - 1)

    cut = Replica.cut
    monkeypatch.setattr(Replica, "cut", deep)


def forgetting_is_not_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica answers a seal whose map does not know what it has promised."""
    monkeypatch.setattr(control.Control, "_forgotten_by", lambda self, record, replica: None)


def wiped_node_keeps_its_incarnation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node whose disk is lost comes back as the member that it was, with nothing."""

    def same(self: Faults, process: Process, lost: Disk) -> Disk:
        disk = new_disk(self, process, lost)
        disk.incarnation = lost.incarnation
        return disk

    new_disk = Faults._new_disk
    monkeypatch.setattr(Faults, "_new_disk", same)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("plant", "promise"),
    [
        (cut_below_commit_seq, "R2"),
        (dedup_lost_in_a_snapshot, "R6|exactly once"),
        (backup_acknowledges_before_fsync, "R4|durability"),
        (all_is_every_reachable_member, "R4"),
        (dedup_not_shared_while_uncommitted, "exactly once"),
    ],
)
def test_a_broken_rule_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], promise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(Violation, match=promise):
        run_all(range(1, 201))
