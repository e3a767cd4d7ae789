"""The simulator as a test: many seeds hold every promise, one seed replays bit for bit, and broken rules are caught."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import pytest

from bus_kv.client import calls
from bus_kv.core.machine import Trim
from nodes.machine.dedup import DedupWindow
from nodes.machine.folder import Folder
from nodes.machine.judge import Judge
from nodes.machine.lifetimes import Lifetimes
from nodes.machine.loader import Loader
from nodes.machine.node import NodeMachine
from nodes.machine.replica import Replica
from nodes.machine.replicas import Replicas
from nodes.machine.replication import Replication
from nodes.machine.status import Status
from tests.simulator.__main__ import attempt, run_many
from tests.simulator.run import run
from tests.simulator.world import Violation

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.protocol.batch import BatchReply
    from bus_kv.protocol.shard_map import Shard

SEEDS = int(os.environ.get("BUS_KV_SIM_SEEDS", "200"))


@pytest.mark.timeout(600)
def test_many_seeds_hold_every_promise() -> None:
    assert run_many(range(1, SEEDS + 1)) == 0


def test_a_seed_replays_bit_for_bit_whatever_the_hash_seed() -> None:
    digests = {_digest_in_a_process_of_its_own(17, hash_seed) for hash_seed in ("1", "2", "2")}
    assert len(digests) == 1
    assert digests != {_digest_in_a_process_of_its_own(18, "1")}


def _digest_in_a_process_of_its_own(seed: int, hash_seed: str) -> str:
    program = f"from tests.simulator.run import run; print(run({seed}).digest)"
    result = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return result.stdout.strip()


@pytest.mark.parametrize("seed", [3, 8, 21, 40])
def test_a_turn_misses_nothing_of_the_replicas_that_it_does_not_look_at(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look_at_all(self: Replicas) -> list[Replica]:
        shards = [replica.shard.id for replica in self.values()]
        self._touched.update(shards)
        self._unplanned.update(dict.fromkeys(shards))
        return take_touched(self)

    digest, take_touched = run(seed).digest, Replicas.take_touched
    monkeypatch.setattr(Replicas, "take_touched", look_at_all)
    assert run(seed).digest == digest


def ack_before_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer leaves while the log is still on its way to the disk."""

    def answer(
        self: Replica, consistency: str, deadline_ns: int, respond: Callable, reply: BatchReply
    ) -> None:
        respond(reply)

    monkeypatch.setattr(Replica, "answer_written", answer)


def dedup_lost_at_takeover(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node knows only the requests that it has decided itself, not those of the log that it received or replayed."""
    monkeypatch.setattr(Replica, "settle", forgetful_settle)


def forgetful_settle(self: Replica) -> None:
    for segment in self.tail.segments:
        segment.remembered = True
    honest_settle(self)


honest_settle = Replica.settle


def requests_on_disk_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeat of a request that has left memory is taken for new."""
    monkeypatch.setattr(DedupWindow, "needs_disk", lambda self, batch: False)


def log_cut_before_the_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log forgets what the state on disk does not have yet."""

    def trim(self: Folder, others_have: int, is_fetched: bool) -> Trim | None:
        return Trim(self._shard, self._end.last) if self._end.last > self.mark.last else None

    monkeypatch.setattr(Folder, "trim", trim)


def mark_behind_the_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fold carries the mark of the one before: after a crash its operations are replayed once more."""
    take = Folder._take

    def late(self: Folder) -> Any:
        taken, size = take(self)
        return [*taken[:-1], replace(taken[-1], end=self.mark)], size

    monkeypatch.setattr(Folder, "_take", late)


def loaded_records_replace_newer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read from disk replaces what was written while it was read."""

    def learn(self: Loader, keys: dict, rows: list) -> object:
        for key, value, *rest in rows:
            if type(value) is bytes:
                self._table.learn({key: (value, *rest)})
        return honest(self, keys, rows)

    honest = Loader._learn
    monkeypatch.setattr(Loader, "_learn", learn)


def restarted_primary_resumes_its_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that comes back goes on serving the epoch it had opened in its former life."""
    follow = NodeMachine.follow

    def resume(self: NodeMachine, shard: Shard) -> None:
        replica = self.replicas.get(shard.id)
        own = shard.primary == self.config.id and shard.epoch == (replica and replica.opened_epoch)
        if replica is not None and replica.status is Status.RESTARTED and own:
            replication = Replication(shard, replica.node, replica.knobs, 1)
            replication.match = dict.fromkeys(replication.match, replica.last[1])
            replica.replication, replica.status = replication, Status.OPENED
        follow(self, shard)

    monkeypatch.setattr(NodeMachine, "follow", resume)


def seal_told_before_it_is_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A promise is answered while it is on its way to the disk."""
    monkeypatch.setattr(NodeMachine, "when_durable", lambda self, then: then())


def expiry_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record goes a second before its lifetime is over."""
    pop = Lifetimes.pop_ended
    monkeypatch.setattr(
        Lifetimes, "pop_ended", lambda self, time_ms, count: pop(self, time_ms + 1000, count)
    )


def batch_results_taken_at_their_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch whose first sending was never answered is told the refusals of its second as the whole truth."""
    monkeypatch.setattr(calls, "_judged", lambda call, result: result)


def condition_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write is done whatever it asks of the key."""
    monkeypatch.setattr(Judge, "_holds", lambda self, i, record: True)


def serves_before_active(monkeypatch: pytest.MonkeyPatch) -> None:
    """A primary serves without having been told that its epoch is ACTIVE."""
    on_durable = Replica.on_durable

    def serve(self: Replica) -> bool:
        is_news = on_durable(self)
        if self.status is Status.OPENED and self.is_opened:
            self.activate(self.shard)
        return is_news

    monkeypatch.setattr(Replica, "on_durable", serve)


RARE = {"loaded_records_replace_newer_ones": 125, "batch_results_taken_at_their_word": 250}
"""Where to begin with what one seed in fifty or a hundred catches, to save time."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("plant", "promise"),
    [
        (ack_before_fsync, "durability|linearizability|R4"),
        (dedup_lost_at_takeover, "exactly once"),
        (restarted_primary_resumes_its_epoch, "R7"),
        (seal_told_before_it_is_durable, "R1"),
        (serves_before_active, "step 4"),
        (expiry_too_early, "R5"),
        (batch_results_taken_at_their_word, "definite"),
        (condition_ignored, "against its condition"),
        (requests_on_disk_not_asked, "exactly once"),
        (log_cut_before_the_fold, "the log is trimmed"),
        (mark_behind_the_fold, "fold"),
        (loaded_records_replace_newer_ones, "linearizability|durability|the log says"),
    ],
)
def test_a_planted_bug_is_caught(
    plant: Callable[[pytest.MonkeyPatch], None], promise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    first = RARE.get(plant.__name__, 1)
    with pytest.raises(Violation, match=promise):
        run_all(range(first, first + 200))


def run_all(seeds: range) -> None:
    """Raises the first Violation. Forked, so that what is planted here is planted there."""
    with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
        for result in pool.map(attempt, seeds):
            if isinstance(result, str):
                pool.shutdown(cancel_futures=True)
                raise Violation(result)
