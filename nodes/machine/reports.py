"""What a node says about itself and its replicas in a heartbeat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bus_kv.protocol.messages import Heartbeat, ReplicaReport

if TYPE_CHECKING:
    from nodes.machine.node import NodeMachine
    from nodes.machine.replica import Replica


def heartbeat_of(node: NodeMachine) -> Heartbeat:
    config = node.config
    return Heartbeat(
        config.id, config.incarnation, config.run, zone=config.zone, weight=config.weight,
        version=config.version, value_bytes_max=node.sizes.value,
        map_version=node.map.map_version, shards=[*map(_report, node.replicas.values())],
    )  # fmt: skip


def _report(replica: Replica) -> ReplicaReport:
    table = replica.table
    return ReplicaReport(
        replica.shard.id, *replica.promised,
        "stranded" if replica.is_stranded else str(replica.status), replica.last, replica.commit_seq,
        replica.folder.mark.last, table.keys, table.data_bytes, replica.operations,
    )  # fmt: skip
