"""delete_prefix: find some keys of a range and delete them, as one request."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from bus_kv.errors import BusKVError
from bus_kv.protocol import batch as b
from bus_kv.protocol.batch import Batch, BatchReply

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.protocol.requests import ScanRequest
    from nodes.machine.replica import Replica

    Respond = Callable[[dict[str, Any] | BusKVError], None]


def erase(
    replica: Replica, request: ScanRequest, epoch: int, deadline_ns: int, respond: Respond
) -> None:  # fmt: skip
    """{"deleted", "version" of the last of them, "next": where more keys of the range are, or None}

    The keys are written as an ordinary batch of deletes under the request's id, so a repeat finds it (R6).
    """
    found = partial(_delete, replica, request, epoch, deadline_ns, respond)
    replica.scans.scan(request, epoch, found)


def _delete(
    replica: Replica, request: ScanRequest, epoch: int, deadline_ns: int,
    respond: Respond, page: dict[str, Any] | BusKVError,
) -> None:  # fmt: skip
    if isinstance(page, BusKVError):
        return respond(page)
    keys = [item["key"] for item in page["items"]]
    if not keys:
        return respond({"deleted": 0, "version": None, "next": page["next"]})
    assert request.erase is not None
    client, number = request.erase
    batch = Batch(
        bytes([b.DELETE]) * len(keys), keys, client=client, numbers=[number] * len(keys),
        indexes=[*range(len(keys))], consistency=request.consistency or "quorum",
    )  # fmt: skip
    done = partial(_tell, respond, page["next"])
    return replica.submit(batch, batch.encode(), epoch, deadline_ns, done)


def _tell(respond: Respond, position: bytes | None, reply: BatchReply | BusKVError) -> None:
    if isinstance(reply, BusKVError):
        return respond(reply)
    versions = [version for version in reply.versions() if version is not None]
    return respond(
        {
            "deleted": reply.outcomes.count(b.DELETED),
            "version": [*versions[-1]] if versions else None,
            "next": position,
        }
    )
