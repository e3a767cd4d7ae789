"""One node process: the machine, its log and the bus, put together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import bus_kv
from bus_kv.core.machine import AppendCompleted, Halt, Mark
from bus_kv.errors import MalformedRequest
from bus_kv.protocol.entry import decode_entry
from bus_kv.protocol.requests import VERBS
from bus_kv.protocol.sizes import MAX_PAYLOAD_BYTES_MIN
from bus_kv.runtime.clock import Clock
from bus_kv.runtime.collector import Collector
from bus_kv.runtime.driver import Driver
from bus_kv.runtime.nats_bus import BusError, NatsBus
from bus_kv.runtime.process import ProcessError, unless_stopped
from bus_kv.runtime.service import Service, ServiceInfo
from bus_kv.subjects import QUEUE, Subjects
from nodes.log import DiskError, NodeLog
from nodes.machine.node import NodeConfig, NodeMachine
from nodes.machine.replica import Past
from nodes.state import StateStore, set_aside
from nodes.state_file import STATE_NAME

if TYPE_CHECKING:
    from pathlib import Path

    from bus_kv.core.machine import ReplicaRow
    from bus_kv.knobs import Knobs
    from bus_kv.runtime.connection import ConnectOptions

log = logging.getLogger("bus_kv.node")

DRAIN_S = 5.0


@dataclass(frozen=True, slots=True)
class NodeOptions:
    id: str
    data: Path
    connection: ConnectOptions
    knobs: Knobs
    zone: str | None = None
    weight: int = 1
    rebuild: bool = False
    """Set the state aside and build it again from the log."""


async def serve_node(options: NodeOptions, stop: asyncio.Event) -> int:
    """Run a node until `stop` or until it has to halt. Raises ProcessError, BusUnreachable, CredentialsRefused."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            node_log = NodeLog(options.data, options.id)
            stack.push_async_callback(asyncio.to_thread, node_log.close)
            state = _open_state(options, node_log)
            stack.push_async_callback(asyncio.to_thread, state.close)
        except DiskError as error:
            raise ProcessError(str(error)) from None
        return await NodeHost(options, node_log, state).run(stop)


def _open_state(options: NodeOptions, node_log: NodeLog) -> StateStore:
    if options.rebuild:
        for row in node_log.replicas():
            # Before the state is set aside: it may be whole, and all that there is.
            _check_start(node_log, row.shard, Mark())
        aside = set_aside(options.data)
        log.warning("the state is built again; the former one is %s", aside or "not there")
    knobs = options.knobs
    return StateStore(
        options.data, node_log.incarnation, memory_mb=knobs.duckdb_memory_mb,
        oplog_keep_s=knobs.oplog_keep_s, oplog_keep_bytes=knobs.oplog_keep_mb << 20,
        dedup_window_ms=knobs.dedup_window_ms, clients_max=knobs.dedup_clients_max,
        checkpoint_interval_s=knobs.checkpoint_interval_s, goes_on=partial(_goes_on, node_log),
    )  # fmt: skip


def _goes_on(node_log: NodeLog, marks: dict[str, Mark]) -> bool:
    """Whether the log has everything behind these marks."""
    for row in node_log.replicas():
        last, end = marks.get(row.shard, Mark()).last, node_log.end(row.shard)
        if not end and last != row.base_seq:
            return False
        if end and (last > end or _start_of(node_log, row.shard, last) != last):
            return False
    return True


def _start_of(node_log: NodeLog, shard: str, last: int) -> int:
    """The seq before the first entry that ends behind `last`; `last` itself when there is none."""
    entry = next(node_log.entries(shard, after=last), None)
    return last if entry is None else decode_entry(entry.body).previous[1]


def _check_start(node_log: NodeLog, shard: str, mark: Mark) -> None:
    """The log has to begin where the state ends, or before. Raises DiskError."""
    start = _start_of(node_log, shard, mark.last)
    if start != mark.last:
        had = f"the state has it up to {mark.last}" if mark.last else "a new state has nothing"
        raise DiskError(
            f"the log {node_log.path} has shard {shard} after seq {start} only, and {had}: what is "
            f"between is in neither; put the right {STATE_NAME} beside it (one that was set aside "
            f"is called {STATE_NAME}.<n>.damaged), or move the data directory away and start the "
            "node with an empty one"
        )


