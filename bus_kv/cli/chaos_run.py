"""One fault from a fresh cluster to a verdict: load, the fault by a seeded schedule, healing, checks."""

from __future__ import annotations

import asyncio
import json
import random
from bisect import bisect_left
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

import bus_kv
from bus_kv.cli.chaos_checker import Verdict, check, check_linearizable
from bus_kv.cli.chaos_cluster import FAILURES, ChaosCluster, server_processes
from bus_kv.cli.chaos_history import Call, Evidence, Logged, Outcome
from bus_kv.cli.chaos_load import Load
from bus_kv.cli.local_cluster import ClusterError
from bus_kv.errors import BusKVError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from bus_kv.cli.chaos_cluster import Server
    from bus_kv.cli.chaos_faults import Fault
    from bus_kv.client.client import Client

PROGRESS_DEADLINE_S = 120.0
"""A share of the operations takes no longer, unless the cluster stands still."""
ACCEPTED_DEADLINE_S = 90.0
"""After this long without writes that are accepted a fault counts as a violation, though nothing is lost."""
WHOLE_DEADLINE_S = 180.0
TRANSFER_DEADLINE_S = 60.0
_SHORT_SHARE = 0.3
"""Of the faults that may be short, so many end before anybody is sure to have noticed."""
_SHORT_S_MAX = 1.5
_HOLD_S_MAX = 3.0
"""A fault lasts up to this much longer than writes need to be accepted again."""
_PERCENTILES = {"p50": 50, "p99": 99, "max": 100}
_LOG_PAGE_ROWS = 4000
_COPY = (
    "SELECT count(*), sum(hash(epoch, seq, op, key, value, request_id)) FROM oplog "
    "WHERE outcome <> 'rolled_back'"
)
_HISTORIES = 8
"""Keys whose history is read, too."""


@dataclass(frozen=True, slots=True)
class Plan:
    operations: int
    times: int
    """How often each fault strikes."""
    keys: int
    shards: int
    seed: int
    knobs: Mapping[str, float]


@dataclass(slots=True)
class Injection:
    """One strike; times are of the clock of the history."""

    targets: list[str]
    after_operations: int
    is_short: bool
    began_ns: int = 0
    struck_ns: int = 0
    """From here on the fault was there."""
    healed_ns: int = 0
    whole_ns: int = 0
    accepted_s: float | None = None
    """From the beginning until in every shard a write was acknowledged that was invoked during or after it."""
    standstill_s: float | None = None
    """The longest time without an acknowledged write, until all was whole again."""


@dataclass
class Report:
    fault: str
    calls: list[Call] = field(default_factory=list)
    injections: list[Injection] = field(default_factory=list)
    verdict: Verdict | None = None
    """None until it was judged: a run that was interrupted never is."""

    def count(self, *outcomes: Outcome) -> int:
        return sum(call.outcome in outcomes for call in self.calls)

    @property
    def accepted_s(self) -> list[float]:
        """Ascending; of the strikes that lasted."""
        lasting = [i for i in self.injections if not i.is_short]
        return sorted(i.accepted_s for i in lasting if i.accepted_s is not None)

    def to_json(self) -> dict[str, Any]:
        return {
            "fault": self.fault,
            "operations": len(self.calls),
            "acknowledged": self.count(Outcome.DONE),
            "unmet": self.count(Outcome.UNMET),
            "refused": self.count(Outcome.REFUSED),
            "indefinite": self.count(Outcome.UNKNOWN),
            "accepted_s": {n: percentile(self.accepted_s, p) for n, p in _PERCENTILES.items()},
            "standstill_s_max": max(
                (i.standstill_s for i in self.injections if i.standstill_s is not None),
                default=None,
            ),
            "judged": self.verdict is not None,
            "lost": self.verdict.lost if self.verdict else None,
            "violations": self.verdict.violations if self.verdict else [],
            "injections": [asdict(injection) for injection in self.injections],
        }


