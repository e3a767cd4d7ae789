"""The shard map: who owns a key, the document of the store, deltas on the bus."""

import hashlib
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus_kv.protocol.codec import decode_body, encode_json
from bus_kv.protocol.routes import routes_after, routes_from_public
from bus_kv.protocol.shard_map import (
    Configuration,
    Keyspace,
    Member,
    Node,
    NodeState,
    Settings,
    Shard,
    ShardMap,
    ShardState,
    apply_delta,
    delta,
    from_document,
    shard_from_document,
    shard_to_document,
    to_document,
    token_of,
)  # fmt: skip

KEYS = st.binary(min_size=1, max_size=4)
BOUNDS = KEYS | st.sampled_from([b"base64:x", b"\xff\xfe", b"base64:"])


def make_shard(id: str, start: bytes, end: bytes | None, epoch: int) -> Shard:
    member = Member("n1", "incarnation")
    last = (
        Configuration(epoch - 1, "before", (member, Member("n2", "other"))) if epoch > 1 else None
    )
    return Shard(
        id, "default", start, end, epoch, f"token-{epoch}", (member,), "n1", ShardState.ACTIVE,
        last, ((epoch, "tried"),), (Member("n3", "learner"),),
    )  # fmt: skip


@st.composite
def maps(draw: st.DrawFn, policy: str = "range") -> ShardMap:
    """Shards beside each other, some with a gap between."""
    bounds = sorted(draw(st.sets(BOUNDS, min_size=2, max_size=7)))
    shards = {}
    for i, (start, end) in enumerate(zip(bounds, [*bounds[1:], None], strict=True)):
        if draw(st.booleans()):
            shards[f"s{i}"] = make_shard(f"s{i}", start, end, i + 1)
    nodes = {"n1": Node("n1", "incarnation", NodeState.UP, "zone", 2)}
    version = draw(st.integers(1, 100))
    settings = draw(st.sampled_from([None, Settings(5.0, 3, 3), Settings(0.5, 2, 4, False)]))
    return ShardMap(version, 9, "writer", {"default": Keyspace(policy)}, shards, nodes, settings)


def owner(map: ShardMap, token: bytes) -> str | None:
    """By the definition: the shard whose [start, end) holds the token."""
    for shard in map.shards.values():
        if shard.start <= token and (shard.end is None or token < shard.end):
            return shard.id
    return None


@given(maps(), KEYS)
def test_a_key_belongs_to_the_shard_whose_range_holds_it(map: ShardMap, key: bytes) -> None:
    shard = map.shard_of("default", key)
    assert (shard.id if shard else None) == owner(map, key)
    route = routes_from_public(map.public()).find("default", key)
    assert (route.shard if route else None) == owner(map, key)


@given(maps(policy="hash"), KEYS)
def test_a_hashed_key_lies_behind_its_hash(map: ShardMap, key: bytes) -> None:
    token = hashlib.blake2b(key, digest_size=8).digest() + key
    assert token_of("hash", key) == token
    shard = map.shard_of("default", key)
    assert (shard.id if shard else None) == owner(map, token)


@given(maps())
def test_a_map_comes_back_from_its_document(map: ShardMap) -> None:
    assert from_document(json.loads(json.dumps(to_document(map)))) == map
    for shard in map.shards.values():
        assert shard_from_document(json.loads(json.dumps(shard_to_document(shard)))) == shard


@given(maps(), maps(), st.integers(1, 5))
def test_a_delta_leads_from_one_map_to_the_next(old: ShardMap, new: ShardMap, by: int) -> None:
    new = replace(new, map_version=old.map_version + by)
    change = decode_body(encode_json(delta(old, new)))[1]
    followed = apply_delta(old, change)
    assert followed is not None
    assert replace(followed, writer="") == replace(new, writer="")
    assert apply_delta(new, change) is new
    assert apply_delta(replace(old, map_version=old.map_version - 1), change) is None


@given(maps(), maps(), st.lists(KEYS, min_size=1))
def test_a_client_follows_a_delta(old: ShardMap, new: ShardMap, keys: list[bytes]) -> None:
    new = replace(new, map_version=old.map_version + 1)
    change = decode_body(encode_json(delta(old, new)))[1]
    followed = routes_after(routes_from_public(old.public()), change)
    read = routes_from_public(new.public())
    assert followed is not None
    assert (followed.map_version, followed.keyspaces) == (read.map_version, read.keyspaces)
    assert followed.by_id == read.by_id
    for key in keys:
        assert followed.find("default", key) == read.find("default", key)
    assert routes_after(read, change) is None


def test_a_delta_names_what_changed_and_nothing_else() -> None:
    old = ShardMap(
        7, 2, "", {"default": Keyspace()},
        {"a": make_shard("a", b"", b"m", 1), "b": make_shard("b", b"m", None, 2)},
        {"n1": Node("n1", "i", NodeState.UP)},
    )  # fmt: skip
    new = old.changed(shards={"a": replace(old.shards["a"], epoch=3)}, last_epoch=3)
    change = delta(old, new)
    assert (change["map_version"], change["previous"]) == (8, 7)
    assert [s["id"] for s in change["shards"]] == ["a"]
    assert (change["removed"], change["nodes"]) == (["b"], [])


def test_the_public_map_is_as_promised() -> None:
    shard = make_shard("s1", b"", b"\xff", 3)
    map = ShardMap(
        7, 3, "", {"default": Keyspace()}, {"s1": shard}, {"n1": Node("n1", "i", NodeState.DOWN)}
    )
    assert json.loads(encode_json(map.public())) == {
        "map_version": 7,
        "keyspaces": {
            "default": {"policy": "range", "replication_factor": 3, "consistency": "quorum"}
        },
        "shards": [{
            "id": "s1", "keyspace": "default", "start": "", "end_b64": "/w==", "epoch": 3,
            "state": "active", "primary": "n1", "members": ["n1"], "learners": ["n3"],
        }],
        "nodes": [
            {"id": "n1", "incarnation": "i", "state": "down", "zone": None, "weight": 1}
        ],
    }  # fmt: skip


@pytest.mark.parametrize("members", [1, 2, 3, 4, 5])
def test_a_quorum_is_more_than_half(members: int) -> None:
    shard = make_shard("s1", b"", None, 1)
    shard = replace(shard, members=tuple(Member(f"n{i}", "i") for i in range(members)))
    assert shard.quorum == members // 2 + 1


@pytest.mark.parametrize("junk", [None, [], "x", {}, {"map_version": "x"}, {"map_version": 1}])
def test_a_document_that_is_no_map_is_refused(junk: object) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        from_document(junk)  # type: ignore[arg-type]
