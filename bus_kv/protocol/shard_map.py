"""The shard map: who holds which keys under which epoch (design rules: DESIGN.md, "Authority").

One JSON document in the store, readable by people. It is immutable here: a change is a new ShardMap made with
`dataclasses.replace`, and only a coordinator's compare-and-set makes it true. `map_version` grows by one per change;
`last_epoch` is the greatest epoch ever given, to any shard, so that none is used twice.
"""

from __future__ import annotations

import base64
from bisect import bisect_right
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bus_kv.knobs import Knobs


class ShardState(StrEnum):
    ACTIVE = "active"
    RECOVERING = "recovering"
    FROZEN = "frozen"


class NodeState(StrEnum):
    UP = "up"
    SUSPECT = "suspect"
    DOWN = "down"
    DRAINING = "draining"
    DRAINED = "drained"


@dataclass(frozen=True, slots=True)
class Member:
    """A replica's identity: a node, and the incarnation of the disk it answered from (R8)."""

    node: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class Configuration:
    """A configuration that was ACTIVE: what a later one must seal."""

    epoch: int
    token: str
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    id: str
    keyspace: str
    start: bytes
    """First token of the range [start, end)."""
    end: bytes | None
    epoch: int
    token: str
    """Random per attempt: tells two attempts apart that a coordinator never learned the outcome of."""
    members: tuple[Member, ...]
    primary: str
    state: ShardState
    last_active: Configuration | None = None
    attempts: tuple[tuple[int, str], ...] = ()
    """(epoch, token) tried since last_active, unfinished."""
    learners: tuple[Member, ...] = ()

    def member(self, node: str) -> Member | None:
        return next((m for m in self.members if m.node == node), None)

    @property
    def quorum(self) -> int:
        """W: how many members make a write durable at QUORUM."""
        return len(self.members) // 2 + 1


@dataclass(frozen=True, slots=True)
class Node:
    id: str
    incarnation: str
    state: NodeState
    zone: str | None = None
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Keyspace:
    policy: str = "range"
    replication_factor: int = 3
    consistency: str = "quorum"


@dataclass(frozen=True, slots=True)
class Settings:
    """What holds for the whole cluster and can be changed while it runs."""

    heartbeat_interval_s: float
    heartbeat_misses_max: int
    """A node is down after this many intervals without a heartbeat."""
    heartbeat_good_min: int
    """A node that was down is preferred as a primary again after this many heartbeats in a row."""
    auto_failover: bool = True
    """False: another node becomes primary only when an operator says so."""


@dataclass(frozen=True)
class ShardMap:
    map_version: int = 0
    last_epoch: int = 0
    writer: str = ""
    """Random per change: a coordinator finds here whether an unanswered compare-and-set was its own."""
    keyspaces: dict[str, Keyspace] = field(default_factory=dict)
    shards: dict[str, Shard] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    settings: Settings | None = None
    """None before the first layout."""

    @cached_property
    def _ranges(self) -> dict[str, tuple[list[bytes], list[Shard]]]:
        ranges: dict[str, tuple[list[bytes], list[Shard]]] = {}
        for shard in sorted(self.shards.values(), key=lambda s: (s.keyspace, s.start)):
            starts, shards = ranges.setdefault(shard.keyspace, ([], []))
            starts.append(shard.start)
            shards.append(shard)
        return ranges

    def ordered(self, keyspace: str) -> list[Shard]:
        """The keyspace's shards in order of their ranges."""
        return self._ranges.get(keyspace, ([], []))[1]

    def shard_of(self, keyspace: str, key: bytes) -> Shard | None:
        """The shard that owns a key, or None when it lies outside every shard."""
        return self.shard_at(keyspace, token_of(self.keyspaces[keyspace].policy, key))

    def shard_at(self, keyspace: str, token: bytes) -> Shard | None:
        starts, shards = self._ranges.get(keyspace, ([], []))
        i = bisect_right(starts, token) - 1
        if i < 0:
            return None
        end = shards[i].end
        return shards[i] if end is None or token < end else None

    def changed(self, **changes: Any) -> ShardMap:
        """The next version of the map, with these fields replaced."""
        return replace(self, map_version=self.map_version + 1, **changes)

    def public(self) -> dict[str, Any]:
        """The map as clients see it (contract §2), shards in start order."""
        shards = [s for keyspace in sorted(self._ranges) for s in self.ordered(keyspace)]
        return {
            "map_version": self.map_version,
            "keyspaces": {name: asdict(k) for name, k in sorted(self.keyspaces.items())},
            "shards": [public_shard(shard) for shard in shards],
            "nodes": [public_node(self.nodes[id]) for id in sorted(self.nodes)],
            **({"settings": asdict(self.settings)} if self.settings else {}),
        }


