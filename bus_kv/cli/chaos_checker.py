"""The verdict on a history: linearizable per key, no acknowledged write lost, every request applied once.

`check` trusts nobody: linearizability follows from what the clients saw alone; durability and exactly-once compare that
with the operation log, the histories and the values of the healed cluster.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from bus_kv.cli.chaos_history import LEVELS_THAT_LAST, Call, Evidence, Kind, Logged, Outcome
from bus_kv.cli.chaos_search import Search

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bus_kv.protocol.batch import Version


@dataclass
class Verdict:
    """What is wrong, a line each. `lost` counts acknowledged writes that are not where their receipts say."""

    lost: int = 0
    violations: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return not self.violations


def check(calls: list[Call], evidence: Evidence) -> Verdict:
    verdict = Verdict()
    verdict.violations += check_linearizable(calls)
    lost = check_durable(calls, evidence)
    verdict.lost = len(lost)
    verdict.violations += lost
    verdict.violations += check_exactly_once(calls, evidence.log)
    verdict.violations += check_definite(calls, evidence.log)
    verdict.violations += check_told_alike(evidence)
    verdict.violations += check_copies(evidence)
    return verdict


# ---- linearizability, from the clients alone ----


def check_linearizable(calls: list[Call]) -> list[str]:
    """Per key: first what versions tell, then whether there is an order in real time."""
    values = {call.value: call for call in calls if call.value is not None}
    found: list[str] = []
    for key, own in sorted(_by_key(calls).items()):
        wrong = [*_check_versions(own, values)]
        if not wrong:
            reason = _search(own)
            wrong = [] if reason is None else [reason]
        found += [f"linearizability of {key.decode()}: {text}" for text in wrong]
    return found


def _by_key(calls: Iterable[Call]) -> dict[bytes, list[Call]]:
    by_key: defaultdict[bytes, list[Call]] = defaultdict(list)
    for call in calls:
        by_key[call.key].append(call)
    return by_key


def _check_versions(calls: list[Call], values: dict[bytes, Call]) -> Iterable[str]:
    """A version is one write, a write has one version, and what is read was written to this key, and before."""
    writes: dict[Version, Call] = {}
    for call in calls:
        if call.is_acknowledged_write:
            assert call.version is not None
            other = writes.setdefault(call.version, call)
            if other is not call:
                yield f"two writes have one version: [{other}] and [{call}]"
    versions: dict[bytes, Version] = {}
    for call in calls:
        if call.kind is Kind.GET and call.version is not None and call.read is not None:
            complaint = _complain(call, values.get(call.read), writes.get(call.version))
            if complaint is None and versions.setdefault(call.read, call.version) != call.version:
                complaint = f"tells another version than an earlier read, {versions[call.read]}"
            if complaint is not None:
                yield f"[{call}] {complaint}"


def _complain(read: Call, written: Call | None, at_version: Call | None) -> str | None:
    """`written` is the call that wrote what was read, `at_version` the one acknowledged at that version."""
    if written is None or written.key != read.key:
        return "reads what was never written to it"
    if written.outcome in (Outcome.REFUSED, Outcome.UNMET):
        return f"reads what was refused: [{written}]"
    if read.returned_ns is not None and written.invoked_ns > read.returned_ns:
        return f"reads the future: [{written}]"
    if written.version not in (None, read.version):
        return f"tells another version than [{written}]"
    if at_version is not None and at_version is not written:
        return f"reads another write than [{at_version}]"
    return None


def _search(calls: list[Call]) -> str | None:
    seen = {c.read: c.version for c in calls if c.kind is Kind.GET and c.read is not None}
    must: list[Call] = []
    maybes: list[Call] = []
    for call in calls:
        if call.outcome in (Outcome.DONE, Outcome.UNMET):
            must.append(call)
        elif call.outcome is Outcome.UNKNOWN and call.is_write:
            version = None if call.value is None else seen.get(call.value)
            if version is None:
                maybes.append(call)
            else:
                must.append(replace(call, version=version))
    return Search(must, maybes).run()


# ---- what the cluster tells, against what the clients saw ----


def check_durable(calls: list[Call], evidence: Evidence) -> list[str]:
    """Every acknowledged write stands in the log where its receipt says, and the keys end as the log says."""
    at = {row.version: row for row in evidence.log}
    lost = []
    for call in calls:
        if call.is_acknowledged_write and call.level in LEVELS_THAT_LAST:
            assert call.version is not None
            row = at.get(call.version)
            if row is None or (row.kind, row.key, row.value) != (call.kind, call.key, call.value):
                lost.append(f"lost: [{call}] was acknowledged, the log has {row}")
    return lost


def check_exactly_once(calls: list[Call], log: list[Logged]) -> list[str]:
    """No request and no value is in the log twice, and nothing is there that nobody asked for."""
    wrong = []
    requests = Counter(row.request_id for row in log if row.request_id is not None)
    wrong += [f"applied {n} times: request {r}" for r, n in requests.items() if n > 1]
    values = Counter(row.value for row in log if row.value is not None)
    wrong += [f"applied {n} times: the put of {v!r}" for v, n in values.items() if n > 1]
    versions = Counter(row.version for row in log)
    wrong += [f"{n} operations have the version {v}" for v, n in versions.items() if n > 1]
    puts = {call.value: call.key for call in calls if call.kind is Kind.PUT}
    strange = [r for r in log if r.value is not None and puts.get(r.value) != r.key]
    wrong += [f"nobody asked for {row}" for row in strange]
    asked = Counter(
        (c.client, c.key) for c in calls
        if c.kind is Kind.DELETE and (c.version is not None or c.outcome is Outcome.UNKNOWN)
    )  # fmt: skip
    done = Counter((row.client or "", row.key) for row in log if row.kind == Kind.DELETE)
    wrong += [
        f"{n} deletes of {key!r} by {client}, at most {asked[client, key]} were asked for"
        for (client, key), n in done.items()
        if n > asked[client, key]
    ]
    return wrong


def check_definite(calls: list[Call], log: list[Logged]) -> list[str]:
    """What was refused for good is not in the log."""
    applied = {row.value for row in log if row.value is not None}
    refused = (Outcome.REFUSED, Outcome.UNMET)
    return [
        f"refused and applied all the same: [{call}]"
        for call in calls
        if call.outcome in refused and call.value is not None and call.value in applied
    ]


def check_told_alike(evidence: Evidence) -> list[str]:
    """Values and histories are what the log makes them."""
    by_key: defaultdict[bytes, list[tuple[Version, bytes | None]]] = defaultdict(list)
    for row in sorted(evidence.log, key=lambda row: row.version[1]):
        by_key[row.key].append((row.version, row.value))
    wrong = []
    for key, told in evidence.final.items():
        version, value = by_key[key][-1] if key in by_key else (None, None)
        expected = (None, None) if value is None else (version, value)
        if told != expected:
            wrong.append(f"{key.decode()} is read as {told}, the log says {expected}")
    for key, history in evidence.histories.items():
        if history != by_key[key]:
            wrong.append(f"the history of {key.decode()} is not what the log says of it")
    return wrong


def check_copies(evidence: Evidence) -> list[str]:
    """Every member has the same operation log, and as many operations as the one that was read."""
    wrong = [
        f"{node} has {copy[0]} operations, the log {len(evidence.log)}"
        for node, copy in evidence.copies.items()
        if copy[0] != len(evidence.log)
    ]
    if len(set(evidence.copies.values())) > 1:
        wrong.append(f"members differ: {evidence.copies}")
    return wrong