class NodeHost:
    def __init__(self, options: NodeOptions, node_log: NodeLog, state: StateStore) -> None:
        self._options, self._log, self._state = options, node_log, state
        self._subjects = Subjects(options.connection.root)
        self._clock = Clock()
        self._bus = NatsBus(options.connection, self._on_restored)
        self._machine: NodeMachine
        self._driver: Driver

    async def run(self, stop: asyncio.Event) -> int:
        try:
            if not await unless_stopped(self._bus.open(), stop):
                return 0
            self._build()
            await self._listen()
            return await self._serve(stop)
        finally:
            await self._bus.close()

    def _build(self) -> None:
        options = self._options
        if self._bus.max_payload_bytes < MAX_PAYLOAD_BYTES_MIN:
            raise ProcessError(
                f"this NATS server carries messages of {self._bus.max_payload_bytes} bytes; "
                f"set max_payload to {MAX_PAYLOAD_BYTES_MIN} or more (1MB is usual)"
            )
        run = (self._next_run(), secrets.token_hex(8))
        config = NodeConfig(
            options.id, self._log.incarnation, run,
            self._subjects, self._bus.max_payload_bytes, bus_kv.__version__, options.zone,
            options.weight,
        )  # fmt: skip
        self._machine = NodeMachine(config, options.knobs)
        self._restore()
        store = self._bus.map_store(self._subjects.bucket, options.knobs.store_timeout_ms / 1000)
        self._driver = Driver(
            self._machine, self._bus, self._clock,
            inbox_messages_max=options.knobs.inbox_messages_max, store=store, log=self._log,
            state=self._state,
            subjects={
                "verb": (lambda _: self._subjects.any_verb, QUEUE),
                "shard": (self._subjects.shard_request, ""),
                "read": (self._subjects.shard_read, QUEUE),
                "replicate": (self._subjects.shard_replicate, ""),
            },
            refuse=self._machine.door.overloaded,
            express=self._machine.express,
            after_turn=Collector().after_turn,
        )  # fmt: skip
        loop = asyncio.get_running_loop()
        for disk in (self._log, self._state):
            disk.start(
                lambda event: loop.call_soon_threadsafe(self._driver.offer, event),
                lambda error: loop.call_soon_threadsafe(self._on_disk_failure, error),
            )

    def _next_run(self) -> int:
        try:
            return self._log.next_run(self._clock.now_ns() // 1_000_000)
        except DiskError as error:
            raise ProcessError(str(error)) from None

    def _restore(self) -> None:
        """Replay the log behind what the state has. It ends before the node says a word on the bus."""
        try:
            marks = self._state.marks()
            document = self._log.map()
            if document is not None:
                self._machine.restore_map(document)
            for row in self._log.replicas():
                mark = marks.get(row.shard, Mark())
                self._check_log(row, mark)
                past = Past(mark, self._state.clients(row.shard))
                replica = self._machine.restore(row, past)
                for entry in self._log.entries(row.shard, after=mark.last):
                    replica.replay(entry)
                if self._log.has_cuts(row.shard):
                    replica.cuts.found()
                log.info(
                    "shard %s restored up to seq %d, %d of them from the state", row.shard,
                    replica.last[1], mark.last,
                )  # fmt: skip
        except DiskError as error:
            raise ProcessError(str(error)) from None
        except (MalformedRequest, AssertionError, KeyError, TypeError, ValueError) as error:
            raise ProcessError(
                f"the log {self._log.path} is damaged ({error}); restore the file from a backup, "
                "or move the data directory away and start the node with an empty one"
            ) from None

    def _check_log(self, row: ReplicaRow, mark: Mark) -> None:
        """The newest entry stays in the log: one that ends before the state does is not the log that belongs to it."""
        shard, end = row.shard, self._log.end(row.shard)
        # A learner's log is emptied before its old state is: both are older than the snapshot then, and whole.
        from_snapshot = not end and mark.last <= row.base_seq
        if end < mark.last and not from_snapshot:
            raise DiskError(
                f"the log {self._log.path} ends at {end} of shard {shard}, before the "
                f"state, which has it up to {mark.last}: it is an older copy; put the right one back"
            )
        _check_start(self._log, shard, mark)

    async def _listen(self) -> None:
        id, driver, subjects = self._options.id, self._driver, self._subjects
        await self._bus.answer_to(driver.offer)
        await driver.listen("node", subjects.node_inbox(id))
        await driver.listen("heartbeat", subjects.any_heartbeat)
        await driver.listen("map", subjects.map_event)
        await driver.listen("suspect", subjects.any_suspect)
        await self._bus.flush()

    async def _serve(self, stop: asyncio.Event) -> int:
        self._machine.start(self._clock.now_ns())
        self._driver.wake()
        await self._service().start()
        turns = asyncio.create_task(self._driver.run())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([turns, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if turns.done():
            halt = turns.result()
            if halt.exit_code:
                raise ProcessError(halt.message)
            return halt.exit_code
        await self._leave()
        turns.cancel()
        return 0

    async def _leave(self) -> None:
        """Take no new requests, finish those that came in, say goodbye."""
        log.info("stopping: draining requests")
        await self._driver.drain(("verb", "shard", "read"), DRAIN_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                await self._driver.until(lambda: not self._machine.is_busy)
        self._machine.leave(self._clock.now_ns())
        self._driver.wake()
        with contextlib.suppress(BusError, TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                await self._driver.until(lambda: self._driver.is_idle)
            await self._bus.flush()

    def _service(self) -> Service:
        options, subjects = self._options, self._subjects
        info = ServiceInfo(
            name="bus_kv-node",
            id=f"{options.id}-{self._machine.config.run[1]}",
            version=bus_kv.__version__,
            description=f"bus_kv node {options.id}: a key-value database on this bus",
            metadata={
                "node": options.id, "root": subjects.root,
                "value_bytes_max": str(self._machine.sizes.value),
            },
            subjects={verb: subjects.verb(verb) for verb in VERBS},
            started_ns=self._clock.now_ns(),
        )  # fmt: skip
        return Service(info, lambda: self._machine.endpoints, self._bus)

    def _on_restored(self) -> None:
        """The connection is back: what was said meanwhile is lost, so read the map and say who we are."""
        self._machine.reconnected(self._clock.now_ns())
        self._driver.wake()

    def _on_disk_failure(self, error: DiskError) -> None:
        self._driver.halt = Halt(1, str(error))
        self._driver.offer(AppendCompleted(0))
