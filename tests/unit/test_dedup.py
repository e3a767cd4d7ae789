"""Exactly once: the window against a dictionary of everything that was ever written."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from bus_kv.errors import OutcomeUnknown
from bus_kv.knobs import Knobs
from bus_kv.protocol.batch import ABSENT, APPLIED, CREATED, DELETED, PUT, REFUSED, REPLACED, Batch
from nodes.machine.dedup import DedupWindow, DiskRuns, Run

WINDOW_MS = 1000
KNOBS = Knobs(dedup_window_ms=WINDOW_MS, dedup_clients_max=10)
OUTCOMES = st.sampled_from([REFUSED, CREATED, REPLACED, DELETED, ABSENT])


def make_batch(client: str, identities: list[tuple[int, int]]) -> Batch:
    identities = sorted(identities)
    count = len(identities)
    return Batch(
        bytes([PUT]) * count, [b"k"] * count, [b"v"] * count, client,
        [number for number, _ in identities], [index for _, index in identities],
    )  # fmt: skip


IDENTITIES = st.lists(
    st.tuples(st.integers(0, 12) | st.sampled_from([2**63, 2**64 - 1]), st.integers(0, 2)),
    min_size=1, max_size=5, unique=True,
)  # fmt: skip
BATCHES = st.builds(make_batch, st.sampled_from(["a", "b"]), IDENTITIES)


def log(window: DedupWindow, batch: Batch, outcomes: bytes, first: int, time_ms: int) -> Run:
    run = Run(batch.numbers, batch.indexes, outcomes, 1, first, time_ms)
    window.add(batch.client, run)
    return run


@given(st.lists(BATCHES, max_size=12), st.data())
def test_within_the_window_each_identity_is_remembered(
    batches: list[Batch], data: st.DataObject
) -> None:
    window, model, seq = DedupWindow(KNOBS, (), 0), dict[Any, Any](), 0
    for batch in batches:
        seen = window.seen(batch, None)
        assert seen == {
            i: model[batch.client, *batch.identity(i)]
            for i in range(len(batch))
            if (batch.client, *batch.identity(i)) in model
        }
        outcomes = bytes(REFUSED if i in seen else data.draw(OUTCOMES) for i in range(len(batch)))
        log(window, batch, outcomes, seq + 1, time_ms=0)
        for i, outcome in enumerate(outcomes):
            if outcome in APPLIED:
                seq += 1
                model[batch.client, *batch.identity(i)] = ((1, seq), outcome)


@given(st.lists(BATCHES, max_size=12), st.integers(0, 3))
def test_what_has_left_memory_is_never_taken_for_new(batches: list[Batch], runs_max: int) -> None:
    window, model = DedupWindow(Knobs(dedup_runs_max=runs_max), (), 0), dict[Any, Any]()
    disk: list[tuple[str, Run]] = []
    for seq, batch in enumerate(batches):
        for identity, result in known(window, batch, disk).items():
            assert result == model[batch.client, *identity]
        unknown = [i for i in range(len(batch)) if (batch.client, *batch.identity(i)) not in model]
        outcomes = bytes(CREATED if i in unknown else REFUSED for i in range(len(batch)))
        run = log(window, batch, outcomes, seq * 10, time_ms=0)
        disk.append((batch.client, run))
        for place, i in enumerate(unknown):
            model[batch.client, *batch.identity(i)] = ((1, seq * 10 + place), CREATED)
        window.leave_to_disk(folded=seq * 10)


def known(window: DedupWindow, batch: Batch, disk: list[tuple[str, Run]]) -> dict[Any, Any]:
    """What the window says about a batch, with the disk's help when it asks for it: by identity."""
    runs = DiskRuns(-1, [run for client, run in disk if client == batch.client], 0)
    seen = window.seen(batch, runs if window.needs_disk(batch) else None)
    missing = set(range(len(batch))) - seen.keys()
    logged = [run for client, run in disk if client == batch.client]
    for i in missing:
        assert not any(run.find(*batch.identity(i)) for run in logged), "taken for new"
    return {batch.identity(i): result for i, result in seen.items()}


def test_a_request_older_than_the_window_is_not_to_be_sent_again() -> None:
    window, batch = DedupWindow(KNOBS, [("a", 9)], 0), make_batch("a", [(7, 0)])
    assert window.needs_disk(batch)
    forgotten = window.seen(batch, DiskRuns(floor=8, runs=[], folds=0))[0]
    assert isinstance(forgotten, OutcomeUnknown)
    assert forgotten.retriable is False
    assert "a:7" in forgotten.message


def test_a_number_above_all_that_is_on_disk_does_not_ask_it() -> None:
    window = DedupWindow(KNOBS, [("a", 9)], 0)
    assert not window.needs_disk(make_batch("a", [(10, 0)]))
    assert not window.needs_disk(make_batch("b", [(1, 0)]))


def test_idle_clients_are_forgotten_when_there_are_too_many() -> None:
    window = DedupWindow(KNOBS, [(f"c{i}", 1) for i in range(20)], time_ms=0)
    window.forget_idle(WINDOW_MS)
    assert window.needs_disk(make_batch("c0", [(1, 0)])), "within the window nobody is forgotten"
    window.forget_idle(WINDOW_MS + 1)
    assert not window.needs_disk(make_batch("c0", [(1, 0)]))
    assert window.needs_disk(make_batch("c19", [(1, 0)]))


def test_numbers_of_two_clients_do_not_meet() -> None:
    window = DedupWindow(KNOBS, (), 0)
    log(window, make_batch("a", [(7, 0)]), bytes([CREATED]), 1, time_ms=0)
    assert window.seen(make_batch("b", [(7, 0)]), None) == {}
