"""A whole cluster as processes of this machine: for `up`, `bench`, the demo and the tests."""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
from typing import TYPE_CHECKING, Any, Self

from bus_kv.cli.processes import Child, Guard, module_argv, module_env
from bus_kv.client.client import Client
from bus_kv.errors import BusKVError
from bus_kv.knobs import Knobs
from bus_kv.runtime.connection import ConnectOptions
from bus_kv.runtime.nats_bus import BusError, NatsBus
from bus_kv.runtime.nats_server import NatsServer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

COORDINATOR = "c1"
HEALTHY_DEADLINE_S = 30.0
_NATS_DEADLINE_S = 3.0
_POLL_INTERVAL_S = 0.05
_HEALTH_TIMEOUT_S = 0.5
_LOCK_NAME = "LOCK"


class ClusterError(Exception):
    """The cluster cannot be started; the message is one line saying why."""


class LocalCluster:
    """A nats-server, coordinator c1 and nodes n1, n2, … as child processes.

    Everything they keep and log is in `folder`, which is locked meanwhile; another cluster started
    there later finds the data again. With `connection` the NATS servers that it names are used
    instead of an own one on `port` (None: any free port). `knobs` are settings of bus_kv/knobs.py
    for every process. Use it as an async context manager, or call `start` and `stop`. The children
    end with this process, even if it is killed.
    """

    def __init__(
        self, folder: Path, *, nodes: int = 3, connection: ConnectOptions | None = None,
        root: str = "bkv", port: int | None = None, knobs: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        self.folder = folder.absolute()
        self.node_ids = [f"n{i}" for i in range(1, nodes + 1)]
        self.children: dict[str, Child] = {}
        self._root, self._knobs = root, knobs or {}
        self._connection = connection
        self._nats = None if connection else NatsServer(self.folder / "nats", port=port)
        self._guard = Guard()
        self._lock = -1

    @property
    def connection(self) -> ConnectOptions:
        """How to reach it; known once started."""
        if self._connection is None:
            assert self._nats is not None
            return ConnectOptions(servers=(self._nats.url,), root=self._root)
        return self._connection

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start all processes; `wait_healthy` tells when they serve.

        Raises ClusterError, NatsServerError (no nats-server, or it does not start), and
        BusUnreachable or CredentialsRefused when the given NATS cannot be used.
        """
        self._lock = _lock(self.folder)
        try:
            await self._guard.start()
            await self._start_nats()
            for id in (COORDINATOR, *self.node_ids):
                self.children[id] = self._child(id)
                await self.children[id].start()
        except BaseException:
            await self.stop()
            raise

    async def _start_nats(self) -> None:
        if self._nats is not None:
            await self._nats.start()
            self._guard.watch(self._nats.pid)
            return
        bus = NatsBus(self.connection)
        await bus.open(_NATS_DEADLINE_S)
        await bus.close()

    def _child(self, id: str) -> Child:
        settings = [f"--knob={name}={value}" for name, value in self._knobs.items()]
        arguments = ["--id", id, *self.connection.argv(), *settings]
        if id in self.node_ids:
            argv = module_argv("nodes", *arguments, "--data", str(self.folder / id))
        else:
            argv = module_argv("coordinator", *arguments)
        env = module_env() | self.connection.env()
        return Child(id, argv, env, self.folder / f"{id}.log", self._guard)

    async def stop(self) -> None:
        """Stop nodes, coordinator and nats-server, in this order."""
        children = [*self.children.values()]
        await asyncio.gather(*(c.stop() for c in children if c.name != COORDINATOR))
        await asyncio.gather(*(c.stop() for c in children if c.name == COORDINATOR))
        if self._nats is not None:
            await self._nats.stop()
        await self._guard.stop()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    async def kill(self, id: str) -> None:
        """End one process as a crash would (SIGKILL)."""
        await self.children[id].kill()

    async def restart(self, id: str) -> None:
        """Start a process that has ended, with the data it left."""
        await self.children[id].start()

    # ---- how it is ----

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name: c1, n1, …, and nats-server if it is ours."""
        pids = {name: child.pid for name, child in self.children.items()}
        return pids if self._nats is None else {"nats-server": self._nats.pid, **pids}

    async def wait_healthy(self, deadline_s: float = HEALTHY_DEADLINE_S) -> dict[str, Any]:
        """Return the health reply in which every shard is served and every node has joined.

        Raises ClusterError with the reasons when that has not come within `deadline_s`, or as soon
        as no node runs.
        """
        health: dict[str, Any] = {"reasons": ["no node has answered"]}
        db = Client(self.connection, Knobs(), secrets.token_hex(8))
        try:
            async with asyncio.timeout(deadline_s):
                await db.open()
                while not self._is_whole(health):
                    self._check_running()
                    health = await _health(db) or health
                    await asyncio.sleep(_POLL_INTERVAL_S)
        except TimeoutError:
            reasons = health["reasons"] or [f"only {health['nodes']} nodes have joined"]
            reason = "; ".join([*reasons, *self.obituaries().values()])
            raise ClusterError(f"not healthy after {deadline_s:.0f} s: {reason}") from None
        except BusError as error:
            raise ClusterError(str(error)) from None
        finally:
            await db.close()
        return health

    def _is_whole(self, health: dict[str, Any]) -> bool:
        return health.get("status") == "ok" and health["nodes"] >= len(self.node_ids)

    def _check_running(self) -> None:
        if not any(self.children[id].is_running for id in self.node_ids):
            raise ClusterError("; ".join(self.obituaries().values()))

    def obituaries(self) -> dict[str, str]:
        """Why the processes that have ended did so, by name."""
        all = {name: child.obituary() for name, child in self.children.items()}
        ended = {name: text for name, text in all.items() if text is not None}
        if self._nats is not None and not _exists(self._nats.pid):
            self._guard.forget(self._nats.pid)
            ended["nats-server"] = f"nats-server ended (log: {self._nats.log_path})"
        return ended

    async def watch(self, tell: Callable[[str], object]) -> None:
        """Tell of every process that ends, once, until cancelled."""
        told: dict[str, None] = {}
        while True:
            for name, text in self.obituaries().items():
                if name not in told:
                    told[name] = None
                    tell(text)
            await asyncio.sleep(_POLL_INTERVAL_S * 4)


async def _health(db: Client) -> dict[str, Any] | None:
    try:
        async with asyncio.timeout(_HEALTH_TIMEOUT_S):
            return await db.health()
    except (BusKVError, TimeoutError):
        return None


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _lock(folder: Path) -> int:
    """Take the folder for this process; the lock goes with it. Raises ClusterError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ClusterError(f"data directory {folder} cannot be written: {reason}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise ClusterError(
            f"data directory {folder} is in use by another cluster: "
            "stop that, or name another --data"
        ) from None
    return handle
