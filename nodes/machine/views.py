"""What a node says about the cluster: health and statistics, from the map and everybody's heartbeats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bus_kv.protocol.shard_map import NodeState, ShardState

if TYPE_CHECKING:
    from bus_kv.protocol.messages import Heartbeat, ReplicaReport
    from bus_kv.protocol.shard_map import Member, Shard
    from nodes.machine.node import NodeMachine


def info(verb: str, node: NodeMachine) -> dict[str, Any]:
    if verb == "map":
        return node.map.public()
    return _health(node) if verb == "health" else _stats(node)


def _health(node: NodeMachine) -> dict[str, Any]:
    """`ok` when every shard has an active primary and W members that are up."""
    reasons = [r for shard in node.map.shards.values() for r in _shard_reasons(node, shard)]
    if not node.map.shards:
        reasons.append("no shard is laid out")
    reasons += [f"shard {id} does not answer: {why}" for id, why in node.suspicions.silent.items()]
    if node.stalled:
        reasons.append(f"node {node.config.id} cannot write its log: {node.stalled}")
    if node.fold_stalled:
        reasons.append(f"node {node.config.id} cannot write its state: {node.fold_stalled}")
    return {
        "status": "degraded" if reasons else "ok",
        "reasons": reasons,
        "node": node.config.id,
        "map_version": node.map.map_version,
        "shards": len(node.map.shards),
        "nodes": len(node.map.nodes),
        "value_bytes_max": node.sizes.value,
    }


def _shard_reasons(node: NodeMachine, shard: Shard) -> list[str]:
    if shard.state is not ShardState.ACTIVE:
        return [f"shard {shard.id} is {shard.state}"]
    absences = {m.node: _absence(node, m) for m in shard.members}
    if absence := absences.get(shard.primary, "is none of its members"):
        return [f"primary {shard.primary} of shard {shard.id} {absence}"]
    up = sum(not absence for absence in absences.values())
    if up < shard.quorum:
        return [f"shard {shard.id} has {up} of the {shard.quorum} members it needs"]
    return []


def _absence(node: NodeMachine, member: Member) -> str:
    """Why a member does not take part; empty: it does."""
    known = node.map.nodes.get(member.node)
    if known is None or known.state not in (NodeState.UP, NodeState.DRAINING):
        return "is not up"
    if known.incarnation != member.incarnation:
        return "has come back without its data: start it with its former data directory"
    return ""


def _stats(node: NodeMachine) -> dict[str, Any]:
    """Totals, and the newest report of every node and of every shard's primary."""
    beats = {id: beat for id, (_, beat) in node.peers.items()} | {node.config.id: node.heartbeat()}
    nodes = [_node_stats(node, id, beats.get(id)) for id in sorted(node.map.nodes)]
    shards = [_shard_stats(node, shard, beats) for shard in node.map.shards.values()]
    return {
        "total_nodes": len(nodes),
        "healthy_nodes": sum(n["state"] == "up" for n in nodes),
        "total_shards": len(shards),
        "keys": sum(s["keys"] or 0 for s in shards),
        "bytes": sum(s["bytes"] or 0 for s in shards),
        "map_version": node.map.map_version,
        "average_latency_ms": _average_latency_ms(node),
        "shards": shards,
        "nodes": nodes,
        "suspects": node.suspicions.shown(),
    }


def _average_latency_ms(node: NodeMachine) -> float | None:
    """Mean time to answer of the node that is asked, since it started."""
    requests = sum(e.requests for e in node.endpoints.values())
    total_ns = sum(e.processing_ns for e in node.endpoints.values())
    return round(total_ns / requests / 1e6, 3) if requests else None


def _node_stats(node: NodeMachine, id: str, beat: Heartbeat | None) -> dict[str, Any]:
    known = node.map.nodes[id]
    return {
        "id": id,
        "state": str(known.state),
        "zone": known.zone,
        "version": beat.version if beat else None,
        "replicas": len(beat.shards) if beat else None,
        "operations": sum(s.operations for s in beat.shards) if beat else None,
    }


def _shard_stats(node: NodeMachine, shard: Shard, beats: dict[str, Heartbeat]) -> dict[str, Any]:
    primary = shard.member(shard.primary)
    report = _report(shard, primary, beats) if primary else None
    keyspace = node.map.keyspaces.get(shard.keyspace)
    factor = keyspace.replication_factor if keyspace else len(shard.members)
    wanted = min(factor, len(node.map.nodes))
    return {
        "id": shard.id,
        "primary": shard.primary,
        "epoch": shard.epoch,
        "state": str(shard.state),
        "members_wanted": wanted,
        "under_replicated": len(shard.members) < wanted,
        "keys": report and report.keys,
        "bytes": report and report.bytes,
        "last_seq": report and report.last[1],
        "commit_seq": report and report.commit_seq,
        "folded_seq": report and report.folded,
        "operations": report and report.operations,
        "replicas": [
            *(_replica_stats(shard, member, report, beats) for member in shard.members),
            *(_replica_stats(shard, learner, report, beats) for learner in shard.learners),
        ],
    }


def _replica_stats(
    shard: Shard, member: Member, primary: ReplicaReport | None, beats: dict[str, Heartbeat]
) -> dict[str, Any]:
    """A replica as its node's last heartbeat has it; `lag` in operations behind what the primary's has committed."""
    report = _report(shard, member, beats)
    role = "learner" if member in shard.learners else "member"
    return {
        "node": member.node,
        "role": "primary" if member.node == shard.primary else role,
        "status": report and report.status,
        "last_seq": report and report.last[1],
        "commit_seq": report and report.commit_seq,
        "lag": max(primary.commit_seq - report.last[1], 0) if primary and report else None,
    }


def _report(shard: Shard, member: Member, beats: dict[str, Heartbeat]) -> ReplicaReport | None:
    """What a member says about its replica, if its disk still is the one that the map means (R8)."""
    beat = beats.get(member.node)
    if beat is None or beat.incarnation != member.incarnation:
        return None
    return beat.report(shard.id)
