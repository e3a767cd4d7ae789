"""Requests on a shard's own subject: the columnar form of nodes and clients, and the contract's readable form.

On the subject of any replica (`.read`) the first two forms carry gets, and no epoch.

{"epoch": 3, "batch": <encoded batch>}                      -> {"batch": {outcomes, epochs, seqs, …}}
{"epoch": 3, "ops": [{"op": "put", …}], "request_id": …}    -> {"results": […]}
{"epoch": 3, "scan": {start, end, limit, reverse, …}}       -> {"items": […], "next": position or null}
{"epoch": 3, "history": {key, limit, before}}               -> {"key", "versions": […], "next": version or null}
{"epoch": 3, "receipt": [3, 43]}                            -> {"state": "quorum"}
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from bus_kv.errors import BusKVError, MalformedRequest
from bus_kv.knobs import MILLISECOND_NS
from bus_kv.protocol.batch import GET, Batch, BatchReply, decode_batch
from bus_kv.protocol.codec import Codec, codec_of, decode_body, decode_cbor
from bus_kv.protocol.requests import (
    parse_common,
    parse_operations,
    parse_shard_history,
    parse_shard_receipt,
    parse_shard_scan,
    result_of,
)  # fmt: skip
from nodes.machine.receipts import answer_receipt

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.core.machine import Received
    from bus_kv.protocol.requests import PageRequest
    from nodes.machine.node import NodeMachine

    Answer: TypeAlias = Callable[[dict[str, Any] | BusKVError], None]

_FORMS = ("ops", "batch", "scan", "history", "receipt")
_FIELDS = {*_FORMS, "epoch", "consistency", "request_id", "keyspace", "atomic"}


class ShardRequests:
    def __init__(self, node: NodeMachine) -> None:
        self._node = node
        self._number = 0

    def on_request(self, message: Received) -> None:
        codec, since_ns = codec_of(message.body), self._node.now_ns
        answer = partial(self._answer, message, codec, since_ns)
        try:
            self._dispatch(message, answer)
        except BusKVError as error:
            answer(error)

    def _answer(
        self, message: Received, codec: Codec, since_ns: int, result: dict[str, Any] | BusKVError
    ) -> None:
        self._node.answer("shard", message, codec, result, since_ns)

    def _dispatch(self, message: Received, answer: Answer) -> None:
        any = message.channel == "read"
        fields = self._fields(message.body, any)
        shard, epoch, node = message.name, fields.get("epoch"), self._node
        # A gateway has to hear of a refusal, such as CONSISTENCY_NOT_MET, before its own time is over.
        deadline_ns = node.now_ns + node.answer_within_ns * 4 // 5
        page_ns = node.now_ns + node.knobs.page_within_ms * MILLISECOND_NS * 4 // 5
        if "receipt" in fields:
            receipt = parse_shard_receipt(shard, fields["receipt"])
            receipt.consistency = fields.get("consistency")
            return answer_receipt(node, receipt, fields["epoch"], deadline_ns, answer)
        if "scan" in fields or "history" in fields:
            page = self._page(shard, fields)
            return node.door.page(shard, page, epoch, page_ns, answer)
        if "batch" in fields:
            raw = fields["batch"]
            if type(raw) is not bytes:
                raise MalformedRequest("batch is not a byte string")
            respond = partial(self._answer_batch, answer, any)
            batch = _read_at_one(decode_batch(raw)) if any else decode_batch(raw)
            return node.door.submit(shard, batch, raw, epoch, deadline_ns, respond)
        batch = self._operations(shard, fields)
        if any:
            batch = _read_at_one(batch)
        respond = partial(self._answer_operations, batch, shard, answer)
        return node.door.submit(shard, batch, batch.encode(), epoch, deadline_ns, respond)

    def _page(self, shard: str, fields: dict[str, Any]) -> PageRequest:
        page: PageRequest = (
            parse_shard_scan(fields["scan"])
            if "scan" in fields
            else parse_shard_history(fields["history"])
        )
        page.consistency = fields.get("consistency") or self._default_level(shard)
        return page

    def _default_level(self, shard: str) -> str:
        """The consistency of the shard's keyspace."""
        record = self._node.map.shards.get(shard)
        keyspace = self._node.map.keyspaces.get(record.keyspace) if record else None
        return keyspace.consistency if keyspace else "quorum"

    def _fields(self, body: bytes, any: bool) -> dict[str, Any]:
        """Decode one request; the columnar form is left alone, since its bytes are what the log keeps."""
        fields = decode_cbor(body) if codec_of(body) is Codec.CBOR else decode_body(body)[1]
        if "batch" not in fields:
            fields = decode_body(body)[1]
        unknown = [name for name in fields if name not in _FIELDS]
        if unknown:
            raise MalformedRequest(f"a shard request has no field {unknown[0]!r}")
        if any:
            if fields.keys() & {"epoch", "scan", "history", "receipt"}:
                raise MalformedRequest("a read of any replica takes ops or batch, and no epoch")
        elif type(fields.get("epoch")) is not int:
            raise MalformedRequest("a shard request needs an epoch, a whole number")
        if sum(name in fields for name in _FORMS) != 1:
            raise MalformedRequest(f"a shard request needs one of {', '.join(_FORMS)}")
        parse_common(fields, "a shard request")
        return fields

    def _operations(self, shard: str, fields: dict[str, Any]) -> Batch:
        batch = parse_operations(fields["ops"])
        _, consistency, request_id = parse_common(fields, "a shard request")
        batch.consistency = consistency or self._default_level(shard)
        batch.atomic = fields.get("atomic", False)
        batch.client, number = request_id or self._next_request_id()
        batch.numbers = [number] * len(batch)
        batch.indexes = list(range(len(batch)))
        return batch

    def _next_request_id(self) -> tuple[str, int]:
        self._number += 1
        return f"{self._node.config.run[1]}-s", self._number

    def _answer_batch(self, answer: Answer, any: bool, reply: BatchReply | BusKVError) -> None:
        """The map's version is for clients that have an older one; of a primary they know which node it is."""
        if isinstance(reply, BusKVError):
            return answer(reply)
        node = self._node
        result = {"batch": reply.to_wire(), "map_version": node.map.map_version}
        return answer(result | {"node": node.config.id} if any else result)

    def _answer_operations(
        self, batch: Batch, shard: str, answer: Answer, reply: BatchReply | BusKVError
    ) -> None:
        if isinstance(reply, BusKVError):
            return answer(reply)
        node = self._node.config.id
        return answer(
            {"results": [result_of(batch, reply, i, shard, node) for i in range(len(batch))]}
        )


def requested_epoch(body: bytes) -> int:
    """The epoch that a request names, 0 when it is none."""
    try:
        fields = decode_cbor(body) if codec_of(body) is Codec.CBOR else decode_body(body)[1]
    except BusKVError:
        return 0
    epoch = fields.get("epoch")
    return epoch if type(epoch) is int else 0


def _read_at_one(batch: Batch) -> Batch:
    if batch.kinds.count(GET) < len(batch):
        raise MalformedRequest("replicas answer gets only; send writes to the primary")
    batch.consistency = "one"
    return batch
