"""Exactly once: the window against a dictionary of everything that was ever written."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from bus_kv.errors import OutcomeUnknown
from bus_kv.knobs import Knobs
from bus_kv.protocol.batch import ABSENT, APPLIED, CREATED, DELETED, PUT, REFUSED, REPLACED, Batch
from nodes.machine.dedup import DedupWindow, Run

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


def log(window: DedupWindow, batch: Batch, outcomes: bytes, first: int, time_ms: int) -> None:
    run = Run(batch.numbers, batch.indexes, outcomes, 1, first, time_ms)
    window.add(batch.client, run)


@given(st.lists(BATCHES, max_size=12), st.data())
def test_within_the_window_each_identity_is_remembered(
    batches: list[Batch], data: st.DataObject
) -> None:
    window, model, seq = DedupWindow(KNOBS), dict[Any, Any](), 0
    for batch in batches:
        seen = window.seen(batch)
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


@given(st.lists(st.tuples(BATCHES, st.integers(0, 900)), max_size=12))
def test_what_is_forgotten_is_never_taken_for_new(steps: list[tuple[Batch, int]]) -> None:
    window, model, time_ms = DedupWindow(KNOBS), dict[Any, Any](), 0
    for batch, later_ms in steps:
        time_ms += later_ms
        seen = window.seen(batch)
        for i in range(len(batch)):
            written_ms = model.get((batch.client, *batch.identity(i)))
            if written_ms is None:
                continue
            assert i in seen
            if time_ms - written_ms <= WINDOW_MS:
                assert not isinstance(seen[i], OutcomeUnknown)
        outcomes = bytes(REFUSED if i in seen else CREATED for i in range(len(batch)))
        log(window, batch, outcomes, 1, time_ms)
        for i, outcome in enumerate(outcomes):
            if outcome == CREATED:
                model[batch.client, *batch.identity(i)] = time_ms


def test_a_request_older_than_the_window_is_not_to_be_sent_again() -> None:
    window, batch = DedupWindow(KNOBS), make_batch("a", [(7, 0)])
    log(window, batch, bytes([CREATED]), 1, time_ms=0)
    log(window, make_batch("b", [(1, 0)]), bytes([CREATED]), 2, time_ms=WINDOW_MS + 1)
    forgotten = window.seen(batch)[0]
    assert isinstance(forgotten, OutcomeUnknown)
    assert forgotten.retriable is False
    assert "a:7" in forgotten.message


def test_numbers_of_two_clients_do_not_meet() -> None:
    window = DedupWindow(KNOBS)
    log(window, make_batch("a", [(7, 0)]), bytes([CREATED]), 1, time_ms=0)
    assert window.seen(make_batch("b", [(7, 0)])) == {}
