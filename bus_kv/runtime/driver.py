"""The driver: runs one machine on the real bus, clock, log and store.

One task runs the turns (`bus_kv.core.machine.turn`) and performs what each Ready asks for, in order. Everything that
happens elsewhere (messages, durable appends, answers of the store) is offered as an event and wakes it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from bus_kv.core.machine import (
    CutsRead,
    Halt,
    LogRead,
    Publish,
    Received,
    Request,
    StoreCas,
    Stored,
    StoreGet,
    Subscribe,
    Trim,
    turn,
)  # fmt: skip
from bus_kv.core.timers import NEVER_NS
from bus_kv.knobs import MILLISECOND_NS
from bus_kv.runtime.nats_bus import BusError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from bus_kv.core.machine import Append, Event, Fold, Machine, Query
    from bus_kv.runtime.clock import Clock
    from bus_kv.runtime.nats_bus import MapStore, NatsBus, Subscription

LATE_NS = 50 * MILLISECOND_NS
LATE_PAUSE_S = 0.002


class Log(Protocol):
    def append(self, append: Append) -> None:
        """Make it durable; completion is offered as AppendCompleted, in order."""

    def read(self, read: LogRead | CutsRead) -> None:
        """Read entries back; the answer is offered as Answered."""

    def trim(self, trim: Trim) -> None:
        """Forget entries when there is time."""


class State(Protocol):
    def submit(self, effect: Fold | Query) -> None:
        """Never blocks; the answer is offered as Answered."""


class Driver:
    def __init__(
        self, machine: Machine, bus: NatsBus, clock: Clock, *,
        inbox_messages_max: int,
        store: MapStore | None = None,
        log: Log | None = None,
        state: State | None = None,
        subjects: dict[str, tuple[Callable[[str], str], str]] | None = None,
        refuse: Callable[[Received], Publish | None] | None = None,
        express: Callable[[Received], Publish | None] | None = None,
        after_turn: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`subjects` maps a channel to (name -> subject, queue group) for Subscribe; `refuse` answers a message that
        finds the inbox full, `express` one that cannot wait for a turn; `after_turn` is called when the effects of one
        have left."""
        self.machine = machine
        self.halt: Halt | None = None
        self._bus, self._clock, self._store, self._log = bus, clock, store, log
        self._state = state
        self._subjects = subjects or {}
        self._refuse, self._express, self._after_turn = refuse, express, after_turn
        self._inbox: deque[Event] = deque()
        self._inbox_max = inbox_messages_max
        self._deadline_ns: int | None = None
        """The machine's; None when it is to be asked again."""
        self._wake = asyncio.Event()
        self._turned = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = 0
        """When it rings; it is left alone when the machine's deadline moves away, which most often it does."""
        self._has_appended = False
        """In the last turn."""
        self._subscriptions: dict[tuple[str, str], Subscription] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- events in ----

    def offer(self, event: Event) -> Publish | None:
        """Hand an event to the next turn. A request that finds the inbox full, or that is answered at once, is not
        taken: the answer to it is returned. The few messages of the control plane have as much room again."""
        waiting = len(self._inbox)
        if self._express is not None and isinstance(event, Received):
            answer = self._express(event)
            if answer is not None:
                return answer
        if isinstance(event, Received) and waiting >= self._inbox_max:
            refusal = self._refuse(event) if self._refuse else None
            if refusal is not None or waiting >= 2 * self._inbox_max:
                return refusal
        self._inbox.append(event)
        self._wake.set()
        return None

    def wake(self) -> None:
        """Run a turn soon: the machine was told something directly."""
        self._wake.set()

    async def listen(
        self, channel: str, subject: str, queue: str = "", is_optional: bool = False
    ) -> Subscription:
        """Feed a subject's messages to the machine as Received(channel, last token of the subject)."""

        async def on_message(message: Any) -> None:
            subject, body, reply = message.subject, message.data, message.reply
            in_shard = channel in ("shard", "read", "replicate")
            name = subject.split(".")[-2] if in_shard else subject.rpartition(".")[2]
            refusal = self.offer(Received(channel, name, body, reply, message.headers))
            if refusal is not None:
                await self._perform(refusal)

        return await self._bus.subscribe(subject, on_message, queue, is_optional)

    # ---- the turn ----

    async def run(self) -> Halt:
        """Run turns until the machine halts."""
        while self.halt is None:
            await self._wait()
            await self._turn(self._inbox)
            self._after_turn()
            if self._inbox:
                await self._breathe()
        return self.halt

    async def _breathe(self) -> None:
        """Between two turns of a full inbox: those who were answered go on, and what they ask for leaves at once.

        Without it requests that came together stay together, and client and node take turns at waiting.
        """
        await asyncio.sleep(0)
        await self._turn(deque())
        await asyncio.sleep(0)

    async def _turn(self, inbox: deque[Event]) -> None:
        ready = turn(self.machine, inbox, self._clock.now_ns(), self._next_ns())
        self._deadline_ns = None
        leaving: list[Subscription] = []
        reads: list[LogRead | CutsRead] = []
        for effect in ready.effects:
            if isinstance(effect, Subscribe) and not effect.active:
                leaving += self._take_subscription(effect)
            elif isinstance(effect, LogRead | CutsRead):
                reads.append(effect)  # what it asks for may be in the append
            else:
                await self._perform(effect)
        if ready.effects:
            self._bus.send()  # from here on the log's thread wants the interpreter, too
        self._has_appended = ready.append is not None
        if ready.append is not None:
            self._disk.append(ready.append)
        for read in reads:
            self._disk.read(read)
        if leaving:
            for subscription in leaving:
                # What has come in is still answered, or whoever asked would wait for nothing.
                self._spawn(self._bus.drain(subscription))
            await asyncio.sleep(0)  # they leave before a subject is subscribed to anew
        self._turned.set()

    @property
    def _disk(self) -> Log:
        assert self._log is not None, "only a machine with a log appends"
        return self._log

    async def _wait(self) -> None:
        """Until something was offered or the machine's deadline has come."""
        if not (self._is_offered or self.machine.is_settled):
            if self._has_appended:
                await asyncio.sleep(0)  # the log's thread goes first: it has an fsync to begin
            if not self._is_offered and self.machine.settle(self._clock.now_ns()):
                self._wake.set()
        if not self._is_offered:
            deadline_ns = self._next_ns()
            if deadline_ns < NEVER_NS:
                self._ring_at(deadline_ns)
            await self._wake.wait()
            if self._clock.now_ns() - deadline_ns > LATE_NS:
                # This process was held up. Answers wait in its socket: they are heard before anybody is called silent.
                await asyncio.sleep(LATE_PAUSE_S)
        self._wake.clear()

    @property
    def _is_offered(self) -> bool:
        return self._wake.is_set() or bool(self._inbox)

    def _next_ns(self) -> int:
        if self._deadline_ns is None:
            self._deadline_ns = self.machine.next_deadline_ns()
        return self._deadline_ns

    def _ring_at(self, deadline_ns: int) -> None:
        """Wake the machine then, or sooner."""
        if self._timer is not None:
            if self._timer_ns <= deadline_ns:
                return
            self._timer.cancel()
        delay_s = max((deadline_ns - self._clock.now_ns()) / 1e9, 0.0)
        self._timer_ns = deadline_ns
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._wake.set()

    async def _perform(self, effect: Any) -> None:
        match effect:
            case Publish(subject, body, headers):
                await self._bus.publish(subject, body, headers=headers)
            case Request(correlation, subject, body):
                await self._bus.publish(subject, body, reply=self._bus.reply_subject(correlation))
            case StoreGet(correlation, key):
                assert self._store is not None
                self._spawn(self._ask(correlation, self._store.get(correlation, key)))
            case StoreCas(correlation, key, revision, document):
                assert self._store is not None
                question = self._store.cas(correlation, key, revision, document)
                self._spawn(self._ask(correlation, question))
            case Subscribe():
                await self._subscribe(effect)
            case Halt():
                self.halt = effect
            case Trim():
                self._disk.trim(effect)
            case query:
                assert self._state is not None
                self._state.submit(query)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, correlation: int, question: Coroutine[Any, Any, Event]) -> None:
        """The machine waits for this answer: whatever goes wrong is one, too."""
        try:
            self.offer(await question)
        except Exception as error:
            self.offer(Stored(correlation, failure=repr(error)))

    async def _subscribe(self, effect: Subscribe) -> None:
        key = (effect.channel, effect.name)
        if key not in self._subscriptions:
            subject, queue = self._subjects[effect.channel]
            listening = await self.listen(effect.channel, subject(effect.name), queue)
            self._subscriptions[key] = listening

    def _take_subscription(self, effect: Subscribe) -> list[Subscription]:
        subscription = self._subscriptions.pop((effect.channel, effect.name), None)
        return [subscription] if subscription is not None else []

    # ---- shutdown ----

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return when `condition` holds at the end of a turn."""
        while not condition():
            self._turned.clear()
            await self._turned.wait()

    @property
    def is_idle(self) -> bool:
        """Nothing waits for a turn, and no question to the store is open."""
        return not (self._wake.is_set() or self._inbox or self._tasks)

    async def drain(self, channels: tuple[str, ...], deadline_s: float) -> None:
        """Stop taking new messages on these channels and let the turns finish what has come in."""
        keys = [key for key in self._subscriptions if key[0] in channels]
        try:
            async with asyncio.timeout(deadline_s):
                for key in keys:
                    subscription = self._subscriptions.pop(key, None)  # a turn may have come before
                    if subscription is not None:
                        await self._bus.drain(subscription)
        except (TimeoutError, BusError):
            return
