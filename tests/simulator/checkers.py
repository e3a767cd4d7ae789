"""Checkers: they look at the history of the clients and at the log on disk, never at the machines' own opinion.

The log gives every key a total order of states. From that and the clients' clocks follow durability, exactly-once and
linearizability per key, each in about linear time (versions make the order known; nothing has to be searched).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bus_kv.protocol import batch as b
from bus_kv.protocol.entry import decode_entry
from tests.simulator.world import Violation

if TYPE_CHECKING:
    from bus_kv.core.machine import EntryRow
    from nodes.machine.table import Record
    from tests.simulator.workload import Call


@dataclass(frozen=True, slots=True)
class Logged:
    """One applied operation as the log has it; `value` None is a delete or an expiry."""

    version: tuple[int, int]
    key: bytes
    value: bytes | None
    identity: tuple[str, int, int] | None
    expires_at: int | None


def read_log(rows: list[EntryRow]) -> list[Logged]:
    """All applied operations in order; raises Violation when the log is not whole."""
    logged: list[Logged] = []
    previous = (0, 0)
    time_ms = 0
    for row in rows:
        entry = decode_entry(row.body)
        if entry.previous != previous or entry.time_ms < time_ms:
            raise Violation(f"R2/R5: entry {entry.first} does not follow {previous}")
        previous, time_ms = (entry.epoch, entry.last), entry.time_ms
        seq = entry.first
        for outcomes, batch in entry.decoded():
            for i, outcome in enumerate(outcomes):
                if outcome not in b.APPLIED:
                    continue
                identity = (batch.client, *batch.identity(i)) if batch.client else None
                value = batch.values[i] if batch.kinds[i] == b.PUT else None
                ttl_ms = batch.ttls_ms.get(i)
                expires_at = None if ttl_ms is None else entry.time_ms + ttl_ms
                logged.append(
                    Logged((entry.epoch, seq), batch.keys[i], value, identity, expires_at)
                )
                seq += 1
    return logged


def check_exactly_once(log: list[Logged]) -> None:
    """No request stands in the log twice (R6)."""
    seen: dict[tuple[str, int, int], tuple[int, int]] = {}
    for operation in log:
        if operation.identity is None:
            continue
        if operation.identity in seen:
            raise Violation(
                f"exactly once: {operation.identity} was applied at {seen[operation.identity]} "
                f"and again at {operation.version}"
            )
        seen[operation.identity] = operation.version


def check_durability(log: list[Logged], history: list[Call]) -> None:
    """Every acknowledged write stands in the log where its receipt says; no definite failure stands there (R3)."""
    at = {operation.version: operation for operation in log}
    values = {operation.value for operation in log}
    for call in history:
        if call.kind == "get":
            continue
        if call.outcome == "ok" and call.version is not None:
            found = at.get(call.version)
            if found is None or (found.key, found.value) != (call.key, call.value):
                raise Violation(f"durability: acknowledged {call} is not in the log: {found}")
        if call.outcome == "definite" and call.value is not None and call.value in values:
            raise Violation(f"definite: {call} was refused and stands in the log")


def check_linearizable(log: list[Logged], history: list[Call]) -> None:
    """Per key: what was returned follows the log's order and real time."""
    by_key: dict[bytes, list[Call]] = {}
    for call in history:
        if call.outcome == "ok":
            by_key.setdefault(call.key, []).append(call)
    invoked = {call.value: call.invoked_ns for call in history if call.value is not None}
    for key, calls in sorted(by_key.items()):
        states = [None, *[operation for operation in log if operation.key == key]]
        _check_key(key, states, calls, invoked)


def _check_key(
    key: bytes, states: list[Logged | None], calls: list[Call], invoked: dict[bytes, int]
) -> None:
    index = {state.version: i for i, state in enumerate(states) if state is not None}
    finished: list[tuple[int, int]] = []
    for call in sorted(calls, key=lambda c: c.returned_ns or 0):
        assert call.returned_ns is not None
        lower = max((i for returned_ns, i in finished if returned_ns < call.invoked_ns), default=0)
        if call.kind != "get" and call.version is not None:
            position = index[call.version]
            if position <= lower:
                raise Violation(f"linearizability of {key!r}: {call} is older than what was seen")
        else:
            position = _observed(states, index, call, lower)
            state = states[position]
            value = None if state is None else state.value
            if value is not None and invoked[value] > call.returned_ns:
                raise Violation(f"linearizability of {key!r}: {call} saw the future")
        finished.append((call.returned_ns, position))


def _observed(
    states: list[Logged | None], index: dict[tuple[int, int], int], call: Call, lower: int
) -> int:
    """The state that a read saw, or that a delete of nothing found: the earliest possible one."""
    if call.kind == "get" and call.version is not None:
        position = index.get(call.version)
        state = None if position is None else states[position]
        if position is None or state is None or state.value != call.read or position < lower:
            raise Violation(f"linearizability: {call} saw {state}, already past {states[lower]}")
        return position
    for position in range(lower, len(states)):
        state = states[position]
        if state is None or state.value is None:
            return position
    raise Violation(f"linearizability: {call} found nothing, but the key was there")


def check_table(log: list[Logged], records: dict[bytes, Record]) -> None:
    """The primary's table is the log, replayed."""
    expected: dict[bytes, Record] = {}
    for operation in log:
        if operation.value is None:
            expected.pop(operation.key, None)
        else:
            expected[operation.key] = (operation.value, *operation.version, operation.expires_at)
    if expected != records:
        raise Violation("the table is not what the log says")