def settings_of(map: ShardMap, knobs: Knobs) -> Settings:
    """The map's, or those with which a fresh cluster begins."""
    return map.settings or Settings(
        knobs.heartbeat_interval_s, knobs.heartbeat_misses_max, knobs.heartbeat_good_min
    )


def _settings(document: dict[str, Any] | None) -> Settings | None:
    return None if document is None else Settings(**document)


def token_of(policy: str, key: bytes) -> bytes:
    """Where a key lies in its keyspace: at itself, or behind its 8-byte blake2b hash (big-endian)."""
    return key if policy == "range" else blake2b(key, digest_size=8).digest() + key


def public_node(node: Node) -> dict[str, Any]:
    return {
        "id": node.id, "incarnation": node.incarnation, "state": str(node.state),
        "zone": node.zone, "weight": node.weight,
    }  # fmt: skip


def public_shard(shard: Shard) -> dict[str, Any]:
    return {
        "id": shard.id,
        "keyspace": shard.keyspace,
        "start": shard.start,
        "end": shard.end,
        "epoch": shard.epoch,
        "state": str(shard.state),
        "primary": shard.primary,
        "members": [m.node for m in shard.members],
        "learners": [m.node for m in shard.learners],
    }


def delta(old: ShardMap, new: ShardMap) -> dict[str, Any]:
    """What `event.map` carries: the changed shards and nodes, and the version they follow.

    Shards and nodes have the fields of the public map; shards also what a replica needs of the record.
    """
    return {
        "map_version": new.map_version,
        "previous": old.map_version,
        "last_epoch": new.last_epoch,
        "keyspaces": {name: asdict(k) for name, k in sorted(new.keyspaces.items())},
        "shards": [
            _delta_shard(s) for s in sorted(changed_shards(old, new), key=lambda shard: shard.id)
        ],
        "removed": sorted(old.shards.keys() - new.shards.keys()),
        "nodes": [public_node(n) for id, n in sorted(new.nodes.items()) if old.nodes.get(id) != n],
        "removed_nodes": sorted(old.nodes.keys() - new.nodes.keys()),
        "settings": new.settings and asdict(new.settings),
    }


def _delta_shard(shard: Shard) -> dict[str, Any]:
    return {
        **public_shard(shard),
        "token": shard.token,
        "incarnations": {m.node: m.incarnation for m in (*shard.members, *shard.learners)},
        "last_active": shard.last_active and asdict(shard.last_active),
        "attempts": shard.attempts,
    }


def apply_delta(old: ShardMap, change: dict[str, Any]) -> ShardMap | None:
    """The map after a delta; None when the delta does not follow this version. A delta known already changes nothing.

    Raises KeyError, TypeError or ValueError when it is no delta.
    """
    if change["map_version"] <= old.map_version:
        return old
    if change["previous"] != old.map_version:
        return None
    shards = {id: s for id, s in old.shards.items() if id not in change["removed"]}
    shards |= {entry["id"]: _shard_from_delta(entry) for entry in change["shards"]}
    nodes = {id: n for id, n in old.nodes.items() if id not in change["removed_nodes"]}
    nodes |= {n["id"]: Node(**{**n, "state": NodeState(n["state"])}) for n in change["nodes"]}
    return replace(
        old,
        map_version=change["map_version"],
        last_epoch=change["last_epoch"],
        keyspaces={name: Keyspace(**k) for name, k in change["keyspaces"].items()},
        shards=shards,
        nodes=nodes,
        settings=_settings(change.get("settings")),
    )


def _shard_from_delta(entry: dict[str, Any]) -> Shard:
    incarnations = entry["incarnations"]
    return shard_from_document(
        {
            **{name: entry[name] for name in _SAME_IN_DELTA},
            "start": _text(entry["start"]),
            "end": _text(entry["end"]),
            "members": [{"node": n, "incarnation": incarnations[n]} for n in entry["members"]],
            "learners": [{"node": n, "incarnation": incarnations[n]} for n in entry["learners"]],
        }
    )


