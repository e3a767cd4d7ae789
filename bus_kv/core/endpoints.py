"""Counters of what a process answers, in the terms of NATS' service framework (ADR-32, `$SRV.STATS`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Endpoint:
    requests: int = 0
    failures: int = 0
    processing_ns: int = 0
    last_failure: str = ""

    def record(self, elapsed_ns: int, failure: str | None) -> None:
        self.requests += 1
        self.processing_ns += elapsed_ns
        if failure is not None:
            self.failures += 1
            self.last_failure = failure
