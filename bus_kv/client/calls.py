"""Requests that go out one by one: verbs to any node, and administration to the active coordinator."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bus_kv.core.fate import Fate
from bus_kv.core.timers import NEVER_NS
from bus_kv.errors import BusKVError, OutcomeUnknown, ShardUnavailable, from_body
from bus_kv.knobs import MILLISECOND_NS, SECOND_NS, Knobs
from bus_kv.protocol.codec import decode_cbor

if TYPE_CHECKING:
    from collections.abc import Callable

SLOW_VERBS = ("history", "scan", "sql")
WRITING_VERBS = ("put", "delete", "batch")
ADMIN_READING_VERBS = ("check", "failovers")
"""Of administration: what may be asked again, because it changes nothing."""
_PAUSE_NS = 30 * MILLISECOND_NS


class NoCoordinator(ShardUnavailable):
    """Nobody on the bus answers requests of administration."""


@dataclass
class Call(Fate):
    verb: str
    subject: str
    body: bytes
    token: Any
    deadline_ns: int
    attempt_ns: int
    """How long an attempt may take."""
    to_coordinator: bool = False
    """The active one; standbys listen, and do not answer."""
    give_up_ns: int = 0
    attempts: int = 0

    @property
    def is_read(self) -> bool:
        return self.verb not in WRITING_VERBS

    @property
    def is_repeatable(self) -> bool:
        return not self.to_coordinator or self.verb in ADMIN_READING_VERBS


def patience_ns(verb: str, knobs: Knobs) -> tuple[int, int]:
    """How long an attempt, and all of them, may take. Asking again what takes its time only adds to the work."""
    timeout_ns = int(knobs.client_timeout_s * SECOND_NS)
    if verb == "sql":
        query_ns = (knobs.sql_timeout_ms + 3000) * MILLISECOND_NS
        return query_ns, query_ns
    if verb in SLOW_VERBS:
        page_ns = (knobs.page_within_ms + 500) * MILLISECOND_NS
        return page_ns, max(timeout_ns, 2 * page_ns)
    return knobs.client_attempt_ms * MILLISECOND_NS, timeout_ns


def pause_ns(attempts: int, knobs: Knobs) -> int:
    """How long to wait before the next attempt: longer each time."""
    return min(_PAUSE_NS << min(attempts, 8), knobs.client_pause_ms_max * MILLISECOND_NS)


class Calls:
    """Calls under way. `request` sends and returns the correlation number; `finish` tells a call's one outcome."""

    def __init__(
        self, request: Callable[[str, bytes], int], finish: Callable[[Any, Any], None], knobs: Knobs
    ) -> None:
        self._request, self._finish, self._knobs = request, finish, knobs
        self._sent: dict[int, dict[int, Call]] = {}
        """Patience with an attempt -> calls by correlation, in the order in which they are given up."""
        self._paused: list[tuple[int, int, Call]] = []
        self._pauses = 0

    def send(self, call: Call, now_ns: int) -> None:
        call.give_up_ns = now_ns + call.attempt_ns
        self._sent.setdefault(call.attempt_ns, {})[self._request(call.subject, call.body)] = call

    def take_all(self) -> list[tuple[Call, bool]]:
        """Remove all calls; each with whether an attempt is under way."""
        sent = [(call, True) for calls in self._sent.values() for call in calls.values()]
        paused = [(call, False) for _, _, call in self._paused]
        self._sent, self._paused = {}, []
        return sent + paused

    # ---- what comes back ----

    def on_response(self, correlation: int, body: bytes | None, now_ns: int) -> None:
        for calls in self._sent.values():
            if correlation in calls:
                return self._on_reply(calls.pop(correlation), body, now_ns)
        return None

    def _on_reply(self, call: Call, body: bytes | None, now_ns: int) -> None:
        if body is None and call.to_coordinator:
            reason = "no coordinator answers: start one (bus-kv serve coordinator)"
            return self._finish(call.token, NoCoordinator(reason))
        if body is None:
            nobody = ShardUnavailable("no node of the cluster answers")
            return self._again(call, nobody, now_ns)
        fields = decode_cbor(body)
        if "code" in fields:
            return self._again(call, from_body(fields), now_ns)
        if "results" in fields:
            fields["results"] = [_judged(call, result) for result in fields["results"]]
        return self._finish(call.token, fields)

    def _again(self, call: Call, failure: BusKVError, now_ns: int) -> None:
        """Send it again after a pause if its failure allows and its time is not over."""
        call.attempts += 1
        call.note(failure)
        at_ns = now_ns + pause_ns(call.attempts, self._knobs)
        if not (call.is_repeatable and failure.retriable) or at_ns >= call.deadline_ns:
            return self._finish(call.token, call.verdict(failure))
        self._pauses += 1
        heapq.heappush(self._paused, (at_ns, self._pauses, call))
        return None

    # ---- time ----

    def next_ns(self) -> int:
        candidates = [next(iter(c.values())).give_up_ns for c in self._sent.values() if c]
        candidates += [self._paused[0][0]] if self._paused else []
        return min(candidates, default=NEVER_NS)

    def on_deadline(self, now_ns: int) -> None:
        for calls in [*self._sent.values()]:
            while calls and next(iter(calls.values())).give_up_ns <= now_ns:
                self._on_silence(calls.pop(next(iter(calls))), now_ns)
        while self._paused and self._paused[0][0] <= now_ns:
            self.send(heapq.heappop(self._paused)[2], now_ns)

    def _on_silence(self, call: Call, now_ns: int) -> None:
        if call.to_coordinator:
            # By now a standby may have become the active one.
            if call.is_repeatable and now_ns + call.attempt_ns <= call.deadline_ns:
                return self.send(call, now_ns)
            return self._finish(call.token, _no_coordinator_in_time())
        call.abandon()
        return self._again(call, ShardUnavailable("no node has answered in time"), now_ns)


def _judged(call: Call, result: dict[str, Any]) -> dict[str, Any]:
    """One result of a batch: after an attempt without an answer its failure may not be the whole truth."""
    return call.verdict(from_body(result)).to_body() if "code" in result else result


def _no_coordinator_in_time() -> BusKVError:
    return OutcomeUnknown(
        "no active coordinator has answered in time; it may be done all the same: see `bus-kv status`"
    )
