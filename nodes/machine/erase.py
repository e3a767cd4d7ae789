"""delete_prefix: find some keys of a range and delete them, as one request."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from bus_kv.errors import BusKVError, PreconditionFailed, ShardUnavailable, from_body
from bus_kv.protocol import batch as b
from bus_kv.protocol.batch import Batch, BatchReply

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.protocol.requests import ScanRequest
    from nodes.machine.replica import Replica

    Respond = Callable[[dict[str, Any] | BusKVError], None]


NO_VERSION = (0, 0)
"""No write has it: epochs begin at 1."""


def erase(
    replica: Replica, request: ScanRequest, epoch: int, deadline_ns: int, respond: Respond
) -> None:  # fmt: skip
    """{"deleted", "version" of the last of them, "next": where more keys of the range are, or None}

    The keys are written as an ordinary batch of deletes under the request's id. What is found depends on when one
    looks, so a repeat has to be known before (R6): the id is asked for first, with deletes whose condition never holds;
    and a copy that comes while the first is under way waits for the result of that.
    """
    assert request.erase is not None
    waiting = replica.writer.erasing.setdefault(request.erase, [])
    waiting.append(respond)
    if len(waiting) > 1:
        return None
    respond = partial(_tell_all, replica, request.erase)
    count = request.limit
    probe = _batch(request, [request.start] * count)
    probe.conditions = dict.fromkeys(range(count), NO_VERSION)
    told = partial(_on_probe, replica, request, epoch, deadline_ns, respond)
    return replica.writer.submit(probe, b"", epoch, deadline_ns, told)


def _tell_all(replica: Replica, id: tuple[str, int], outcome: dict[str, Any] | BusKVError) -> None:
    for respond in replica.writer.erasing.pop(id):
        respond(dict(outcome) if isinstance(outcome, dict) else outcome)


def _on_probe(
    replica: Replica, request: ScanRequest, epoch: int, deadline_ns: int,
    respond: Respond, reply: BatchReply | BusKVError,
) -> None:  # fmt: skip
    if isinstance(reply, BusKVError):
        return respond(reply)
    failure = _failure(reply)
    if failure is not None:
        return respond(failure)
    if reply.outcomes.count(b.DELETED):
        # A repeat: the first result, and whether there is more by now.
        return replica.scans.scan(request, epoch, partial(_tell_again, request, respond, reply))
    found = partial(_delete, replica, request, epoch, deadline_ns, respond)
    return replica.scans.scan(request, epoch, found)


def _tell_again(
    request: ScanRequest, respond: Respond, reply: BatchReply, page: dict[str, Any] | BusKVError
) -> None:
    if isinstance(page, BusKVError):
        return respond(page)
    return _tell(respond, request.start if page["items"] else page["next"], reply)


def _delete(
    replica: Replica, request: ScanRequest, epoch: int, deadline_ns: int,
    respond: Respond, page: dict[str, Any] | BusKVError,
) -> None:  # fmt: skip
    if isinstance(page, BusKVError):
        return respond(page)
    keys = [item["key"] for item in page["items"]]
    if not keys:
        return respond({"deleted": 0, "version": None, "next": page["next"]})
    if replica.now_ns >= deadline_ns:
        # Whoever asked has been answered, and may not expect that anything is still done.
        return respond(ShardUnavailable("it took too long; send it again"))
    batch = _batch(request, keys)
    done = partial(_tell, respond, page["next"])
    return replica.writer.submit(batch, batch.encode(), epoch, deadline_ns, done)


def _batch(request: ScanRequest, keys: list[bytes]) -> Batch:
    assert request.erase is not None
    client, number = request.erase
    return Batch(
        bytes([b.DELETE]) * len(keys), keys, client=client, numbers=[number] * len(keys),
        indexes=[*range(len(keys))], consistency=request.consistency or "quorum",
    )  # fmt: skip


def _failure(reply: BatchReply) -> BusKVError | None:
    """What went wrong, beside the conditions of a probe, which never hold."""
    probed = PreconditionFailed.code
    found = [body for body in reply.failures.values() if body["code"] != probed]
    return from_body(found[0]) if found else None


def _tell(respond: Respond, position: bytes | None, reply: BatchReply | BusKVError) -> None:
    if isinstance(reply, BusKVError):
        return respond(reply)
    failure = _failure(reply)
    if failure is not None:
        return respond(failure)
    versions = [version for version in reply.versions() if version is not None]
    return respond(
        {
            "deleted": reply.outcomes.count(b.DELETED),
            "version": [*versions[-1]] if versions else None,
            "next": position,
        }
    )
