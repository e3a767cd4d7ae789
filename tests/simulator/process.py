"""A simulated process: one production machine, driven as `bus_kv.runtime.driver` does it; it can crash and pause."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from bus_kv.core.machine import (
    ClientsOf,
    CutsRead,
    Expiring,
    Fold,
    Halt,
    KeysAfter,
    Load,
    LogRead,
    Lookup,
    Publish,
    RangeCount,
    RangeRead,
    Ready,
    Received,
    Request,
    RequestsOf,
    Responded,
    SnapshotRead,
    StoreCas,
    Stored,
    StoreGet,
    Subscribe,
    Trim,
    turn,
)  # fmt: skip
from bus_kv.core.timers import NEVER_NS
from tests.simulator.world import MICROSECOND_NS, SECOND_NS, Violation

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.core.machine import Event, Machine
    from tests.simulator.bus import Bus
    from tests.simulator.disk import Disk
    from tests.simulator.store import Store
    from tests.simulator.world import World

TURN_NS = (10 * MICROSECOND_NS, 300 * MICROSECOND_NS)
SETTLE_NS = (0, 100 * MICROSECOND_NS)


class Process:
    """`build` makes the machine of each life; what survives a crash is in `disk`."""

    def __init__(
        self, world: World, bus: Bus, store: Store, name: str, peers: dict[str, Process],
        inbox_messages_max: int, disk: Disk | None = None,
    ) -> None:  # fmt: skip
        self.world, self.bus, self.store, self.name, self.disk = world, bus, store, name, disk
        self.peers = peers
        peers[name] = self
        self.life = 0
        self.alive = False
        self.paused_until_ns = 0
        self.cut_in = False
        self.cut_out = False
        self.machine: Machine
        self.inbox: deque[Event] = deque()
        self.inbox_messages_max = inbox_messages_max
        self.subjects: dict[str, Any] = {}
        """Channel -> (name -> subject, queue group)."""
        self.refuse: Callable[[Received], Publish | None] = lambda _: None
        """Answers a request that finds the inbox full; other messages are let in."""
        self.tap: Callable[[Publish], None] = lambda _: None
        """Sees every message that leaves, before it does."""
        self.after_turn: Callable[[Ready], None] = lambda _: None
        self._skew_ns = 0
        self._random = world.random(f"process/{name}")
        self._turn_due = False
        self._wake_ns: int | None = None

    @property
    def now_ns(self) -> int:
        """The process's own clock: off by some seconds, differently in each life."""
        return self.world.now_ns + self._skew_ns

    def begin(self, machine: Machine) -> None:
        """Start a life with this machine."""
        self.life += 1
        self.alive = True
        self.machine = machine
        self.inbox = deque()
        self._turn_due, self._wake_ns, self._deadline_ns = False, None, NEVER_NS
        self._skew_ns = self._random.randint(-5, 5) * SECOND_NS
        self.paused_until_ns = 0
        self.world.note(self.name, f"starts life {self.life}")
        self.schedule()

    def crash(self) -> None:
        self.world.note(self.name, "crashes")
        self.alive = False
        self.bus.forget(self)
        if self.disk is not None:
            self.disk.crash()

    def pause(self, duration_ns: int) -> None:
        """Stand still, as under SIGSTOP or a long collection; messages gather meanwhile."""
        self.world.note(self.name, f"pauses for {duration_ns // 1_000_000} ms")
        self.paused_until_ns = self.world.now_ns + duration_ns

    def resume(self) -> None:
        """Go on at once with what has gathered."""
        if self.world.now_ns < self.paused_until_ns:
            self.paused_until_ns = self.world.now_ns
            self._turn_due = False
            self.schedule()

    # ---- events ----

    def receive(self, life: int, event: Event) -> None:
        from_afar = isinstance(event, Received | Responded | Stored)
        if life != self.life or not self.alive or (self.cut_in and from_afar):
            return
        if isinstance(event, Received) and len(self.inbox) >= self.inbox_messages_max:
            refusal = self.refuse(event)
            if refusal is not None:
                self._perform(refusal)
                return
        self.inbox.append(event)
        self.schedule()

    def schedule(self) -> None:
        """Have a turn soon."""
        if not self._turn_due:
            self._turn_due = True
            life = self.life
            delay_ns = self._random.randint(*TURN_NS)
            when_ns = max(self.world.now_ns + delay_ns, self.paused_until_ns)
            self.world.at(when_ns, lambda: self._turn(life))

    def _turn(self, life: int) -> None:
        if life != self.life or not self.alive:
            return
        if self.world.now_ns < self.paused_until_ns:
            return self.world.at(self.paused_until_ns, lambda: self._turn(life))
        self._turn_due = False
        ready = turn(self.machine, self.inbox, self.now_ns, self._deadline_ns)
        if ready.append is not None:
            assert self.disk is not None
            self.disk.append(ready.append)
        for effect in ready.effects:
            self._perform(effect)
        self.after_turn(ready)
        self._arm()
        if not self.machine.is_settled:
            delay_ns = self._random.randint(*SETTLE_NS)
            self.world.at(self.world.now_ns + delay_ns, lambda: self._settle(life))
        if self.inbox:
            self.schedule()
        return None

    def _settle(self, life: int) -> None:
        """Unless another turn has done it."""
        if life != self.life or not self.alive:
            return
        if self.world.now_ns < self.paused_until_ns:
            return self.world.at(self.paused_until_ns, lambda: self._settle(life))
        if self.machine.settle(self.now_ns):
            self.schedule()
        self.after_turn(Ready())
        return self._arm()

    def _arm(self) -> None:
        self._deadline_ns = deadline_ns = self.machine.next_deadline_ns()
        if deadline_ns >= NEVER_NS or (self._wake_ns is not None and self._wake_ns <= deadline_ns):
            return
        self._wake_ns, life = deadline_ns, self.life
        self.world.at(deadline_ns - self._skew_ns, lambda: self._on_wake(life))

    def _on_wake(self, life: int) -> None:
        if life == self.life and self.alive:
            self._wake_ns = None
            self.schedule()

    # ---- effects ----

    def _perform(self, effect: Any) -> None:
        match effect:
            case Publish(subject, body):
                self.tap(effect)
                self.bus.publish(self, subject, body)
            case Request(correlation, subject, body):
                reply = f"_INBOX.{self.name}.{self.life}.{correlation}"
                self.bus.publish(self, subject, body, reply)
            case StoreGet() | StoreCas():
                life = self.life
                if self.cut_out:
                    return
                self.store.ask(effect, lambda stored: self.receive(life, stored))
            case Subscribe(channel, name, active):
                subject, queue = self.subjects[channel]
                if active:
                    self.bus.subscribe(self, channel, subject(name), queue)
                else:
                    self.bus.unsubscribe(self, subject(name))
            case (
                Fold()
                | Lookup()
                | RangeRead()
                | RangeCount()
                | KeysAfter()
                | Expiring()
                | RequestsOf()
                | Load()
                | SnapshotRead()
                | ClientsOf()
            ):
                assert self.disk is not None
                self.disk.state.submit(effect)
            case LogRead() | CutsRead() | Trim():
                assert self.disk is not None
                self.disk.do(effect)
            case Halt():
                raise Violation(f"{self.name} halted: {effect.message}")
            case _:
                raise TypeError(f"unknown effect {effect!r}")
