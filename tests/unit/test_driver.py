"""The driver: what it hears first, and in which order it does what a turn asks for."""

from __future__ import annotations

import asyncio
import os
import time
from types import SimpleNamespace
from typing import Any, cast

from bus_kv.core.machine import Append, Halt, LogRead, Publish, Ready, Received, Subscribe
from bus_kv.core.timers import NEVER_NS
from bus_kv.runtime.clock import Clock
from bus_kv.runtime.driver import Driver


class Patient:
    """A machine that waits for a message until a deadline, and halts when either has come."""

    is_full, is_settled = False, True

    def __init__(self, deadline_ns: int = NEVER_NS) -> None:
        self.deadline_ns = deadline_ns
        self.seen: list[str] = []

    def step(self, event: Any, now_ns: int) -> None:
        del now_ns
        self.seen.append(event.name)
        self.deadline_ns = NEVER_NS

    def on_deadline(self, now_ns: int) -> None:
        if self.deadline_ns <= now_ns:
            self.seen.append("deadline")

    def next_deadline_ns(self) -> int:
        return self.deadline_ns

    def settle(self, now_ns: int) -> bool:
        raise AssertionError("nothing is left to settle")

    def take_ready(self, now_ns: int) -> Ready:
        del now_ns
        return Ready([Halt(0, "")] if self.seen else [])


async def test_what_has_come_meanwhile_is_heard_before_a_deadline_that_has_passed() -> None:
    machine = Patient(Clock().now_ns() + 10_000_000)
    driver = Driver(
        machine, cast("Any", SimpleNamespace(send=lambda: None)), Clock(), inbox_messages_max=10
    )
    reading, writing = os.pipe()

    async def hand_on() -> None:
        """As the bus does: a message is read in one pass of the loop and told in a later one."""
        await asyncio.sleep(0)
        driver.offer(Received("heartbeat", "n1", b"", "", None))

    tasks: list[Any] = []

    def on_readable() -> None:
        os.read(reading, 1)
        tasks.append(asyncio.get_running_loop().create_task(hand_on()))

    asyncio.get_running_loop().add_reader(reading, on_readable)
    turns = asyncio.create_task(driver.run())
    await asyncio.sleep(0)
    os.write(writing, b"x")
    time.sleep(0.2)  # noqa: ASYNC251 - that is the point: the process stands still
    await turns
    asyncio.get_running_loop().remove_reader(reading)
    os.close(reading)
    os.close(writing)
    assert machine.seen == ["n1"]


class Restless(Patient):
    """Listens on two shards, then no more, then anew, in a turn each, and halts."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = 0

    def take_ready(self, now_ns: int) -> Ready:
        del now_ns
        self.turns += 1
        effects: list[Any] = [Subscribe("shard", s, self.turns != 2) for s in ("s1", "s2")]
        return Ready([*effects, Publish("again", b""), *[Halt(0, "")] * (self.turns == 3)])


class Hasty:
    """A bus that tells what it is asked for, in order, and has the next turn begin at once."""

    def send(self) -> None: ...

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.driver: Driver | None = None

    async def subscribe(self, subject: str, *_: Any) -> str:
        self.asked.append(f"join {subject}")
        return subject

    async def drain(self, subscription: str) -> None:
        self.asked.append(f"leave {subscription}")

    async def publish(self, *_: Any, headers: None) -> None:
        assert self.driver is not None
        self.driver.wake()


async def test_a_subject_is_left_before_it_is_joined_again() -> None:
    """Else what comes in between would be handled twice."""
    bus = Hasty()
    subjects: Any = {"shard": (str, "")}
    bus.driver = Driver(
        Restless(), cast("Any", bus), Clock(), inbox_messages_max=10, subjects=subjects
    )
    bus.driver.wake()
    await bus.driver.run()
    join, leave = ["join s1", "join s2"], ["leave s1", "leave s2"]
    assert bus.asked == [*join, *leave, *join]


class Writing(Patient):
    """Asks for its log, publishes, appends, and halts, in one turn."""

    def take_ready(self, now_ns: int) -> Ready:
        del now_ns
        read = LogRead(1, "s1", (0, 0), 100)
        return Ready([read, Publish("to others", b""), Halt(0, "")], Append(1, [], []))


class Recording:
    """A bus and a log; what is published leaves when that is asked for."""

    def __init__(self) -> None:
        self.done: list[str] = []

    async def publish(self, *_: Any, headers: None) -> None:
        self.done.append("published")

    def send(self) -> None:
        self.done.append("left")

    def append(self, append: Append) -> None:
        self.done.append(f"append {append.ticket}")

    def read(self, read: LogRead) -> None:
        self.done.append(f"read {read.shard}")


async def test_entries_leave_for_the_others_before_the_own_disk_has_them() -> None:
    """The other replicas are further away. What is read from the log comes behind what is appended to it."""
    both = Recording()
    driver = Driver(
        Writing(), cast("Any", both), Clock(), inbox_messages_max=10, log=cast("Any", both)
    )
    driver.wake()
    await driver.run()
    assert both.done == ["published", "left", "append 1", "read s1"]


class Lazy(Patient):
    """Leaves something to be done after its first turn, which makes it say something in a second one, and halts."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events, self.is_settled = events, True
        self.turns = 0

    def step(self, event: Any, now_ns: int) -> None:
        self.is_settled = False

    def settle(self, now_ns: int) -> bool:
        self.is_settled = True
        self.events.append("settled")
        return True

    def take_ready(self, now_ns: int) -> Ready:
        self.turns += 1
        if self.turns == 1:
            return Ready([Publish("answer", b"")], Append(1, [], []))
        return Ready([Publish("more", b""), Halt(0, "")])


async def test_what_can_wait_is_done_when_the_effects_have_left() -> None:
    both = Recording()
    driver = Driver(
        Lazy(both.done), cast("Any", both), Clock(), inbox_messages_max=10, log=cast("Any", both)
    )
    driver.offer(Received("shard", "s1", b"", "", None))
    await driver.run()
    assert both.done == ["published", "left", "append 1", "settled", "published", "left"]


async def test_the_log_begins_before_what_can_wait_and_turns_are_told_of() -> None:
    class Threaded(Recording):
        def append(self, append: Append) -> None:
            asyncio.get_running_loop().call_soon(self.done.append, "begun")

    both = Threaded()
    driver = Driver(
        Lazy(both.done), cast("Any", both), Clock(), inbox_messages_max=10, log=cast("Any", both),
        after_turn=lambda: both.done.append("turned"),
    )  # fmt: skip
    driver.offer(Received("shard", "s1", b"", "", None))
    await driver.run()
    first, second = ["published", "left", "turned"], ["published", "left", "turned"]
    assert both.done == [*first, "begun", "settled", *second]
