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
    settings_of,
)  # fmt: skip
from coordinator.machine.roles import Roles, is_served, next_roles

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.knobs import Knobs
    from bus_kv.protocol.messages import Heartbeat, ReplicaReport
    from bus_kv.protocol.shard_map import Settings

FIRST_SHARD = "s1"
PLANNED_MAX = 32
"""Shards that are served and change their configuration at a time: each stands still for a moment meanwhile."""


@dataclass(slots=True)
class Heard:
    """What the active coordinator knows beside the map."""

    beats: dict[str, Heartbeat] = field(default_factory=dict)
    """Newest heartbeat of every node."""
    silent: set[str] = field(default_factory=set)
    """Nodes that are down; only asked for members, never iterated, like the next two."""
    unproven: set[str] = field(default_factory=set)
    """Nodes that were down a short while ago: others are preferred as primaries."""
    held: set[str] = field(default_factory=set)
    """Nodes that go down again and again: they are given nothing new to learn for now."""
    heard_ns: Callable[[str], int] = lambda _: 0
    """When a node gave a sign of life last."""
    fell_ns: Callable[[str], int] = lambda _: 0
    """When a node went down last."""
    since_ns: dict[str, int] = field(default_factory=dict)
    """Shard -> when this coordinator saw its epoch begin."""
    auto_failover: bool = True
    """False: another node becomes primary only when an operator says so."""
    layout_due: bool = False
    """The wait for more nodes is over."""
    opened: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Shard -> attempt of this coordinator whose opening entry is durable."""
    running: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Shard -> attempt that this coordinator is driving."""
    changing: int = 0
    """How many of them it began lately."""
    epoch_floor: int = 0
    """Greatest epoch that a replica has refused with: go above it."""
    forgotten: set[str] = field(default_factory=set)
    """Shards whose replicas know more than the map: nothing is done until the map is restored (R10)."""
    failovers: set[str] = field(default_factory=set)
    """Shards whose primary is to be replaced because an operator says so."""
    transfers: dict[str, str] = field(default_factory=dict)
    """Shard -> member that an operator wants as its primary."""
    settings: dict[str, Keyspace] = field(default_factory=dict)
    """Keyspaces as an operator wants them."""
    cluster_settings: Settings | None = None
    """What holds for the whole cluster, as an operator wants it."""
    restoring: bool = False
    """An operator wants the nodes' newest map as the map."""
    newest: ShardMap | None = None
    """The newest map that a node has told."""
    records: dict[str, Shard] = field(default_factory=dict)
    """Shard -> its newest ACTIVE record that a replica has told."""

    def is_behind(self, map: ShardMap) -> bool:
        """Whether a node has seen a newer map, or a replica knows more than this one (R10)."""
        versions = [beat.map_version for beat in self.beats.values()]
        return max(versions, default=0) > map.map_version or bool(self.forgotten)

    @property
    def remembers_all(self) -> bool:
        """No node has seen a newer map than the one that was told."""
        versions = [beat.map_version for beat in self.beats.values()]
        return self.newest is not None and self.newest.map_version >= max(versions, default=0)

    def hears(self, member: Member) -> bool:
        """Whether this very replica's process is there."""
        beat = self.beats.get(member.node)
        return (
            beat is not None and beat.incarnation == member.incarnation
            and member.node not in self.silent
        )  # fmt: skip

    def misses(self, member: Member) -> bool:
        """Whether this very replica's process is known to be gone.

        Who was not heard yet is neither there nor missed: a coordinator that has just started takes nobody for dead.
        """
        beat = self.beats.get(member.node)
        is_another = beat is not None and beat.incarnation != member.incarnation
        return is_another or member.node in self.silent

    def is_fresh(self, shard: str, member: Member) -> bool:
        """Whether a node gave a sign of life after the shard's epoch had begun."""
        return self.heard_ns(member.node) >= self.since_ns.get(shard, 0)

    def report(self, shard: str, member: Member) -> ReplicaReport | None:
        """What a member says about its replica, if it still is the one that the map means (R8)."""
        beat = self.beats.get(member.node)
        if beat is None or beat.incarnation != member.incarnation:
            return None
        return beat.report(shard)


def next_map(old: ShardMap, heard: Heard, knobs: Knobs, token: Callable[[], str]) -> ShardMap:
    """The map that should be; `old` itself when nothing is to be done."""
    if heard.restoring and heard.newest is not None and heard.remembers_all:
        return _restored(old, heard.newest, heard, token)
    if any(beat.map_version > old.map_version for beat in heard.beats.values()):
        # Nodes remember a newer map: this one is about to be read again, or its store has forgotten (R10).
        return old
    changed = {
        name: wanted for name, wanted in heard.settings.items()
        if old.keyspaces.get(name, wanted) != wanted
    }  # fmt: skip
    settings = heard.cluster_settings or old.settings
    if changed or settings != old.settings:
        return old.changed(
            keyspaces={**old.keyspaces, **changed}, settings=settings, writer=token()
        )
    map = replace(old, nodes=_nodes(old, heard))
    if not old.keyspaces and map.nodes == old.nodes:
        return _lay_out(old, heard, knobs, token)
    shards = _shards(map, heard, token)
    if shards == old.shards and map.nodes == old.nodes:
        return old
    last_epoch = max([old.last_epoch, *(s.epoch for s in shards.values())])
    return old.changed(nodes=map.nodes, shards=shards, last_epoch=last_epoch, writer=token())


