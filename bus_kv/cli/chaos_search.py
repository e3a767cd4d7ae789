"""Is there an order of one key's calls that a single copy could have answered so? A search after Wing and Gong, with
Lowe's memory of what was tried in vain.

A call may come next in the order unless another one that is not yet placed had returned before it was invoked. Three
facts keep the search short. What changes nothing is placed as soon as it fits: that never hinders another call. Writes
whose version is known come in the order of their versions. So the only choices are writes of unknown outcome that no
read has seen: whether they happened at all, and when. They are tried only where there is no way without them, so a
history that versions alone explain takes linear time. Of those that are alike the one that was invoked first is as good
as any, and to have used fewer of them is never worse: what was reached with fewer is not tried with more.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from operator import le
from typing import TYPE_CHECKING

from bus_kv.cli.chaos_history import Call, Kind, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bus_kv.protocol.batch import Version

STATES_MAX = 200_000
"""States of one key that are looked at; a history that takes more is reported as undecided."""
_NEVER_NS = 1 << 63


@dataclass(frozen=True, slots=True)
class State:
    """The key between two calls; `version` is None when it is absent, or was written by a call that nobody saw."""

    present: bool = False
    version: Version | None = None

    def __str__(self) -> str:
        if not self.present:
            return "absent"
        return f"at {self.version}" if self.version else "written by a call of unknown outcome"


@dataclass(frozen=True, slots=True)
class _Place:
    """How far the order has come: calls below `first` are placed, and those of `early`; `step` writes of known version;
    of each group of unknown ones as many as `used` says."""

    first: int
    early: frozenset[int]
    step: int
    state: State
    used: tuple[int, ...]

    def is_placed(self, i: int) -> bool:
        return i < self.first or i in self.early


class Search:
    """`calls` are those of one key that must be placed, `maybes` writes of unknown outcome that may be.

    A write of unknown outcome that a read has seen belongs to `calls`, with the version that was read.
    """

    def __init__(self, calls: Sequence[Call], maybes: Sequence[Call]) -> None:
        self._calls = sorted(calls, key=lambda c: c.invoked_ns)
        self._groups = _groups_of_alike(maybes)
        steps = [i for i, call in enumerate(self._calls) if _is_step(call)]
        self._steps = sorted(steps, key=lambda i: self._calls[i].version or (0, 0))
        self._start = _Place(0, frozenset(), 0, State(), (0,) * len(self._groups))
        self._farthest = self._start
        self._reached: defaultdict[_Place, list[tuple[int, ...]]] = defaultdict(list)

    def run(self) -> str | None:
        """None when there is an order; else where every order ends."""
        stack = [iter([self._settle(self._start)])]
        looked_at = 0
        while stack:
            place = next(stack[-1], None)
            if place is None:
                stack.pop()
            elif self._is_whole(place):
                return None
            elif self._is_new(place):
                looked_at += 1
                if looked_at > STATES_MAX:
                    return f"undecided after {STATES_MAX:,} states"
                stack.append(self._next_places(place))
        return self._story()

    def _is_new(self, place: _Place) -> bool:
        """Whether it was not reached before with as few unknown writes."""
        before = self._reached[replace(place, used=())]
        if any(all(map(le, used, place.used)) for used in before):
            return False
        before.append(place.used)
        return True

    def _is_whole(self, place: _Place) -> bool:
        self._farthest = max(self._farthest, place, key=lambda p: p.first + len(p.early))
        return place.first == len(self._calls)

    def _next_places(self, place: _Place) -> Iterator[_Place]:
        limit_ns = self._limit_ns(place)
        if place.step < len(self._steps):
            i = self._steps[place.step]
            call = self._calls[i]
            if call.invoked_ns <= limit_ns and _may_write(call, place.state):
                yield self._settle(self._with_step(place, i))
        for g, group in enumerate(self._groups):
            count = place.used[g]
            if count < len(group) and group[count].invoked_ns <= limit_ns:
                call = group[count]
                if _may_write(call, place.state):
                    used = (*place.used[:g], count + 1, *place.used[g + 1 :])
                    state = State(present=call.kind is Kind.PUT)
                    yield self._settle(replace(place, used=used, state=state))

    def _with_step(self, place: _Place, i: int) -> _Place:
        call = self._calls[i]
        state = State(True, call.version) if call.kind is Kind.PUT else State()
        return replace(place, early=place.early | {i}, step=place.step + 1, state=state)

    def _settle(self, place: _Place) -> _Place:
        """Place every call that changes nothing and fits, as long as there are any."""
        first, early, state = place.first, set(place.early), place.state
        is_new = True
        while is_new:
            first = self._skip(first, early)
            is_new = False
            limit_ns = self._limit_of(first, early)
            for i in range(first, len(self._calls)):
                call = self._calls[i]
                if call.invoked_ns > limit_ns:
                    break
                if i not in early and not _is_step(call) and _fits(call, state):
                    early.add(i)
                    is_new = True
        return replace(place, first=first, early=frozenset(early))

    def _skip(self, first: int, early: set[int]) -> int:
        while first in early:
            early.discard(first)
            first += 1
        return first

    def _limit_ns(self, place: _Place) -> int:
        return self._limit_of(place.first, place.early)

    def _limit_of(self, first: int, early: frozenset[int] | set[int]) -> int:
        """The earliest return of a call that is not placed: who was invoked later cannot come before it."""
        limit_ns = _NEVER_NS
        for i in range(first, len(self._calls)):
            call = self._calls[i]
            if call.invoked_ns > limit_ns:
                break
            if i not in early:
                limit_ns = min(limit_ns, _returned_ns(call))
        return limit_ns

    def _story(self) -> str:
        place = self._farthest
        left = [c for i, c in enumerate(self._calls) if not place.is_placed(i)]
        blocked = min(left, key=_returned_ns)
        step = place.step
        following = self._calls[self._steps[step]] if step < len(self._steps) else None
        return f"no order explains [{blocked}]: the key was {place.state}, the next write is [{following}]"


def _groups_of_alike(maybes: Sequence[Call]) -> list[list[Call]]:
    """Those that do the same under the same condition, in the order of their invocation."""
    groups: defaultdict[object, list[Call]] = defaultdict(list)
    for call in sorted(maybes, key=lambda c: c.invoked_ns):
        groups[call.kind, call.if_absent, call.if_version].append(call)
    return [*groups.values()]


def _returned_ns(call: Call) -> int:
    """A call of unknown outcome has not returned: it may happen at any time."""
    is_unknown = call.returned_ns is None or call.outcome is Outcome.UNKNOWN
    return _NEVER_NS if is_unknown or call.returned_ns is None else call.returned_ns


def _is_step(call: Call) -> bool:
    return call.is_write and call.version is not None and call.outcome is not Outcome.UNMET


def _holds(call: Call, state: State) -> bool:
    if call.if_absent:
        return not state.present
    if call.if_version is not None:
        return state.present and state.version == call.if_version
    return True


def _may_write(call: Call, state: State) -> bool:
    """Whether the write would have been done, and answered so, in this state."""
    if call.kind is Kind.DELETE and not state.present:
        return False  # nothing is deleted, and no version given
    return _holds(call, state) and call.found in (None, state.present)


def _fits(call: Call, state: State) -> bool:
    """Whether a call that changes nothing would have been answered so in this state."""
    if call.outcome is Outcome.UNMET:
        return not _holds(call, state)
    if call.kind is Kind.GET and call.version is not None:
        return state.present and state.version == call.version
    return not state.present
