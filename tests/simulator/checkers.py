"""Checkers: they look at the history of the clients and at the log on disk, never at the machines' own opinion.

The log gives every key a total order of states. From that and the clients' clocks follow durability, exactly-once and
linearizability per key, each in about linear time (versions make the order known; nothing has to be searched).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any

from bus_kv.protocol import batch as b
from bus_kv.protocol.entry import decode_entry
from nodes.machine.status import Status
from nodes.machine.table import RECORD_BYTES, UNKNOWN
from tests.simulator.world import Violation

CLOCKS_MS_MAX = 20_000
"""How far log time may lag behind the world: clocks are off by seconds, the last writes are some time ago."""

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.core.machine import EntryRow
    from bus_kv.protocol.shard_map import Shard as MapShard
    from nodes.machine.node import NodeMachine
    from nodes.machine.replica import Replica
    from nodes.machine.table import Record, Table
    from tests.simulator.state import Shard
    from tests.simulator.workload import Call


@dataclass(frozen=True, slots=True)
class Logged:
    """One applied operation as the log has it; `value` None is a delete or an expiry."""

    version: tuple[int, int]
    key: bytes
    value: bytes | None
    identity: tuple[str, int, int] | None
    expires_at: int | None
    time_ms: int
    is_expiry: bool


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
                version, is_expiry = (entry.epoch, seq), batch.kinds[i] == b.EXPIRE
                logged.append(
                    Logged(version, batch.keys[i], value, identity, expires_at, time_ms, is_expiry)
                )
                seq += 1
    return logged


def check_same(log: list[EntryRow], own: list[EntryRow], replica: Replica) -> None:
    """What a member's log has and knows to be committed is, byte for byte, the primary's (R2)."""
    known = {row.last: row for row in log}
    for row in own:
        if row.last <= replica.commit_seq and row != known.get(row.last):
            raise Violation(f"R2: {replica.node} has committed {row}, not {known.get(row.last)}")
    if max((row.last for row in own), default=replica.base_seq) < replica.commit_seq:
        raise Violation(f"R2: {replica.node} has less than it has committed")


def check_range(log: list[Logged], shard: MapShard) -> None:
    """A shard's log has its own keys only (R11)."""
    for operation in log:
        if operation.key < shard.start or (shard.end is not None and operation.key >= shard.end):
            raise Violation(f"R11: {operation} stands in the log of {shard.id}")


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
        if call.kind == "get" or (call.level == "one" and call.outcome == "ok"):
            continue
        if call.outcome == "ok" and call.version is None and call.kind == "put":
            raise Violation(f"durability: {call} was acknowledged without a version")
        if call.outcome == "ok" and call.version is not None:
            found = at.get(call.version)
            if found is None or (found.key, found.value) != (call.key, call.value):
                raise Violation(f"durability: acknowledged {call} is not in the log: {found}")
        if call.outcome == "definite" and call.value is not None and call.value in values:
            raise Violation(f"definite: {call} was refused and stands in the log")


def check_expired(log: list[Logged], now_ms: int) -> None:
    """A record goes when its lifetime is over, not before, and not never (R5)."""
    state: dict[bytes, Logged] = {}
    for operation in log:
        before = state.get(operation.key)
        if operation.is_expiry and (
            before is None or before.expires_at is None or before.expires_at > operation.time_ms
        ):
            raise Violation(f"R5: {operation} expired {before}")
        state[operation.key] = operation
    late_ms = now_ms - CLOCKS_MS_MAX
    for operation in state.values():
        if operation.expires_at is not None and operation.expires_at < late_ms:
            raise Violation(f"R5: {operation} has not expired")


def check_linearizable(log: list[Logged], history: list[Call]) -> None:
    """Per key: what was returned follows the log's order and real time."""
    invoked = {call.value: call.invoked_ns for call in history if call.value is not None}
    by_key: dict[bytes, list[Call]] = {}
    versions = {operation.version for operation in log}
    for call in history:
        if call.level == "one" and (call.kind == "get" or call.version not in versions):
            continue  # a replica's own view; a write that only its primary had
        if call.outcome == "ok" or call.code == "PRECONDITION_FAILED":
            by_key.setdefault(call.key, []).append(call)
    for key, calls in sorted(by_key.items()):
        states = [None, *[operation for operation in log if operation.key == key]]
        _Key(key, states, invoked).check(calls)


