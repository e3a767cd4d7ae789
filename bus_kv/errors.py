"""Failures of bus_kv: one class per code, and a class exists only where a caller acts differently.

    BusKVError
    ├── RequestError          definite: the request itself is wrong; do not send it again
    │   ├── MalformedRequest · UnknownVerb · KeyTooLarge · ValueTooLarge · NoShard
    │   └── ShardUnknown · NodeUnknown · KeyspaceUnknown · Forbidden · SqlRefused · SqlFailed
    ├── DataError             definite: the data says no
    │   └── PreconditionFailed · Conflict
    ├── RoutingError          definite, retriable, and the shard map is old
    │   └── NotPrimary · WrongShard · StaleEpoch
    ├── BusyError             definite, retriable with back-off
    │   └── ShardUnavailable · Overloaded
    └── IndefiniteError       the operation may have happened, or may yet
        └── OutcomeUnknown · ConsistencyNotMet · Internal

`definite` says that the operation was not applied and never will be. `retriable` says that the same body may be sent
again with the same request_id. `refreshes_map` says that the shard map should be read again first. Retry loops read
these attributes and hold no lists of classes (after aiokafka and maelstrom).
"""

from __future__ import annotations

from typing import Any, ClassVar

MESSAGE_CHARS_MAX = 240
"""A message may quote what a client sent; it travels in a header as well and has to stay short."""


class BusKVError(Exception):
    """A failure with a code. `detail` holds what the wire body carries beside code, message and retry."""

    code: ClassVar[str] = "INTERNAL"
    status: ClassVar[int] = 500
    definite: ClassVar[bool] = False
    retriable: bool = False
    refreshes_map: ClassVar[bool] = False

    def __init__(self, message: str, **detail: Any) -> None:
        if len(message) > MESSAGE_CHARS_MAX:
            message = message[: MESSAGE_CHARS_MAX - 1] + "…"
        super().__init__(message)
        self.message = message
        self.detail = detail

    def to_body(self) -> dict[str, Any]:
        """The wire body: `{"code", "message", "retry", …detail}`."""
        return {
            "code": self.code,
            "message": self.message,
            "retry": self.retriable,
            **self.detail,
        }


class RequestError(BusKVError):
    definite = True


class MalformedRequest(RequestError):
    code, status = "MALFORMED_REQUEST", 400


class UnknownVerb(RequestError):
    code, status = "UNKNOWN_VERB", 404


class KeyTooLarge(RequestError):
    code, status = "KEY_TOO_LARGE", 413


class ValueTooLarge(RequestError):
    code, status = "VALUE_TOO_LARGE", 413


class NoShard(RequestError):
    code, status = "NO_SHARD", 404


class ShardUnknown(RequestError):
    code, status = "SHARD_UNKNOWN", 404


class NodeUnknown(RequestError):
    code, status = "NODE_UNKNOWN", 404


class KeyspaceUnknown(RequestError):
    code, status = "KEYSPACE_UNKNOWN", 404


class Forbidden(RequestError):
    code, status = "FORBIDDEN", 403


class SqlRefused(RequestError):
    code, status = "SQL_REFUSED", 403


class SqlFailed(RequestError):
    code, status = "SQL_FAILED", 400


class DataError(BusKVError):
    definite = True


class PreconditionFailed(DataError):
    code, status = "PRECONDITION_FAILED", 412


class Conflict(DataError):
    """Another operation holds or changed the key. `retriable` is set per instance: a plain write may be sent again,
    a transaction must read again first."""

    code, status = "CONFLICT", 409

    def __init__(self, message: str, *, retriable: bool = False, **detail: Any) -> None:
        super().__init__(message, **detail)
        self.retriable = retriable


class RoutingError(BusKVError):
    definite = True
    retriable = True
    refreshes_map = True
    status = 421


class NotPrimary(RoutingError):
    code = "NOT_PRIMARY"


class WrongShard(RoutingError):
    code = "WRONG_SHARD"


class StaleEpoch(RoutingError):
    code = "STALE_EPOCH"


class BusyError(BusKVError):
    definite = True
    retriable = True


class ShardUnavailable(BusyError):
    code, status = "SHARD_UNAVAILABLE", 503
    refreshes_map = True


class Overloaded(BusyError):
    code, status = "OVERLOADED", 429


class IndefiniteError(BusKVError):
    pass


class OutcomeUnknown(IndefiniteError):
    """Sent and not answered in time. Sending the same request_id again is safe and tells the outcome."""

    code, status = "OUTCOME_UNKNOWN", 504
    retriable = True


class ConsistencyNotMet(IndefiniteError):
    """ALL was asked for; the write is committed at the level in `detail["met"]`, with `detail["version"]`."""

    code, status = "CONSISTENCY_NOT_MET", 424


class Internal(IndefiniteError):
    code, status = "INTERNAL", 500


def _leaves(cls: type[BusKVError]) -> list[type[BusKVError]]:
    children = cls.__subclasses__()
    return [leaf for child in children for leaf in _leaves(child)] if children else [cls]


CODES: dict[str, type[BusKVError]] = {cls.code: cls for cls in _leaves(BusKVError)}


def from_body(body: dict[str, Any]) -> BusKVError:
    """The exception that a wire body stands for; an unknown code becomes Internal and keeps its name."""
    detail = {k: v for k, v in body.items() if k not in ("code", "message", "retry")}
    message = str(body.get("message", ""))
    cls = CODES.get(str(body.get("code")))
    if cls is None:
        return Internal(f"{body.get('code')}: {message}", **detail)
    error = cls(message, **detail)
    error.retriable = bool(body.get("retry", cls.retriable))
    return error
