"""The way of requests to the replicas of this node, whether they come over its gateway or on a shard's subject."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from bus_kv.core.deadlines import Deadlines
from bus_kv.core.machine import Publish
from bus_kv.errors import (
    BusKVError,
    NotPrimary,
    OutcomeUnknown,
    Overloaded,
    ShardUnavailable,
    ValueTooLarge,
)  # fmt: skip
from bus_kv.knobs import MILLISECOND_NS
from bus_kv.protocol.batch import GET, check_batch
from bus_kv.protocol.codec import codec_of, encode_body
from bus_kv.protocol.messages import failure_headers
from bus_kv.protocol.requests import HistoryRequest, ScanRequest
from nodes.machine.erase import erase
from nodes.machine.shard_requests import requested_epoch

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.core.machine import Received
    from bus_kv.protocol.batch import Batch
    from bus_kv.protocol.requests import PageRequest
    from nodes.machine.node import NodeMachine
    from nodes.machine.replica import Replica
    from nodes.machine.writer import Respond


class Door:
    def __init__(self, node: NodeMachine) -> None:
        self._node = node
        self._pages: Deadlines[dict[str, Any] | BusKVError] = Deadlines()
        self.operations = 0
        """Let in since the last Ready."""

    @property
    def is_busy(self) -> bool:
        """Whether a page is under way."""
        return len(self._pages) > 0

    def next_deadline_ns(self) -> int:
        return self._pages.next_ns()

    def on_deadline(self, now_ns: int) -> None:
        self._pages.expire(now_ns)

    def submit(
        self, shard: str, batch: Batch, raw: bytes, epoch: int | None, deadline_ns: int,
        respond: Respond,
    ) -> None:  # fmt: skip
        """Check a batch and hand it to the replica that serves its shard; `respond` is called by `deadline_ns`.

        `epoch` None: gets at ONE, which any replica answers.
        """
        try:
            check_batch(batch, self._node.sizes)
            replica = self._serving_or_raise(shard, epoch)
            if len(raw) > self._node.sizes.batch:
                raise ValueTooLarge(
                    f"a batch has at most {self._node.sizes.batch} bytes; send less at once"
                )
            if self._node.stalled and batch.kinds.count(GET) < len(batch):
                raise self._cannot_write()
        except BusKVError as refusal:
            return respond(refusal)
        self.operations += len(batch)
        return replica.writer.submit(batch, raw, epoch, deadline_ns, respond)

    def page(
        self, shard: str, request: PageRequest, epoch: int | None, deadline_ns: int,
        respond: Callable[[dict[str, Any] | BusKVError], None],
    ) -> None:  # fmt: skip
        """A page of a shard's part of a range or of a key's history, or the deletion of one."""
        try:
            replica = self._serving_or_raise(shard, epoch)
        except BusKVError as refusal:
            return respond(refusal)
        if len(self._pages) >= self._node.knobs.calls_max:
            return respond(Overloaded("this node has too many pages under way; send it again"))
        if self._node.fold_stalled and (isinstance(request, HistoryRequest) or request.count_only):
            return respond(self.cannot_fold())
        late = ShardUnavailable(f"the disk of shard {shard} takes too long; send it again")
        assert epoch is not None, "any replica answers gets only"
        if isinstance(request, ScanRequest) and request.erase is not None:
            if self._node.stalled:
                return respond(self._cannot_write())
            unknown = OutcomeUnknown("it takes too long; send it again with the same request_id")
            respond = self._pages.guard(deadline_ns, respond, unknown)
            return erase(replica, request, epoch, deadline_ns, respond)
        level = request.consistency or "quorum"
        confirmed = partial(_confirm, replica, level, deadline_ns, respond)
        read = self._pages.guard(deadline_ns, confirmed, late)
        if isinstance(request, HistoryRequest):
            return replica.history.read(request, epoch, read)
        return replica.scans.scan(request, epoch, read)

    def cannot_fold(self) -> BusKVError:
        reason = f"node {self._node.config.id} cannot write its state: {self._node.fold_stalled}"
        return ShardUnavailable(f"{reason}; send it again")

    def _cannot_write(self) -> BusKVError:
        return ShardUnavailable(
            f"node {self._node.config.id} cannot write its log: {self._node.stalled}"
        )

    def _serving_or_raise(self, shard: str, epoch: int | None) -> Replica:
        """The replica that a request of this epoch is for; `epoch` None: any that may answer gets.

        A former primary may still hear what is for a later one: only that one refuses for good.
        """
        held = self._node.replicas.get(shard)
        if held is None or (epoch is None and not self._node.may_read(held)):
            raise NotPrimary(f"shard {shard} is not served here; read the map")
        refusal = held.not_serving(epoch) if epoch is not None else None
        if refusal is not None:
            raise refusal
        return held

    def overloaded(self, message: Received) -> Publish | None:
        """The answer to a message that found the inbox full."""
        if not message.reply or message.channel not in ("verb", "shard", "read"):
            return None
        error: BusKVError = Overloaded(
            f"node {self._node.config.id} has a full inbox; send it again"
        )
        replica = self._node.replicas.get(message.name) if message.channel == "shard" else None
        if replica is not None and not replica.refuses_for_good(requested_epoch(message.body)):
            error = OutcomeUnknown(error.message)
        body = encode_body(codec_of(message.body), error.to_body())
        return Publish(message.reply, body, failure_headers(error))


def _confirm(
    replica: Replica, level: str, deadline_ns: int,
    respond: Callable[[dict[str, Any] | BusKVError], None], page: dict[str, Any] | BusKVError,
) -> None:  # fmt: skip
    """What was read is told once it is known that no later epoch had begun (R5)."""
    if isinstance(page, BusKVError):
        return respond(page)
    # The disk may take its time; the others may not.
    confirm_ns = replica.now_ns + replica.knobs.answer_within_ms * MILLISECOND_NS * 4 // 5
    return replica.answer_read(
        level, min(deadline_ns, confirm_ns), respond, page, replica.commit_seq
    )
