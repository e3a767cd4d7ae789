"""Who should have which part in a shard: one step at a time from what the map says towards what is wanted.

Pure functions of the map and of what has been heard; ties are broken by id. Every step is a reconfiguration under a new
epoch, and only one that can succeed is begun: enough members of the last active configuration are there to be sealed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bus_kv.protocol.shard_map import Member, NodeState, ShardState

if TYPE_CHECKING:
    from bus_kv.protocol.messages import ReplicaReport
    from bus_kv.protocol.shard_map import Shard, ShardMap
    from coordinator.machine.plan import Heard

    Members = tuple[Member, ...]

CAUGHT_UP_OPERATIONS = 1000
"""A learner that lags no more than this becomes a member; the rest follows within moments."""


@dataclass(frozen=True, slots=True)
class Roles:
    members: Members
    primary: str
    learners: Members = ()


def next_roles(shard: Shard, map: ShardMap, heard: Heard) -> Roles | None:
    """The next configuration of a shard; None when it stays as it is, or when no other could come about now."""
    if shard.id in heard.forgotten:
        return None
    if shard.state is not ShardState.ACTIVE:
        return _start_again(shard, map, heard)
    if shard.id in heard.failovers:
        return _take_over(shard, shard.members, heard)
    if _primary_is_lost(shard, heard):
        return _take_over(shard, shard.members, heard)
    everyone = (*shard.members, *shard.learners)
    if any(
        [heard.misses(m) for m in everyone] + [_is_stranded(shard, m, heard) for m in shard.members]
    ):
        return _without_the_lost(shard, heard)
    if not all([heard.hears(m) for m in everyone]):
        return None
    return _grow(shard, map, heard) or _shrink(shard, map) or _transfer(shard, heard)


def is_served(shard: Shard, heard: Heard) -> bool:
    """Whether its primary goes on serving if nothing is done, writes at QUORUM too, and is meant to."""
    lost = shard.id in heard.failovers or _primary_is_lost(shard, heard)
    there = sum([heard.hears(member) for member in shard.members])
    return shard.state is ShardState.ACTIVE and there >= shard.quorum and not lost


def _start_again(shard: Shard, map: ShardMap, heard: Heard) -> Roles | None:
    """An attempt that nobody drives, or that cannot succeed with whom it has: who is stranded never has its entries.

    What its primary said before it was chosen is not held against it: if it cannot open, it refuses.
    """
    primary = shard.member(shard.primary)
    there = [
        m for m in shard.members
        if heard.hears(m) and (m == primary or not _is_stranded(shard, m, heard))
    ]  # fmt: skip
    driven = heard.running.get(shard.id) == (shard.epoch, shard.token)
    if driven and primary in there and len(there) >= shard.quorum:
        return None
    if shard.last_active is not None:
        return _take_over(shard, shard.last_active.members, heard)
    return _begin(shard, map)


def _begin(shard: Shard, map: ShardMap) -> Roles | None:
    """A shard that never was active has acknowledged nothing, so any nodes that are up may have it."""
    count = map.keyspaces[shard.keyspace].replication_factor
    up = [node for _, node in sorted(map.nodes.items()) if node.state is NodeState.UP]
    up.sort(key=lambda node: shard.member(node.id) is None)
    members = tuple(Member(node.id, node.incarnation) for node in up[:count])
    if not members:
        return None
    ids = [member.node for member in members]
    return Roles(members, shard.primary if shard.primary in ids else ids[0])


def _primary_is_lost(shard: Shard, heard: Heard) -> bool:
    """Whether the primary cannot serve its epoch any more."""
    member = shard.member(shard.primary)
    if member is None or heard.misses(member):
        return True
    report = heard.report(shard.id, member)
    if report is None:
        return False
    same = (report.epoch, report.token) == (shard.epoch, shard.token)
    return report.epoch > shard.epoch or (same and report.status in ("restarted", "promised"))


def _take_over(shard: Shard, last_active: Members, heard: Heard) -> Roles | None:
    """Those that are there go on, under the one with the longest log, as far as is known.

    Where an operator has asked for it, they do so without the primary; where only an operator may ask, under no other.
    """
    by_order = shard.id in heard.failovers
    there = [
        m for m in last_active if heard.hears(m) and not (by_order and m.node == shard.primary)
    ]
    n = len(last_active)
    if len(there) < n - (n // 2 + 1) + 1:
        return None
    candidates = [m for m in there if m.node not in heard.unproven] or there
    if not (heard.auto_failover or by_order):
        candidates = [m for m in there if m.node == shard.primary]
    if not candidates:
        return None
    best = max(
        candidates, key=lambda m: (_last(heard.report(shard.id, m)), m.node == shard.primary)
    )
    # Who is stranded is sealed with the others, but could never hold the opening entry.
    members = tuple(m for m in there if m == best or not _is_stranded(shard, m, heard))
    return Roles(members, best.node, _remaining(shard.learners, heard))


def _last(report: ReplicaReport | None) -> tuple[int, int]:
    return (0, 0) if report is None else report.last


def _remaining(learners: Members, heard: Heard) -> Members:
    return tuple(m for m in learners if not heard.misses(m))


def _is_stranded(shard: Shard, member: Member, heard: Heard) -> bool:
    """Whether it could catch up by a snapshot only, which only a learner may take (R8)."""
    report = heard.report(shard.id, member)
    return report is not None and report.status == "stranded"


def _without_the_lost(shard: Shard, heard: Heard) -> Roles | None:
    """A member that is down leaves, and comes back as a learner.

    Not before all others are heard again: without a majority the shard would be sealed and nobody could open it, so not
    even gets at ONE would be answered.
    """
    members = tuple(
        m for m in shard.members if heard.hears(m) and not _is_stranded(shard, m, heard)
    )
    n = len(shard.members)
    if len(members) < n - shard.quorum + 1 or _awaited(shard, heard):
        return None
    return Roles(members, shard.primary, _remaining(shard.learners, heard))


def _awaited(shard: Shard, heard: Heard) -> set[str]:
    """Members that may have died with those that are down, as they were not heard since, or not at all yet."""
    down = [m.node for m in (*shard.members, *shard.learners) if m.node in heard.silent]
    fell_ns = max(map(heard.fell_ns, down), default=0)
    there = [m for m in shard.members if not heard.misses(m)]
    return {
        m.node for m in there if not heard.hears(m) or heard.heard_ns(m.node) < fell_ns
    }  # fmt: skip


def _grow(shard: Shard, map: ShardMap, heard: Heard) -> Roles | None:
    """A learner that has caught up becomes a member; where replicas are missing, a spare node becomes a learner."""
    for learner in shard.learners:
        if _has_caught_up(shard, learner, heard):
            learners = tuple(m for m in shard.learners if m != learner)
            return Roles((*shard.members, learner), shard.primary, learners)
    wanted = map.keyspaces[shard.keyspace].replication_factor
    if len(shard.members) + len(shard.learners) >= wanted:
        return None
    spares = [
        _member(map, id) for id, node in sorted(map.nodes.items()) if node.state is NodeState.UP
    ]
    used = {m.node for m in (*shard.members, *shard.learners)}
    spares = [m for m in spares if m.node not in used and heard.hears(m)]
    # One that may have died when this epoch began has to be heard again: a learner costs an epoch.
    spares = [m for m in spares if m.node not in heard.held and heard.is_fresh(shard.id, m)]
    if not spares:
        return None
    load = _replica_counts(map)
    # One that has a part of the log already has the least to catch up.
    best = min(
        spares,
        key=lambda m: (not _last(heard.report(shard.id, m))[1], load.get(m.node, 0), m.node),
    )
    return Roles(shard.members, shard.primary, (*shard.learners, best))


def whom_to_ask(map: ShardMap, heard: Heard) -> set[str]:
    """Nodes whose next heartbeat somebody waits for: learners and their primaries, and whoever was not heard lately."""
    nodes: set[str] = set()
    for shard in map.shards.values():
        if shard.state is not ShardState.ACTIVE:
            past = shard.last_active.members if shard.last_active else ()
            nodes |= {m.node for m in past if not (heard.hears(m) or heard.misses(m))}
            continue
        nodes |= _awaited(shard, heard)
        if shard.learners:
            nodes |= {shard.primary, *(m.node for m in shard.learners)}
        elif len(shard.members) < map.keyspaces[shard.keyspace].replication_factor:
            used = {m.node for m in shard.members}
            spares = [_member(map, id) for id in map.nodes if id not in used]
            nodes |= {m.node for m in spares if heard.hears(m) and not heard.is_fresh(shard.id, m)}
    return nodes


def _member(map: ShardMap, id: str) -> Member:
    return Member(id, map.nodes[id].incarnation)


def _has_caught_up(shard: Shard, learner: Member, heard: Heard) -> bool:
    primary = shard.member(shard.primary)
    own = heard.report(shard.id, learner)
    its = heard.report(shard.id, primary) if primary else None
    if own is None or its is None or (own.epoch, own.token) != (shard.epoch, shard.token):
        return False
    # Its newest entry is of this epoch: so its log has come to join the primary's, without a gap.
    joined = own.status == "following" and own.last[0] == shard.epoch
    return joined and its.commit_seq - own.last[1] <= CAUGHT_UP_OPERATIONS


def _shrink(shard: Shard, map: ShardMap) -> Roles | None:
    """More members than the replication factor says: the backup on the fullest node leaves."""
    if len(shard.members) <= map.keyspaces[shard.keyspace].replication_factor:
        return None
    load = _replica_counts(map)
    backups = [m for m in shard.members if m.node != shard.primary]
    leaving = max(backups, key=lambda m: (load.get(m.node, 0), m.node))
    return Roles(tuple(m for m in shard.members if m != leaving), shard.primary, shard.learners)


def _replica_counts(map: ShardMap) -> dict[str, int]:
    counts: dict[str, int] = {}
    for shard in map.shards.values():
        for member in (*shard.members, *shard.learners):
            counts[member.node] = counts.get(member.node, 0) + 1
    return counts


def _transfer(shard: Shard, heard: Heard) -> Roles | None:
    target = heard.transfers.get(shard.id)
    if target is None or target == shard.primary or shard.member(target) is None:
        return None
    return Roles(shard.members, target, shard.learners)
