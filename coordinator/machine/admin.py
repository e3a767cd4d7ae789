"""Administration: what an operator asks of the active coordinator, answered once it is in effect.

failover    {"shard"}                                  another member becomes primary; the old one leaves for now
transfer    {"shard", "to"}                            this member becomes primary
config      {"keyspace", "consistency"?, "replication_factor"?}   the keyspace's settings, as they are then;
            {"heartbeat_interval_s"?, "heartbeat_misses_max"?, "heartbeat_good_min"?, "auto_failover"?}
                                                       hold for the whole cluster
failovers   {"shard"?}                                 the stories of the last takeovers, the newest first
restore     {}                                         the newest map that any node remembers becomes the map (R10)
check       {}                                         the map's version, and whether nodes remember a newer one
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from bus_kv.core.timers import NEVER_NS
from bus_kv.errors import (
    BusKVError,
    KeyspaceUnknown,
    MalformedRequest,
    NodeUnknown,
    OutcomeUnknown,
    Overloaded,
    ShardUnavailable,
    ShardUnknown,
    UnknownVerb,
)  # fmt: skip
from bus_kv.knobs import REPLICATION_FACTOR_MAX, SECOND_NS
from bus_kv.protocol.codec import decode_body
from bus_kv.protocol.shard_map import ShardMap, ShardState, public_shard, settings_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.knobs import Knobs
    from bus_kv.protocol.shard_map import Settings, Shard
    from coordinator.machine.failovers import Failovers
    from coordinator.machine.plan import Heard

    Result: TypeAlias = dict[str, Any] | BusKVError
    Look: TypeAlias = Callable[[ShardMap], dict[str, Any] | None]

WAIT_NS = 10 * SECOND_NS
PENDING_MAX = 256
LEVELS = ("one", "quorum", "all")
CLUSTER_SETTINGS: dict[str, tuple[type, float, float]] = {
    "heartbeat_interval_s": (float, 0.05, 3600), "heartbeat_misses_max": (int, 1, 1000),
    "heartbeat_good_min": (int, 1, 1000), "auto_failover": (bool, False, True),
}  # fmt: skip
"""Kind, least and greatest value."""
_KEYSPACE_SETTINGS = ("consistency", "replication_factor")
_FIELDS = {
    "failover": {"shard"}, "transfer": {"shard", "to"},
    "config": {"keyspace", "consistency", "replication_factor", *CLUSTER_SETTINGS},
    "restore": set(), "check": set(), "failovers": {"shard"},
}  # fmt: skip


@dataclass(slots=True)
class _Pending:
    deadline_ns: int
    look: Look
    answer: Callable[[Result], None]
    verb: str
    fields: dict[str, Any]


class Admin:
    def __init__(self, heard: Heard, failovers: Failovers, knobs: Knobs) -> None:
        self._heard = heard
        self._failovers, self._knobs = failovers, knobs
        self._pending: list[_Pending] = []

    def on_request(
        self, verb: str, body: bytes, map: ShardMap | None, now_ns: int,
        answer: Callable[[Result], None],
    ) -> None:  # fmt: skip
        """Take a request on; `answer` is called when it is in effect, or when its time is over."""
        try:
            look = self._begin(verb, body, map)
        except BusKVError as error:
            return answer(error)
        if len(self._pending) >= PENDING_MAX:
            return answer(Overloaded("too many administration requests under way"))
        fields = decode_body(body)[1]
        self._pending.append(_Pending(now_ns + WAIT_NS, look, answer, verb, fields))
        return None

    def _begin(self, verb: str, body: bytes, map: ShardMap | None) -> Look:
        if verb not in _FIELDS:
            raise UnknownVerb(f"there is no administration verb {verb!r}")
        fields = decode_body(body)[1]
        unknown = sorted(fields.keys() - _FIELDS[verb])
        if unknown:
            raise MalformedRequest(f"{verb} has no field {unknown[0]!r}")
        if map is None:
            raise ShardUnavailable("the map is not read yet; send it again in a moment")
        begin = {
            "failover": self._failover, "transfer": self._transfer, "config": self._config,
            "restore": self._restore, "check": self._check, "failovers": self._tell,
        }  # fmt: skip
        return begin[verb](fields, map)

    def _failover(self, fields: dict[str, Any], map: ShardMap) -> Look:
        shard = _shard(fields, map)
        if len(shard.members) < 2:
            raise ShardUnavailable(f"shard {shard.id} has no other member to take over")
        self._heard.failovers.add(shard.id)
        return partial(_has_other_primary, shard)

    def _transfer(self, fields: dict[str, Any], map: ShardMap) -> Look:
        shard, to = _shard(fields, map), fields.get("to")
        if type(to) is not str or shard.member(to) is None:
            members = ", ".join(member.node for member in shard.members)
            raise NodeUnknown(f"to: {to!r} is no member of shard {shard.id}; there are {members}")
        self._heard.transfers[shard.id] = to
        return partial(_has_primary, shard.id, to)

    def _config(self, fields: dict[str, Any], map: ShardMap) -> Look:
        name = fields.get("keyspace", "default")
        keyspace = map.keyspaces.get(name) if type(name) is str else None
        if keyspace is None:
            raise KeyspaceUnknown(f"there is no keyspace {name!r}")
        changes = {key: fields[key] for key in _KEYSPACE_SETTINGS if key in fields}
        if changes.get("consistency", "one") not in LEVELS:
            raise MalformedRequest(f"consistency is one of {', '.join(LEVELS)}")
        factor = changes.get("replication_factor", 1)
        if type(factor) is not int or not 1 <= factor <= REPLICATION_FACTOR_MAX:
            raise MalformedRequest(
                f"replication_factor is a whole number from 1 to {REPLICATION_FACTOR_MAX}"
            )
        cluster = _cluster_settings(
            fields, self._heard.cluster_settings or settings_of(map, self._knobs)
        )
        wanted = replace(keyspace, **changes)
        self._heard.settings[name] = wanted
        if cluster != map.settings:
            self._heard.cluster_settings = cluster
        settings = {"keyspace": name, **asdict(wanted), **asdict(cluster)}

        asked = {key: value for key, value in asdict(cluster).items() if key in fields}

        def look(map: ShardMap) -> dict[str, Any] | None:
            now = asdict(settings_of(map, self._knobs))
            is_so = map.keyspaces.get(name) == wanted and {**now, **asked} == now
            return settings if is_so else None

        return look

    def _tell(self, fields: dict[str, Any], map: ShardMap) -> Look:
        shard = _shard(fields, map).id if "shard" in fields else None
        return lambda _: {"failovers": self._failovers.known(shard)}

    def _restore(self, fields: dict[str, Any], map: ShardMap) -> Look:
        del fields
        if not self._heard.is_behind(map):
            raise MalformedRequest("the map is the newest that any node has seen; nothing is lost")
        self._heard.restoring = True
        return lambda new: (
            {"map_version": new.map_version} if not self._heard.is_behind(new) else None
        )

    def _check(self, fields: dict[str, Any], map: ShardMap) -> Look:
        del fields, map
        return lambda map: {
            "map_version": map.map_version,
            "is_behind": self._heard.is_behind(map),
        }

    def look(self, map: ShardMap | None, now_ns: int) -> None:
        """Answer what has come into effect, and what has taken too long, also when this coordinator no longer leads."""
        pending, self._pending = self._pending, []
        for item in pending:
            done = None if map is None else item.look(map)
            if done is not None:
                item.answer(done)
            elif item.deadline_ns <= now_ns:
                self._give_up(item)
                late = "it is not in effect in time, and may come to be; see `bus-kv status`"
                item.answer(OutcomeUnknown(late))
            else:
                self._pending.append(item)

    def _give_up(self, item: _Pending) -> None:
        """Want it no longer; a change of the map that is under way is not undone."""
        heard, fields = self._heard, item.fields
        if item.verb == "failover":
            heard.failovers.discard(fields["shard"])
        elif item.verb == "transfer":
            heard.transfers.pop(fields["shard"], None)
        elif item.verb == "config":
            heard.settings.pop(fields.get("keyspace", "default"), None)
            heard.cluster_settings = None
        elif item.verb == "restore":
            heard.restoring = False

    def next_ns(self) -> int:
        return self._pending[0].deadline_ns if self._pending else NEVER_NS


def _cluster_settings(fields: dict[str, Any], now: Settings) -> Settings:
    """Raises MalformedRequest."""
    changes: dict[str, Any] = {name: fields[name] for name in CLUSTER_SETTINGS if name in fields}
    for name, value in changes.items():
        kind, least, greatest = CLUSTER_SETTINGS[name]
        kinds = (int, float) if kind is float else (kind,)
        if type(value) not in kinds or not least <= value <= greatest:
            what = {float: "a number", int: "a whole number", bool: "true or false"}[kind]
            bounds = "" if kind is bool else f" from {least} to {greatest}"
            raise MalformedRequest(f"{name} is {what}{bounds}")
        changes[name] = kind(value)
    return replace(now, **changes)


def _shard(fields: dict[str, Any], map: ShardMap) -> Shard:
    shard = map.shards.get(fields["shard"]) if type(fields.get("shard")) is str else None
    if shard is None:
        raise ShardUnknown(f"there is no shard {fields.get('shard')!r}")
    return shard


def _has_other_primary(old: Shard, map: ShardMap) -> dict[str, Any] | None:
    shard = map.shards.get(old.id)
    if shard is None or shard.state is not ShardState.ACTIVE or shard.epoch <= old.epoch:
        return None
    return _told(shard) if shard.primary != old.primary else None


def _has_primary(id: str, node: str, map: ShardMap) -> dict[str, Any] | None:
    shard = map.shards.get(id)
    if shard is None or shard.state is not ShardState.ACTIVE or shard.primary != node:
        return None
    return _told(shard)


def _told(shard: Shard) -> dict[str, Any]:
    public = public_shard(shard)
    return {name: public[name] for name in ("id", "epoch", "primary", "members", "learners")}