_SAME_IN_DELTA = (
    "id", "keyspace", "epoch", "state", "primary", "token", "last_active", "attempts",
)  # fmt: skip


def to_document(map: ShardMap) -> dict[str, Any]:
    """The document of the store, JSON-ready."""
    return document_change(ShardMap(), map)


def document_change(old: ShardMap, new: ShardMap) -> dict[str, Any]:
    """The document of `new` with those shards only that `old` has not the same; None in place of one that is gone."""
    changed = changed_shards(old, new)
    gone = dict.fromkeys(sorted(old.shards.keys() - new.shards.keys()))
    return {
        "map_version": new.map_version,
        "last_epoch": new.last_epoch,
        "writer": new.writer,
        "keyspaces": {name: asdict(keyspace) for name, keyspace in new.keyspaces.items()},
        "shards": {shard.id: shard_to_document(shard) for shard in changed} | gone,
        "nodes": {id: _node_document(node) for id, node in new.nodes.items()},
        "settings": new.settings and asdict(new.settings),
    }


def document_after(document: dict[str, Any] | None, change: dict[str, Any]) -> dict[str, Any]:
    """The document that a change leads to."""
    shards = (document or {}).get("shards", {}) | change["shards"]
    return {**change, "shards": {id: record for id, record in shards.items() if record is not None}}


def changed_shards(old: ShardMap, new: ShardMap) -> list[Shard]:
    """Those of `new` that `old` has not the same."""
    before = old.shards
    return [
        shard for id, shard in new.shards.items()
        if before.get(id) is not shard and before.get(id) != shard
    ]  # fmt: skip


def _node_document(node: Node) -> dict[str, Any]:
    return {
        "id": node.id, "incarnation": node.incarnation, "state": node.state, "zone": node.zone,
        "weight": node.weight,
    }  # fmt: skip


def from_document(document: dict[str, Any]) -> ShardMap:
    """Read the store's document. Raises KeyError, TypeError or ValueError when it is none."""
    return ShardMap(
        map_version=document["map_version"],
        last_epoch=document["last_epoch"],
        writer=document["writer"],
        keyspaces={name: Keyspace(**k) for name, k in document["keyspaces"].items()},
        shards={id: shard_from_document(s) for id, s in document["shards"].items()},
        nodes={
            id: Node(**{**n, "state": NodeState(n["state"])}) for id, n in document["nodes"].items()
        },
        settings=_settings(document.get("settings")),
    )


def shard_to_document(shard: Shard) -> dict[str, Any]:
    last = shard.last_active
    return {
        "id": shard.id, "keyspace": shard.keyspace, "start": _text(shard.start),
        "end": _text(shard.end), "epoch": shard.epoch, "token": shard.token,
        "members": _member_documents(shard.members), "primary": shard.primary,
        "state": shard.state,
        "last_active": last
        and {
            "epoch": last.epoch, "token": last.token,
            "members": _member_documents(last.members),
        },
        "attempts": shard.attempts, "learners": _member_documents(shard.learners),
    }  # fmt: skip


def _member_documents(members: tuple[Member, ...]) -> list[dict[str, str]]:
    return [{"node": member.node, "incarnation": member.incarnation} for member in members]


def shard_from_document(document: dict[str, Any]) -> Shard:
    last = document["last_active"]
    return Shard(
        **{
            **document,
            "start": _bytes(document["start"]) or b"",
            "end": _bytes(document["end"]),
            "state": ShardState(document["state"]),
            "members": _members(document["members"]),
            "learners": _members(document["learners"]),
            "attempts": tuple((epoch, token) for epoch, token in document["attempts"]),
            "last_active": last
            and Configuration(last["epoch"], last["token"], _members(last["members"])),
        }
    )


def _members(items: list[dict[str, str]]) -> tuple[Member, ...]:
    return tuple(Member(**item) for item in items)


_BASE64 = "base64:"
"""Marks a bound in the document that is not UTF-8, or that begins like this mark."""


def _text(bound: bytes | None) -> str | None:
    if bound is None:
        return None
    try:
        text = bound.decode()
    except UnicodeDecodeError:
        text = _BASE64
    return text if not text.startswith(_BASE64) else _BASE64 + base64.b64encode(bound).decode()


def _bytes(text: str | None) -> bytes | None:
    if text is None:
        return None
    if text.startswith(_BASE64):
        return base64.b64decode(text.removeprefix(_BASE64), validate=True)
    return text.encode()
