"""Histories made by hand: each bad one is caught, each good one is not."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from bus_kv.cli.chaos_checker import check, check_linearizable
from bus_kv.cli.chaos_history import Call, Evidence, Kind, Logged, Outcome
from bus_kv.cli.chaos_search import Search

KEY = b"k"
MS = 1_000_000


def at(call: Call, invoked_ms: float, returned_ms: float | None = None) -> Call:
    returned_ns = None if returned_ms is None else int(returned_ms * MS)
    return replace(call, invoked_ns=int(invoked_ms * MS), returned_ns=returned_ns)


def version_of(seq: int | None) -> tuple[int, int] | None:
    return None if seq is None else (1, seq)


def put(value: str, seq: int | None = None, **fields: Any) -> Call:
    """Acknowledged if it has a seq, else of unknown outcome."""
    outcome = Outcome.UNKNOWN if seq is None else Outcome.DONE
    known: dict[str, Any] = {"outcome": outcome, "version": version_of(seq), **fields}
    return Call("c", Kind.PUT, KEY, 0, value=value.encode(), **known)


def delete(seq: int | None = None, **fields: Any) -> Call:
    """Acknowledged; without a seq nothing was there."""
    known: dict[str, Any] = {"outcome": Outcome.DONE, "version": version_of(seq), **fields}
    return Call("c", Kind.DELETE, KEY, 0, **known)


def get(value: str | None = None, seq: int | None = None) -> Call:
    read = None if value is None else value.encode()
    return Call(
        "c", Kind.GET, KEY, 0, outcome=Outcome.DONE, version=version_of(seq), read=read,
        found=read is not None,
    )  # fmt: skip


def unmet(value: str, **fields: Any) -> Call:
    return put(value, **{"outcome": Outcome.UNMET, **fields})


def in_turn(*calls: Call) -> list[Call]:
    """One after the other."""
    return [at(call, 10 * i, 10 * i + 5) for i, call in enumerate(calls)]


def complaints(calls: list[Call]) -> str:
    return "; ".join(check_linearizable(calls))


GOOD: dict[str, list[Call]] = {
    "writes and reads in turn": in_turn(get(), put("a", 2, found=False), get("a", 2), delete(3), get()),
    "a delete of nothing": in_turn(delete(), put("a", 2), delete(3), delete()),
    "conditions": in_turn(
        put("a", 2, if_absent=True), unmet("b", if_absent=True), put("c", 3, if_version=(1, 2)),
        unmet("d", if_version=(1, 2)),
    ),
    "reads beside a write see either": [
        at(put("a", 2), 0, 1), at(put("b", 3), 10, 20), at(get("b", 3), 11, 12), at(get("a", 2), 11, 13),
    ],
    "an unknown write that was seen": [at(put("a"), 0, 9), at(get("a", 2), 20, 21)],
    "an unknown write that happens late": [
        at(put("a"), 0, 1), at(put("b", 2), 2, 3), at(get("b", 2), 4, 5), at(get("a", 7), 6, 7),
    ],
    "an unknown write that never happened": [at(put("a"), 0, 1), at(get(), 2, 3), at(put("b", 2), 4, 5)],
    "an unknown delete explains an absence": [
        at(put("a", 2), 0, 1), at(delete(outcome=Outcome.UNKNOWN), 2, 3), at(get("a", 2), 4, 5),
        at(get(), 6, 7),
    ],
    "an unknown put explains a refusal": [
        at(put("a"), 0, 1), at(unmet("b", if_absent=True), 2, 3),
    ],
    "an unknown put and an unknown delete": [
        at(put("a"), 0, 1), at(delete(outcome=Outcome.UNKNOWN), 0, 1),
        at(unmet("b", if_absent=True), 2, 3), at(get(), 4, 5),
    ],
}  # fmt: skip

BAD: dict[str, tuple[str, list[Call]]] = {
    "lost write": ("no order", in_turn(put("a", 2), get())),
    "stale read": ("no order", in_turn(put("a", 2), put("b", 3), get("a", 2))),
    "stale absence": ("no order", in_turn(get(), put("a", 2), get("a", 2), get())),
    "reads that go back": (
        "no order",
        [at(put("a", 2), 0, 1), at(put("b", 3), 2, 30), *(
            at(read, 4 + 2 * i, 5 + 2 * i) for i, read in enumerate([get("b", 3), get("a", 2)])
        )],
    ),
    "versions against real time": ("no order", in_turn(put("a", 3), put("b", 2))),
    "deleted and still there": ("no order", in_turn(put("a", 2), delete(3), get("a", 2))),
    "an overwritten value comes back": (
        "no order", in_turn(put("a", 2), put("b", 3), delete(4), put("c", 5), get("b", 3)),
    ),
    "done against if_absent": ("no order", in_turn(put("a", 2), put("b", 3, if_absent=True))),
    "done against if_version": (
        "no order", in_turn(put("a", 2), put("b", 3), put("c", 4, if_version=(1, 2))),
    ),
    "refused without a reason": ("no order", in_turn(put("a", 2), unmet("b", if_version=(1, 2)))),
    "two of a race won": (
        "no order",
        [at(put("a", 2, if_absent=True), 0, 9), at(put("b", 3, if_absent=True), 0, 9)],
    ),
    "a wrong found": ("no order", in_turn(put("a", 2), put("b", 3, found=False))),
    "a delete of nothing, though it was there": ("no order", in_turn(put("a", 2), delete())),
    "read before it was written": ("future", [at(get("a", 2), 0, 1), at(put("a", 2), 2, 3)]),
    "never written": ("never written", in_turn(get("x", 2))),
    "refused and read": (
        "refused", in_turn(put("a", outcome=Outcome.REFUSED), get("a", 2)),
    ),
    "a refused condition and read": ("refused", in_turn(unmet("a", if_absent=True), get("a", 2))),
    "one version for two writes": ("one version", in_turn(put("a", 2), put("b", 2))),
    "another version than acknowledged": ("another version", in_turn(put("a", 2), get("a", 3))),
    "two versions of an unknown write": (
        "another version", in_turn(put("a"), get("a", 2), get("a", 3)),
    ),
    "another value at the version": ("another write", in_turn(put("a"), put("b", 2), get("a", 2))),
    "an unknown write cannot be overwritten and come back": (
        "no order", in_turn(put("a"), get("a", 2), put("b", 3), get("a", 2)),
    ),
    "an unknown put happens once": (
        "no order",
        in_turn(put("a"), unmet("b", if_absent=True), delete(5), unmet("c", if_absent=True)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("calls", GOOD.values(), ids=GOOD)
def test_what_a_single_copy_could_answer_is_good(calls: list[Call]):
    assert check_linearizable(calls) == []


@pytest.mark.parametrize(("says", "calls"), BAD.values(), ids=BAD)
def test_what_no_single_copy_could_answer_is_caught(says: str, calls: list[Call]):
    assert says in complaints(calls)


def test_the_complaint_names_key_and_call():
    text = complaints(in_turn(put("a", 2), get()))
    assert text.startswith("linearizability of k:")
    assert "c get k" in text


def test_keys_are_judged_apart():
    other = [replace(call, key=b"other") for call in in_turn(get(), put("b", 3))]
    assert check_linearizable([*in_turn(put("a", 2), get("a", 2)), *other]) == []


# ---- against the log ----

CALLS = in_turn(put("a", 2), put("b", 3, level="all"), delete(4), put("c", 5), put("d"))
LOG = [
    Logged((1, 2), "put", KEY, b"a", "c", "c:1"),
    Logged((1, 3), "put", KEY, b"b", "c", "c:2"),
    Logged((1, 4), "delete", KEY, None, "c", "c:3"),
    Logged((1, 5), "put", KEY, b"c", "c", "c:4"),
]


def evidence(log: list[Logged], **changes: Any) -> Evidence:
    last = log[-1]
    final = {KEY: (None, None) if last.value is None else (last.version, last.value)}
    told = {"final": final, "histories": {KEY: [(r.version, r.value) for r in log]}}
    return Evidence(log, **{**told, **changes})


def test_a_log_that_agrees_is_good():
    assert check(CALLS, evidence(LOG)).is_good


def test_an_unknown_write_may_be_in_the_log():
    late = Logged((1, 6), "put", KEY, b"d", "c", "c:5")
    assert check(CALLS, evidence([*LOG, late])).is_good


@pytest.mark.parametrize("missing", range(4))
def test_a_write_that_is_not_in_the_log_is_lost(missing: int):
    verdict = check(CALLS, evidence([row for i, row in enumerate(LOG) if i != missing]))
    assert verdict.lost == 1
    assert "lost" in verdict.violations[0]


def test_another_write_at_the_version_of_a_receipt_is_a_loss():
    assert check(CALLS, evidence([*LOG[:3], replace(LOG[3], value=b"d")])).lost == 1


REFUSED = [*CALLS, at(put("e", outcome=Outcome.REFUSED), 100, 101)]
WRONG: dict[str, tuple[str, list[Call], Evidence]] = {
    "request twice": (
        "applied 2 times: request", CALLS, evidence([*LOG, replace(LOG[3], version=(2, 7))]),
    ),
    "value twice, under another request": (
        "applied 2 times: the put", CALLS,
        evidence([*LOG, replace(LOG[3], version=(2, 7), request_id="c:9")]),
    ),
    "delete twice": (
        "2 deletes", CALLS,
        evidence([*LOG[:3], replace(LOG[2], version=(1, 6), request_id="c:9"), LOG[3]]),
    ),
    "one version twice": (
        "have the version", CALLS, evidence([*LOG, replace(LOG[2], request_id="c:9")]),
    ),
    "unasked": (
        "nobody asked", CALLS, evidence([*LOG, Logged((1, 9), "put", KEY, b"z", "c", "c:9")]),
    ),
    "refused and applied": (
        "refused and applied", REFUSED, evidence([*LOG, Logged((1, 9), "put", KEY, b"e", "c", "c:9")]),
    ),
    "another value in the end": (
        "is read as", CALLS, evidence(LOG, final={KEY: ((1, 3), b"b")}),
    ),
    "gone in the end": ("is read as", CALLS, evidence(LOG, final={KEY: (None, None)})),
    "a member that has less": ("n2 has 3 operations", CALLS, evidence(LOG, copies={"n2": (3, "x")})),
    "members that differ": (
        "members differ", CALLS, evidence(LOG, copies={"n1": (4, "x"), "n2": (4, "y")}),
    ),
    "a gap in the history": (
        "history", CALLS, evidence(LOG, histories={KEY: [((1, 5), b"c")]}),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("says", "calls", "told"), WRONG.values(), ids=WRONG)
def test_what_the_cluster_tells_is_compared(says: str, calls: list[Call], told: Evidence):
    assert says in "; ".join(check(calls, told).violations)


# ---- long histories ----


def simulated(seed: int, count: int) -> list[Call]:
    """What clients of one true copy see: calls take effect at one moment between invocation and return, some of the
    writes are of unknown outcome, and those may take effect later or never."""
    rng = random.Random(seed)
    calls, moments = [], []
    for i in range(count):
        invoked_ms = i * 2.0
        call = at(rng.choice([put(str(i)), get(), get(), delete()]), invoked_ms, invoked_ms + 40)
        is_unknown = call.is_write and rng.random() < 0.03
        call.outcome = Outcome.UNKNOWN if is_unknown else Outcome.DONE
        late_ms = rng.choice([10, 400]) if is_unknown else 40
        if not is_unknown or rng.random() < 0.7:
            moments.append((invoked_ms + rng.random() * late_ms, i, call))
        calls.append(call)
    take_effect([call for _, _, call in sorted(moments, key=lambda m: m[:2])])
    return calls


def take_effect(calls: list[Call]) -> None:
    value, version = None, None
    for seq, call in enumerate(calls):
        told: tuple[Any, ...] = (version, value is not None)
        if call.kind is Kind.PUT:
            value, version = call.value, (1, seq)
            told = (version, told[1])
        elif call.kind is Kind.DELETE:
            told = ((1, seq) if value is not None else None, told[1])
            value, version = None, None
        else:
            call.read = value
        if call.outcome is Outcome.DONE:
            call.version, call.found = told


@pytest.mark.parametrize("seed", range(20))
def test_long_histories_of_a_true_copy_are_good(seed: int):
    assert check_linearizable(simulated(seed, 600)) == []


@pytest.mark.parametrize("seed", range(20))
def test_one_stale_read_in_a_long_history_is_caught(seed: int):
    calls = simulated(seed, 600)
    reads = [c for c in calls if c.kind is Kind.GET and c.version is not None]
    earlier, later = reads[5], reads[-5]
    later.read, later.version = earlier.read, earlier.version
    assert complaints(calls)


# ---- the search against trying everything ----


def is_explained(calls: list[Call], last: tuple[int, int] = (0, 0), state: Any = None) -> bool:
    """By trying every order of a few calls; `state` is the version of the key, "?" of an unknown write, None absent."""
    must = [c for c in calls if c.outcome is not Outcome.UNKNOWN]
    if not must:
        return True
    limit_ns = min(c.returned_ns or 0 for c in must)
    return any(
        is_explained([c for c in calls if c is not call], *after)
        for call in calls
        if call.invoked_ns <= limit_ns and (after := effect(call, last, state)) is not None
    )


def effect(call: Call, last: tuple[int, int], state: Any) -> tuple[tuple[int, int], Any] | None:
    """(newest version, state) after the call; None if it would have been answered otherwise."""
    holds = state is None if call.if_absent else call.if_version in (None, state)
    if call.outcome is Outcome.UNMET:
        return None if holds else (last, state)
    if call.kind is Kind.GET:
        return (last, state) if call.version == state else None
    if call.kind is Kind.DELETE and state is None:
        is_nothing = call.outcome is Outcome.DONE and call.version is None
        return (last, state) if is_nothing and holds else None
    if not holds or call.found not in (None, state is not None):
        return None
    if call.outcome is Outcome.UNKNOWN:
        return (last, "?" if call.kind is Kind.PUT else None)
    if call.version is None or call.version <= last:
        return None
    return (call.version, call.version if call.kind is Kind.PUT else None)


def tiny(seed: int) -> list[Call]:
    """Some calls at once, with answers that may be right or wrong."""
    rng = random.Random(seed)
    puts = [put(str(i), i + 1, found=rng.choice([None, True, False])) for i in range(3)]
    others = [
        put("x"), put("y", if_absent=True), delete(outcome=Outcome.UNKNOWN), delete(), delete(4),
        get(), get("0", 1), get("1", 2), unmet("u", if_absent=True), unmet("v", if_version=(1, 1)),
    ]  # fmt: skip
    chosen = rng.sample(puts, rng.randint(1, 3)) + rng.sample(others, rng.randint(1, 4))
    written = {c.value for c in chosen}
    moments = [(rng.randint(0, 12), rng.randint(0, 8)) for _ in chosen]
    calls = [at(c, m, m + d) for c, (m, d) in zip(chosen, moments, strict=True)]
    return [c for c in calls if c.read is None or c.read in written]


def test_the_search_finds_an_order_exactly_when_there_is_one():
    verdicts = []
    for seed in range(4000):
        calls = tiny(seed)
        expected = is_explained(calls)
        assert (Search(*split(calls)).run() is None) == expected, [*map(str, calls)]
        verdicts.append(expected)
    assert 400 < sum(verdicts) < 3600


def split(calls: list[Call]) -> tuple[list[Call], list[Call]]:
    unknown = [c for c in calls if c.outcome is Outcome.UNKNOWN]
    return [c for c in calls if c.outcome is not Outcome.UNKNOWN], unknown