def _shards(map: ShardMap, heard: Heard, token: Callable[[], str]) -> dict[str, Shard]:
    """Openings become ACTIVE; whose primary is lost gets another one; of the others a few at a time take a step."""
    shards = dict(map.shards)
    last_epoch = max(map.last_epoch, heard.epoch_floor)
    room = PLANNED_MAX - heard.changing
    for id, shard in sorted(map.shards.items()):
        if heard.opened.get(id) == (shard.epoch, shard.token):
            shards[id] = replace(shard, state=ShardState.ACTIVE, last_active=None, attempts=())
            continue
        if room <= 0 and is_served(shard, heard):
            continue
        wanted = next_roles(shard, map, heard)
        if wanted is not None:
            room -= 1
            last_epoch += 1
            shards[id] = reconfigured(shard, wanted, last_epoch, token())
    return shards


def _restored(old: ShardMap, newest: ShardMap, heard: Heard, token: Callable[[], str]) -> ShardMap:
    """The map that the nodes remember, above every version and epoch that anybody has seen.

    Attempts that the store forgot and replicas have promised go on as attempts, also where others were begun since:
    they acknowledged nothing, or a replica would know them as ACTIVE.
    """
    versions = [old.map_version, newest.map_version, *(b.map_version for b in heard.beats.values())]
    reports = [report for _, beat in sorted(heard.beats.items()) for report in beat.shards]
    last_epoch = max(
        old.last_epoch, newest.last_epoch, heard.epoch_floor, *[r.epoch for r in reports]
    )
    shards = dict(newest.shards)
    for id, record in sorted(heard.records.items()):
        # A replica may know that an attempt became ACTIVE and no node's map does, nor what was begun since.
        if id not in shards or record.epoch > _served_epoch(shards[id]):
            shards[id] = record
    for id, shard in sorted(shards.items()):
        served, known = _served_epoch(shard), {(shard.epoch, shard.token), *shard.attempts}
        promises = {(r.epoch, r.token) for r in reports if r.id == id and r.epoch > served} - known
        if promises:
            last_epoch += 1
            roles = Roles(shard.members, shard.primary, shard.learners)
            again = reconfigured(shard, roles, last_epoch, token())
            shards[id] = replace(again, attempts=(*again.attempts, *sorted(promises)))
    return replace(
        newest, map_version=max(versions) + 1, last_epoch=last_epoch, shards=shards, writer=token()
    )


def _served_epoch(shard: Shard) -> int:
    """The last one of which a record says that it was ACTIVE; 0 when there was none."""
    if shard.state is ShardState.ACTIVE:
        return shard.epoch
    return shard.last_active.epoch if shard.last_active else 0


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
    """The first shard of a fresh cluster: the whole key space on the first nodes by id."""
    if any(beat.shards for beat in heard.beats.values()):
        # Nodes remember a shard and the store does not: an empty one would hide their data (R10).
        return old
    up = sorted(id for id, node in old.nodes.items() if node.state is NodeState.UP)
    if not up or (len(up) < knobs.replication_factor and not heard.layout_due):
        return old
    epoch = old.last_epoch + 1
    members = tuple(Member(id, old.nodes[id].incarnation) for id in up[: knobs.replication_factor])
    shard = Shard(
        FIRST_SHARD, "default", b"", None, epoch, token(), members, members[0].node,
        ShardState.RECOVERING,
    )  # fmt: skip
    keyspace = Keyspace(replication_factor=knobs.replication_factor)
    return old.changed(
        keyspaces={"default": keyspace}, shards={shard.id: shard}, last_epoch=epoch,
        settings=settings_of(old, knobs), writer=token(),
    )  # fmt: skip


def reconfigured(shard: Shard, roles: Roles, epoch: int, token: str) -> Shard:
    """Step 1 of a reconfiguration: the record under a new epoch, RECOVERING, with its past carried along."""
    if shard.state is ShardState.ACTIVE:
        last_active: Configuration | None = Configuration(shard.epoch, shard.token, shard.members)
        attempts: tuple[tuple[int, str], ...] = ()
    else:
        last_active, attempts = shard.last_active, (*shard.attempts, (shard.epoch, shard.token))
    return replace(
        shard, epoch=epoch, token=token, members=roles.members, primary=roles.primary,
        learners=roles.learners, state=ShardState.RECOVERING, last_active=last_active,
        attempts=attempts,
    )  # fmt: skip
