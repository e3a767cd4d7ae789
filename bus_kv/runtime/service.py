"""`$SRV.PING/INFO/STATS`: how NATS tools find and watch our processes (ADR-32, valid against the CLI's schemas).

Written here rather than taken from nats-py's `micro`, whose handlers run one after another and whose `stop` discards
queued requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from bus_kv.protocol.codec import encode_json
from bus_kv.subjects import QUEUE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bus_kv.core.endpoints import Endpoint
    from bus_kv.runtime.nats_bus import NatsBus

_TYPE = "io.nats.micro.v1.{}_response"


@dataclass(frozen=True, slots=True)
class ServiceInfo:
    name: str
    id: str
    version: str
    description: str
    metadata: dict[str, str]
    subjects: dict[str, str]
    """Endpoint name -> subject. A few concrete ones: INFO must stay one small message, whatever the shards."""
    started_ns: int


class Service:
    def __init__(
        self, info: ServiceInfo, counters: Callable[[], Mapping[str, Endpoint]], bus: NatsBus
    ) -> None:
        self._info, self._counters, self._bus = info, counters, bus

    async def start(self) -> None:
        for verb, answer in (("PING", self.ping), ("INFO", self.info), ("STATS", self.stats)):
            for suffix in ("", f".{self._info.name}", f".{self._info.name}.{self._info.id}"):
                await self._bus.subscribe(f"$SRV.{verb}{suffix}", self._responder(answer))

    def _responder(self, answer: Callable[[], dict[str, Any]]) -> Any:
        async def on_message(message: Any) -> None:
            if message.reply:
                await self._bus.publish(message.reply, encode_json(answer()))

        return on_message

    def ping(self) -> dict[str, Any]:
        return self._identity("ping")

    def info(self) -> dict[str, Any]:
        endpoints = [
            {"name": name, "subject": subject, "queue_group": QUEUE, "metadata": {}}
            for name, subject in self._info.subjects.items()
        ]
        return {
            **self._identity("info"),
            "description": self._info.description,
            "endpoints": endpoints,
        }

    def stats(self) -> dict[str, Any]:
        started = datetime.fromtimestamp(self._info.started_ns / 1e9, UTC)
        counters = self._counters()
        endpoints = [
            self._endpoint(name, subject, counters.get(name))
            for name, subject in self._info.subjects.items()
        ]
        return {
            **self._identity("stats"),
            "started": started.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "endpoints": endpoints,
        }

    def _identity(self, verb: str) -> dict[str, Any]:
        info = self._info
        return {
            "type": _TYPE.format(verb), "name": info.name, "id": info.id, "version": info.version,
            "metadata": info.metadata,
        }  # fmt: skip

    def _endpoint(self, name: str, subject: str, counters: Endpoint | None) -> dict[str, Any]:
        requests = counters.requests if counters else 0
        total_ns = counters.processing_ns if counters else 0
        return {
            "name": name,
            "subject": subject,
            "queue_group": QUEUE,
            "num_requests": requests,
            "num_errors": counters.failures if counters else 0,
            "last_error": counters.last_failure if counters else "",
            "processing_time": total_ns,
            "average_processing_time": total_ns // requests if requests else 0,
        }
