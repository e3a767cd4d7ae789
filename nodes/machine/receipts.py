"""What became of a write: its primary tells, after a majority has confirmed that it still was one (R5).

"quorum", "all" and "rolled_back" are told of the log up to the opening entry of an epoch that served, which no later
epoch changes; "primary" may become any of them. So the state is taken when the confirmations are there, not before:
whatever has been told by then is not contradicted, and a write that was committed meanwhile is told as committed.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from bus_kv.errors import BusKVError, NotPrimary, Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.protocol.batch import Version
    from bus_kv.protocol.requests import ReceiptRequest
    from nodes.machine.node import NodeMachine
    from nodes.machine.replica import Replica

    Respond: TypeAlias = Callable[[dict[str, Any] | BusKVError], None]


def answer_receipt(
    node: NodeMachine, request: ReceiptRequest, epoch: int, deadline_ns: int, respond: Respond
) -> None:
    """{"state": "primary" | "quorum" | "all" | "rolled_back" | "unknown"} of a write, by `deadline_ns`."""
    replica = node.replicas.get(request.shard)
    if replica is None:
        gone = NotPrimary(f"shard {request.shard} is not served here; read the map")
        return respond(gone)
    refusal = replica.not_serving(epoch)
    if refusal is None and replica.waiting_count > node.knobs.calls_max:
        refusal = Overloaded(f"shard {request.shard} has too many requests under way")
    if refusal is not None:
        return respond(refusal)
    replica.operations += 1
    tell = partial(_tell, replica, request.version, respond)
    level = request.consistency or "quorum"
    return replica.answer_read(level, deadline_ns, tell, None, replica.commit_seq)


def _tell(
    replica: Replica, version: Version, respond: Respond, confirmed: BusKVError | None
) -> None:
    respond(confirmed if confirmed is not None else {"state": replica.fate(version)})