def percentile(ascending: Sequence[float], percent: float) -> float | None:
    """By the nearest rank; None of nothing."""
    if not ascending:
        return None
    rank = -(-len(ascending) * percent // 100)
    return round(ascending[max(int(rank), 1) - 1], 3)


class Trial:
    """One fault in one cluster, whose data stay in `folder`; with `servers` these, not processes of its own."""

    def __init__(
        self, folder: Path, fault: Fault, plan: Plan, note: Callable[[str], None],
        servers: Sequence[Server] = (),
    ) -> None:  # fmt: skip
        self._folder, self._fault, self._plan, self._note = folder, fault, plan, note
        self._servers = servers or server_processes(folder, fault.servers)
        self._random = random.Random(f"{plan.seed}/{fault.name}")
        self._load = Load(plan.keys, plan.shards, f"{plan.seed}/{fault.name}")
        self.report = Report(fault.name, self._load.calls)
        """Also of a run that was cancelled: what was measured until then."""

    async def run(self) -> Verdict:
        """Raises ClusterError and the like when processes cannot be started; what happens later is in the report."""
        try:
            found = await self._find()
        finally:
            self._measure()
        # Not before all is closed: it takes long, and a connection that answers no pings meanwhile is dropped.
        verdict = self.report.verdict = self._judge(found)
        if not verdict.is_good:
            self._keep_history()
        return verdict

    async def _find(self) -> Evidence | str:
        """What the cluster says of itself in the end, or why it has not come so far."""
        cluster = ChaosCluster(
            self._folder, servers=self._servers, links=self._fault.links,
            shards=self._plan.shards, knobs=self._plan.knobs,
        )  # fmt: skip
        async with cluster, bus_kv.connect(options=cluster.connection) as db:
            try:
                await cluster.wait_whole(db, WHOLE_DEADLINE_S)
                return await self._strike_and_ask(cluster, db)
            except FAILURES as error:
                return str(error) or type(error).__name__

    def _judge(self, found: Evidence | str) -> Verdict:
        """By the evidence, or, where the cluster has not come so far, by what its clients were told."""
        calls = self.report.calls
        if isinstance(found, str):
            return Verdict(violations=[f"stuck: {found}", *check_linearizable(calls)])
        return check(calls, found)

    async def _strike_and_ask(self, cluster: ChaosCluster, db: Client) -> Evidence:
        async with self._load.running(cluster.connection):
            for i in range(self._plan.times):
                await self._strike(cluster, db)
                self._note(f"  {self._fault.name} {i + 1}/{self._plan.times}: whole again")
            missing = self._plan.operations - len(self._load.calls)
            await self._until_more(max(missing, 1))
        return await gather_evidence(db, self._load.keys, cluster.node_ids)

    async def _strike(self, cluster: ChaosCluster, db: Client) -> None:
        share = self._plan.operations // (self._plan.times + 1)
        injection = Injection([], self._random.randint(share // 2, share), self._is_short())
        hold_s = self._random.uniform(0.05, _SHORT_S_MAX if injection.is_short else _HOLD_S_MAX)
        await self._until_more(injection.after_operations)
        injection.targets = await self._fault.choose(cluster, db, self._random)
        self.report.injections.append(injection)
        injection.began_ns = monotonic_ns()
        async with self._fault.act(cluster, injection.targets):
            injection.struck_ns = monotonic_ns()
            if self._fault.outlasted and not injection.is_short:
                await self._until_accepted(injection)
            await asyncio.sleep(hold_s)
        injection.healed_ns = monotonic_ns()
        await self._until_accepted(injection)
        self._load.is_slow = True
        await self._until_whole(cluster, db)
        self._load.is_slow = False
        injection.whole_ns = monotonic_ns()

    def _is_short(self) -> bool:
        """The first strike lasts, so that there is a time to report."""
        is_first = not self.report.injections
        return self._fault.may_be_short and not is_first and self._random.random() < _SHORT_SHARE

    async def _until_more(self, count: int) -> None:
        try:
            async with asyncio.timeout(PROGRESS_DEADLINE_S):
                await self._load.until_more(count)
        except TimeoutError:
            raise ClusterError(
                f"{count:,} calls did not return within {PROGRESS_DEADLINE_S:.0f} s"
            ) from None

    async def _until_accepted(self, injection: Injection) -> None:
        try:
            async with asyncio.timeout(ACCEPTED_DEADLINE_S):
                await self._load.until_accepted(injection.struck_ns)
        except TimeoutError:
            raise ClusterError(
                f"not every shard has accepted a write for {ACCEPTED_DEADLINE_S:.0f} s after the fault befell "
                f"{', '.join(injection.targets)}"
            ) from None

    async def _until_whole(self, cluster: ChaosCluster, db: Client) -> None:
        """By the map, and by a write at ALL: a fault that nobody has noticed yet is not in the map."""
        is_whole = False
        try:
            async with asyncio.timeout(WHOLE_DEADLINE_S):
                while not is_whole:
                    await cluster.wait_whole(db, WHOLE_DEADLINE_S)
                    await self._load.until_everywhere(monotonic_ns())
                    is_whole = not await cluster.lacks(db)
        except TimeoutError:
            lacks = await cluster.lacks(db) or "no write at ALL is acknowledged"
            raise ClusterError(
                f"not whole {WHOLE_DEADLINE_S:.0f} s after healing: {lacks}"
            ) from None

    # ---- afterwards ----

    def _measure(self) -> None:
        accepted = [c for c in self.report.calls if c.is_acknowledged_write]
        returns = sorted(c.returned_ns for c in accepted if c.returned_ns is not None)
        for injection in self.report.injections:
            accepted_ns = self._load.accepted_ns(injection.struck_ns)
            if accepted_ns is not None:
                injection.accepted_s = _seconds(accepted_ns - injection.began_ns)
            end_ns = injection.whole_ns or max([injection.began_ns, *returns[-1:]])
            inside = returns[
                bisect_left(returns, injection.began_ns) : bisect_left(returns, end_ns)
            ]
            moments = [injection.began_ns, *inside, end_ns]
            injection.standstill_s = _seconds(max(b - a for a, b in pairwise(moments)))

    def _keep_history(self) -> None:
        with (self._folder / "history.jsonl").open("w") as file:
            for call in self.report.calls:
                file.write(json.dumps(call.to_json()) + "\n")


def _seconds(duration_ns: int) -> float:
    return round(duration_ns / 1e9, 3)


async def gather_evidence(db: Client, keys: list[bytes], nodes: list[str]) -> Evidence:
    evidence = Evidence()
    for entry in await db.get_many(keys):
        evidence.final[entry.key] = (entry.version, entry.value)
    for key in keys[:_HISTORIES]:
        versions = [(past.version, past.value) async for past in db.history(key)]
        evidence.histories[key] = versions[::-1]
    shards = [shard["id"] for shard in (await db.map())["shards"]]
    for node in nodes:
        await asyncio.gather(*(_transfer(db, shard, node) for shard in shards))
        evidence.copies[node] = tuple((await db.sql(_COPY)).rows[0])
    evidence.log = await _read_log(db)
    return evidence


async def _transfer(db: Client, shard: str, node: str) -> None:
    """A node that has just returned may have to prove itself first."""
    end_ns = monotonic_ns() + int(TRANSFER_DEADLINE_S * 1e9)
    while True:
        try:
            await db.admin("transfer", {"shard": shard, "to": node})
            return
        except BusKVError as error:
            if not error.retriable or monotonic_ns() > end_ns:
                raise ClusterError(f"{node} cannot become primary: {error}") from None


async def _read_log(db: Client) -> list[Logged]:
    """All of the operation log that holds, in pages that fit into a message; one node serves all shards."""
    log: list[Logged] = []
    while True:
        after = log[-1].version if log else (0, 0)
        page = await db.sql(
            "SELECT epoch, seq, op, key, value, client, request_id FROM oplog "
            f"WHERE (epoch, seq) > {after} AND outcome <> 'rolled_back' "
            f"ORDER BY epoch, seq LIMIT {_LOG_PAGE_ROWS}"
        )
        log += [Logged((row[0], row[1]), *row[2:]) for row in page.rows]
        if len(page.rows) < _LOG_PAGE_ROWS:
            return log
