"""What a client needs of the shard map: which shard owns a key, and under which epoch it is asked."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from bus_kv.protocol.shard_map import Keyspace, token_of


@dataclass(frozen=True, slots=True)
class Route:
    shard: str
    start: bytes
    end: bytes | None
    epoch: int
    active: bool
    primary: str = ""


@dataclass(frozen=True, slots=True)
class Routes:
    map_version: int
    keyspaces: dict[str, Keyspace]
    by_id: dict[str, Route]
    ranges: dict[str, tuple[list[bytes], list[Route]]]
    """Keyspace -> starts and routes, in order."""
    shards: dict[str, dict[str, Any]]
    """The entries of the map that they were read from, by id."""

    def find(self, keyspace: str, key: bytes) -> Route | None:
        starts, routes = self.ranges.get(keyspace, ([], []))
        policy = self.keyspaces[keyspace].policy
        token = key if policy == "range" else token_of(policy, key)
        i = bisect_right(starts, token) - 1
        if i < 0:
            return None
        end = routes[i].end
        return routes[i] if end is None or token < end else None


def routes_from_public(map: dict[str, Any]) -> Routes:
    """Read the reply to `map` (CBOR)."""
    by_id: dict[str, Route] = {}
    ranges: dict[str, tuple[list[bytes], list[Route]]] = {}
    for shard in map["shards"]:
        route = Route(
            shard["id"], shard["start"], shard["end"], shard["epoch"], shard["state"] == "active",
            shard["primary"],
        )  # fmt: skip
        by_id[route.shard] = route
        starts, routes = ranges.setdefault(shard["keyspace"], ([], []))
        starts.append(route.start)
        routes.append(route)
    keyspaces = {name: Keyspace(**fields) for name, fields in map["keyspaces"].items()}
    shards = {shard["id"]: shard for shard in map["shards"]}
    return Routes(map["map_version"], keyspaces, by_id, ranges, shards)


def routes_after(routes: Routes, delta: dict[str, Any]) -> Routes | None:
    """The routes after a change that was announced (`event.map`); None when it does not follow these.

    Raises KeyError, TypeError or ValueError when it is no delta.
    """
    if delta["previous"] != routes.map_version:
        return None
    shards = {id: shard for id, shard in routes.shards.items() if id not in delta["removed"]}
    shards |= {shard["id"]: shard for shard in delta["shards"]}
    in_order = sorted(shards.values(), key=lambda shard: shard["start"])
    return routes_from_public({**delta, "shards": in_order})
