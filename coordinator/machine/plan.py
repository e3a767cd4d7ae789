"""What the map should become, from the map and what has been heard: pure functions, ties broken by id.

The coordinator is level-triggered: it compares what is with what should be and changes the map one compare-and-set at a
time, so a coordinator that dies between any two steps leaves nothing that the next one would not find and finish.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from bus_kv.protocol.shard_map import (
    Configuration,
    Keyspace,
    Member,
    Node,
    NodeState,
    Shard,
    ShardMap,
    ShardState,
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.knobs import Knobs
    from bus_kv.protocol.messages import Heartbeat, ReplicaReport

FIRST_SHARD = "s1"


@dataclass(slots=True)
class Heard:
    """What the active coordinator knows beside the map."""

    beats: dict[str, Heartbeat] = field(default_factory=dict)
    """Newest heartbeat of every node."""
    silent: set[str] = field(default_factory=set)
    """Nodes that have missed too many, or said that they leave; only asked for members, never iterated."""
    layout_due: bool = False
    """The wait for more nodes is over."""
    opened: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Shard -> attempt of this coordinator whose opening entry is durable."""
    running: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Shard -> attempt that this coordinator is driving."""
    epoch_floor: int = 0
    """Greatest epoch that a replica has refused with: go above it."""


def next_map(old: ShardMap, heard: Heard, knobs: Knobs, token: Callable[[], str]) -> ShardMap:
    """The map that should be; `old` itself when nothing is to be done."""
    nodes = _nodes(old, heard)
    if nodes != old.nodes:
        return old.changed(nodes=nodes, writer=token())
    if not old.keyspaces:
        return _lay_out(old, heard, knobs, token)
    shards = dict(old.shards)
    last_epoch = max(old.last_epoch, heard.epoch_floor)
    for id, shard in sorted(old.shards.items()):
        if heard.opened.get(id) == (shard.epoch, shard.token):
            shards[id] = replace(shard, state=ShardState.ACTIVE, last_active=None, attempts=())
        elif needs_reconfigure(shard, heard):
            last_epoch += 1
            shards[id] = reconfigured(old, shard, last_epoch, token())
    if shards == old.shards:
        return old
    last_epoch = max(old.last_epoch, *(s.epoch for s in shards.values()))
    return old.changed(shards=shards, last_epoch=last_epoch, writer=token())


def _nodes(old: ShardMap, heard: Heard) -> dict[str, Node]:
    nodes = dict(old.nodes)
    for id, beat in sorted(heard.beats.items()):
        known = nodes.get(id)
        state = NodeState.DOWN if id in heard.silent else NodeState.UP
        if known is not None and known.state in (NodeState.DRAINING, NodeState.DRAINED):
            state = known.state
        nodes[id] = Node(id, beat.incarnation, state, beat.zone, beat.weight)
    for id, node in old.nodes.items():
        if id in heard.silent and id not in heard.beats and node.state is NodeState.UP:
            nodes[id] = replace(node, state=NodeState.DOWN)
    return nodes


def _lay_out(old: ShardMap, heard: Heard, knobs: Knobs, token: Callable[[], str]) -> ShardMap:
    """The first shard of a fresh cluster: the whole key space on the first node by id."""
    if any(b.shards or b.map_version > old.map_version for b in heard.beats.values()):
        # Nodes remember a map and the store does not: it was lost, and an empty shard would hide their data (R10).
        return old
    up = sorted(id for id, node in old.nodes.items() if node.state is NodeState.UP)
    if not up or (len(up) < knobs.replication_factor and not heard.layout_due):
        return old
    epoch = old.last_epoch + 1
    member = Member(up[0], old.nodes[up[0]].incarnation)
    shard = Shard(
        FIRST_SHARD, "default", b"", None, epoch, token(), (member,), member.node,
        ShardState.RECOVERING,
    )  # fmt: skip
    keyspace = Keyspace(replication_factor=knobs.replication_factor)
    return old.changed(
        keyspaces={"default": keyspace}, shards={shard.id: shard}, last_epoch=epoch, writer=token()
    )


def needs_reconfigure(shard: Shard, heard: Heard) -> bool:
    """Whether nobody will make this shard serve unless a new epoch begins."""
    if shard.state is not ShardState.ACTIVE:
        is_driven = heard.running.get(shard.id) == (shard.epoch, shard.token)
        return not is_driven or (shard.last_active is None and shard.primary in heard.silent)
    report = report_of(shard, heard)
    if report is None:
        return False
    if report.epoch > shard.epoch:
        return True
    same = (report.epoch, report.token) == (shard.epoch, shard.token)
    return same and report.status in ("restarted", "promised")


def report_of(shard: Shard, heard: Heard) -> ReplicaReport | None:
    """What the primary says about its replica, if it still is the replica that the map means (R8)."""
    beat = heard.beats.get(shard.primary)
    member = shard.member(shard.primary)
    if beat is None or member is None or beat.incarnation != member.incarnation:
        return None
    return next((r for r in beat.shards if r.id == shard.id), None)


def note_opened(shard: Shard, heard: Heard) -> None:
    """The primary has said that the epoch is open: what its last heartbeat told about the time before is over."""
    report = report_of(shard, heard)
    if report is not None:
        report.epoch, report.token, report.status = shard.epoch, shard.token, "opened"


def reconfigured(map: ShardMap, shard: Shard, epoch: int, token: str) -> Shard:
    """Step 1 of a reconfiguration: the record under a new epoch, RECOVERING, with its past carried along.

    A shard that never was ACTIVE has acknowledged nothing, so any node that is up may have it.
    """
    members, primary = shard.members, shard.primary
    up = sorted(id for id, node in map.nodes.items() if node.state is NodeState.UP)
    if shard.state is not ShardState.ACTIVE and shard.last_active is None and up:
        primary = shard.primary if shard.primary in up else up[0]
        members = (Member(primary, map.nodes[primary].incarnation),)
    if shard.state is ShardState.ACTIVE:
        last_active: Configuration | None = Configuration(shard.epoch, shard.token, shard.members)
        attempts: tuple[tuple[int, str], ...] = ()
    else:
        last_active, attempts = shard.last_active, (*shard.attempts, (shard.epoch, shard.token))
    return replace(
        shard, epoch=epoch, token=token, members=members, primary=primary,
        state=ShardState.RECOVERING,
        last_active=last_active, attempts=attempts,
    )  # fmt: skip
