"""One coordinator process: the machine, the map's store and the bus, put together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import bus_kv
from bus_kv.core.endpoints import Endpoint
from bus_kv.core.machine import Received
from bus_kv.runtime.clock import Clock
from bus_kv.runtime.driver import Driver
from bus_kv.runtime.nats_bus import BusError, NatsBus
from bus_kv.runtime.process import unless_stopped
from bus_kv.runtime.service import Service, ServiceInfo
from bus_kv.subjects import Subjects, last_token
from coordinator.machine.coordinator import CoordinatorConfig, CoordinatorMachine

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.knobs import Knobs
    from bus_kv.runtime.connection import ConnectOptions

log = logging.getLogger("bus_kv.coordinator")

REMEMBER_ATTEMPTS = 5
"""JetStream may have started just now, too."""
REMEMBERED_MAX = 4000
"""Events that are heard again at once."""


@dataclass(frozen=True, slots=True)
class CoordinatorOptions:
    id: str
    connection: ConnectOptions
    knobs: Knobs


async def serve_coordinator(options: CoordinatorOptions, stop: asyncio.Event) -> int:
    """Run a coordinator until `stop`. Raises BusUnreachable, CredentialsRefused, BusError without JetStream."""
    restored: list[Callable[[], None]] = []

    def on_restored() -> None:
        for tell in restored:
            tell()

    bus = NatsBus(options.connection, on_restored)
    try:
        if not await unless_stopped(bus.open(), stop):
            return 0
        return await _serve(options, bus, stop, restored)
    finally:
        await bus.close()


async def _serve(
    options: CoordinatorOptions, bus: NatsBus, stop: asyncio.Event,
    restored: list[Callable[[], None]],
) -> int:  # fmt: skip
    subjects, clock = Subjects(options.connection.root), Clock()
    store_timeout_s = options.knobs.store_timeout_ms / 1000
    store = bus.map_store(subjects.bucket, store_timeout_s)
    if not await unless_stopped(store.prepare(), stop):
        return 0
    config = CoordinatorConfig(options.id, subjects, lambda: secrets.token_hex(8))
    machine = CoordinatorMachine(config, options.knobs)
    driver = Driver(
        machine, bus, clock, inbox_messages_max=options.knobs.inbox_messages_max, store=store
    )
    await bus.answer_to(driver.offer)
    await driver.listen("heartbeat", subjects.any_heartbeat)
    await driver.listen("admin", subjects.any_admin)
    await driver.listen("suspect", subjects.any_suspect)
    await driver.listen("failover", subjects.any_failover)
    await bus.flush()
    remember = partial(_remember, driver, bus, subjects, store_timeout_s)
    remembering = [asyncio.create_task(remember())]
    await _service(options.id, subjects, machine, clock, bus).start()
    machine.start(clock.now_ns())
    driver.wake()

    def on_restored() -> None:
        machine.reconnected(clock.now_ns())
        driver.wake()
        # NATS keeps events in memory: if it was restarted, it has to be asked to keep them again.
        remembering[:] = [t for t in remembering if not t.done()]
        remembering.append(asyncio.create_task(remember()))

    restored.append(on_restored)
    turns = asyncio.create_task(driver.run())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([turns, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    for task in remembering:
        task.cancel()
    if turns.done():
        return turns.result().exit_code
    await _leave(machine, driver, bus, clock)
    turns.cancel()
    return 0


async def _remember(driver: Driver, bus: NatsBus, subjects: Subjects, timeout_s: float) -> None:
    """Hear again what was told of takeovers before this process began."""
    stream, events, reason = subjects.failovers_stream, subjects.any_failover, ""
    for _ in range(REMEMBER_ATTEMPTS):
        try:
            kept = await bus.kept_events(stream, events, timeout_s)
        except BusError as error:
            reason = str(error)
            await asyncio.sleep(1.0)
            continue
        for subject, body in kept[-REMEMBERED_MAX:]:
            driver.offer(Received("failover", last_token(subject), body))
        return
    log.warning("takeovers of the past are not known: %s", reason)


async def _leave(machine: CoordinatorMachine, driver: Driver, bus: NatsBus, clock: Clock) -> None:
    """Give the lease away, so that a standby need not wait for it to run out."""
    log.info("stopping")
    machine.leave(clock.now_ns())
    driver.wake()
    with contextlib.suppress(TimeoutError, BusError):
        async with asyncio.timeout(2.0):
            await driver.until(lambda: driver.is_idle)
        await bus.flush()


def _service(
    id: str, subjects: Subjects, machine: CoordinatorMachine, clock: Clock, bus: NatsBus
) -> Service:
    info = ServiceInfo(
        name="bus_kv-coordinator",
        id=f"{id}-{secrets.token_hex(4)}",
        version=bus_kv.__version__,
        description=f"bus_kv coordinator {id}: keeps the shard map",
        metadata={"coordinator": id, "root": subjects.root},
        subjects={"admin": f"{subjects.root}.admin.*"},
        started_ns=clock.now_ns(),
    )
    return Service(info, lambda: {"admin": Endpoint(requests=machine.requests)}, bus)