class _Key:
    """The states that one key went through, and what its calls may have seen of them."""

    def __init__(self, key: bytes, states: list[Logged | None], invoked: dict[bytes, int]) -> None:
        self.key, self.states, self.invoked = key, states, invoked
        self.index = {state.version: i for i, state in enumerate(states) if state is not None}

    def check(self, calls: list[Call]) -> None:
        finished: list[tuple[int, int]] = []
        for call in sorted(calls, key=lambda c: c.returned_ns or 0):
            assert call.returned_ns is not None
            lower = max((i for done_ns, i in finished if done_ns < call.invoked_ns), default=0)
            position = self._position(call, lower)
            if position is not None:
                self._not_from_the_future(call, position)
                if (
                    call.level != "one"
                ):  # else it may be committed, and seen, long after it returned
                    finished.append((call.returned_ns, position))

    def _position(self, call: Call, lower: int) -> int | None:
        """The earliest state that the call can have seen or made; None when it tells nothing."""
        if call.code == "PRECONDITION_FAILED":
            tells = not call.atomic and (call.if_absent or call.if_version)
            return self._first(call, lower, self._refuses) if tells else None
        if call.kind == "get" and call.version is not None:
            return self._first(
                call, lower, lambda c, i: self._version(i) == c.version and self._value(i) == c.read
            )
        if call.version is None:
            return self._first(call, lower, lambda _, i: self._value(i) is None)
        position = self.index[call.version]
        if position <= lower:
            raise Violation(f"linearizability of {self.key!r}: {call} is older than what was seen")
        if call.found is not None and call.found != (self._value(position - 1) is not None):
            raise Violation(f"linearizability of {self.key!r}: {call} tells a wrong found")
        if not self._holds(call, position - 1):
            raise Violation(
                f"linearizability of {self.key!r}: {call} was done against its condition"
            )
        return position

    def _first(self, call: Call, lower: int, fits: Callable[[Call, int], bool]) -> int:
        for position in range(lower, len(self.states)):
            if fits(call, position):
                return position
        raise Violation(f"linearizability of {self.key!r}: {call} fits no state from {lower} on")

    def _holds(self, call: Call, position: int) -> bool:
        """Whether the call's condition held in this state."""
        if call.if_absent:
            return self._value(position) is None
        if call.if_version:
            return self._value(position) is not None and self._version(position) == call.if_version
        return True

    def _refuses(self, call: Call, position: int) -> bool:
        return not self._holds(call, position)

    def _value(self, position: int) -> bytes | None:
        state = self.states[position]
        return None if state is None else state.value

    def _version(self, position: int) -> tuple[int, int] | None:
        state = self.states[position]
        return None if state is None else state.version

    def _not_from_the_future(self, call: Call, position: int) -> None:
        value = self._value(position)
        assert call.returned_ns is not None
        if call.kind == "get" and value is not None and self.invoked[value] > call.returned_ns:
            raise Violation(f"linearizability of {self.key!r}: {call} saw the future")


def check_table(log: list[Logged], table: Table, state: Shard) -> None:
    """What the primary answers from, memory over disk, is the log, replayed."""
    expected = replayed(log)
    keys = {operation.key for operation in log}
    for key in sorted(keys):
        record = table.get(key)
        if record is UNKNOWN:
            record = state.rows[key][1] if key in state.rows else None
        if record != expected.get(key):
            raise Violation(f"{key!r} is {record}, the log says {expected.get(key)}")
    sizes = sum(len(key) + len(record[0]) for key, record in expected.items())
    if (table.keys, table.data_bytes) != (len(expected), sizes):
        raise Violation(f"{table.keys} keys, {table.data_bytes} bytes are counted, not {sizes}")


def check_state(log: list[Logged], state: Shard, whole_seq: int) -> None:
    """The state on disk is the log up to its mark, every operation once, in the oplog too.

    A snapshot that no fold has followed yet may lack what was written again up to `whole_seq` while it was read.
    """
    folded = [operation for operation in log if operation.version[1] <= state.mark.last]
    again = {op.key for op in log if state.mark.last < op.version[1] <= whole_seq}
    rows = {key: record for key, (_, record) in state.rows.items()}
    expected = replayed(folded)
    lacking = {key for key in expected.keys() & again if key not in rows}
    if rows != {key: record for key, record in expected.items() if key not in lacking}:
        raise Violation("fold: the state is not what the log says up to its mark")
    if [(row[0], row[1]) for row in state.oplog] != [operation.version for operation in folded]:
        raise Violation("fold: the oplog does not hold every folded operation once, in order")
    if state.rolled_back.keys() & {operation.version for operation in log}:
        raise Violation("fold: the oplog tells of a committed operation that it was rolled back")
    known = {
        (client, number, index)
        for client, run in state.requests
        for number, index in zip(run[0], run[1] or repeat(0), strict=False)
    }
    for operation in folded:
        if operation.identity is not None and operation.identity not in known:
            raise Violation(f"R6: the state does not know the request {operation.identity}")


def replayed(log: list[Logged]) -> dict[bytes, Record]:
    records: dict[bytes, Record] = {}
    for operation in log:
        if operation.value is None:
            records.pop(operation.key, None)
        else:
            records[operation.key] = (operation.value, *operation.version, operation.expires_at)
    return records


def check_looked_at(node: NodeMachine, replica: Replica) -> None:
    """After a turn, whether it has looked at the replica or not, nothing is left that only a look would have done."""
    shard, replication = replica.shard.id, replica.replication
    if shard in node.replicas._touched:
        return  # for the next turn
    left: dict[str, Any] = {
        "rows for the log": replica._rows or replica._row_changed,
        "a request to be judged": replica._soon,
        "a decision without an entry": any(not s.appended for s in replica.tail.segments),
        "a subscription": node.links._listen(replica),
        "a deadline": shard not in node.replicas._unplanned
        and replica.next_deadline_ns() < node.replicas._deadlines_ns[shard],
    }
    if replication is not None and replica.status is not Status.OPENING:
        left["entries for the others"] = replication._pending
        left["a confirm round"] = replication._round_wanted
    for what, is_left in left.items():
        if is_left:
            raise Violation(f"{node.config.id} has forgotten {what} of shard {shard}")


def check_cache(table: Table) -> None:
    """The cache's bound is worth as much as the bytes that it counts."""
    records = table.young.items()
    held = sum(len(key) + RECORD_BYTES + (len(r[0]) if r else 0) for key, r in records)
    if held != table._young_bytes:
        raise Violation(f"the cache holds {held} bytes and counts {table._young_bytes}")
