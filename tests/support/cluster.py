"""A cluster of real processes on a real bus, and a client that speaks nothing but the bytes of the contract."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import cbor2
import nats
from nats.errors import NoRespondersError
from nats.errors import TimeoutError as NatsTimeoutError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from nats.aio.client import Client as NatsClient

REPOSITORY = Path(__file__).resolve().parents[2]
KNOBS = {"heartbeat_interval_s": 0.5, "layout_wait_s": 0.2, "lease_s": 1, "step_retry_ms": 200}
"""Shorter waits than the defaults, so that whole stories take seconds."""
START_S = 20.0
POLL_S = 0.02


@dataclass(frozen=True)
class Reply:
    """What came back: the bytes, the headers, and the body decoded in the codec of the request."""

    body: bytes
    headers: Mapping[str, str]
    fields: dict[str, Any]

    @property
    def code(self) -> str | None:
        """The failure's code; None for a success."""
        return self.fields.get("code")

    @property
    def message(self) -> str:
        text: str = self.fields["message"]
        return text


def assert_failure(
    reply: Reply, code: str, status: int, *, retry: bool = False, says: str = ""
) -> None:
    """The body and both headers of ADR-32 tell the same failure."""
    assert reply.code == code, reply.fields
    assert reply.fields["retry"] is retry
    assert says in reply.message
    assert reply.headers["Nats-Service-Error-Code"] == str(status)
    assert reply.headers["Nats-Service-Error"].startswith(code)


_numbers = itertools.count(1)


def unique(prefix: str) -> str:
    """A name that no other test has."""
    return f"{prefix}-{next(_numbers)}"


async def until(condition: Callable[[], Awaitable[bool]], deadline_s: float = 15.0) -> None:
    """Return when the condition holds. Raises TimeoutError."""
    async with asyncio.timeout(deadline_s):
        while True:
            if await condition():
                return
            await asyncio.sleep(POLL_S)


def encode(fields: Mapping[str, Any], codec: str) -> bytes:
    """A request body in `json` or `cbor`, made by the codecs' own libraries."""
    if codec == "cbor":
        return cbor2.dumps(dict(fields))
    return json.dumps(fields, ensure_ascii=False).encode()


def decode(body: bytes) -> dict[str, Any]:
    """A reply body; its first byte tells the codec."""
    fields: dict[str, Any] = json.loads(body) if body[:1] == b"{" else cbor2.loads(body)
    return fields


class Bus:
    """A plain NATS client."""

    def __init__(self, client: NatsClient, root: str) -> None:
        self.client, self.root = client, root

    @classmethod
    async def open(cls, url: str, root: str) -> Self:
        async def ignore(_: Exception) -> None:
            """What a server that is being killed makes nats-py say."""

        client = await nats.connect(
            url, error_cb=ignore, max_reconnect_attempts=-1, reconnect_time_wait=0.1
        )
        return cls(client, root)

    async def ask_raw(self, subject: str, body: bytes, timeout_s: float = 5.0) -> Reply:
        """Send bytes to a subject below the root. Raises nats' TimeoutError and NoRespondersError."""
        message = await self.client.request(f"{self.root}.{subject}", body, timeout_s)
        return Reply(message.data, message.headers or {}, decode(message.data))

    async def ask(
        self, subject: str, *, codec: str = "json", timeout_s: float = 5.0, **fields: Any
    ) -> Reply:
        """Send fields to a subject below the root; a field called `start` or `end` and the like travels as given."""
        return await self.ask_raw(subject, encode(fields, codec), timeout_s)

    async def ok(self, subject: str, *, codec: str = "json", **fields: Any) -> dict[str, Any]:
        """The same for a request that must succeed: the reply's fields."""
        reply = await self.ask(subject, codec=codec, **fields)
        assert reply.code is None, reply.fields
        return reply.fields

    async def close(self) -> None:
        await self.client.close()


class Cluster:
    """Processes under one root. Logs, data and sockets live in `folder`; nothing outlives `close`."""

    def __init__(
        self, url: str, root: str, folder: Path, knobs: Mapping[str, float] | None = None
    ) -> None:
        self.url, self.root, self.folder = url, root, folder
        self.bus: Bus
        self._knobs = {**KNOBS, **(knobs or {})}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._arguments: dict[str, list[str]] = {}
        self._logs_read: dict[str, int] = {}

    async def open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.bus = await Bus.open(self.url, self.root)

    # ---- processes ----

    def start_coordinator(self, id: str = "c1", *options: str) -> None:
        self.spawn(id, "coordinator", "--id", id, *options)

    def start_node(self, id: str, *options: str, data: Path | None = None) -> None:
        self.spawn(id, "nodes", "--id", id, "--data", str(data or self.data(id)), *options)

    def spawn(self, name: str, module: str, *options: str) -> None:
        """Start a process known as `name`; later options win over the cluster's own."""
        knobs = [f"--knob={knob}={value}" for knob, value in self._knobs.items()]
        common = [f"--nats={self.url}", f"--root={self.root}", *knobs]
        self._arguments[name] = [sys.executable, f"-m{module}", *common, *options]
        self._start(name)

    def _start(self, name: str) -> None:
        log_path = self._log_path(name)
        self._logs_read[name] = log_path.stat().st_size if log_path.exists() else 0
        with log_path.open("ab") as log:
            self._processes[name] = subprocess.Popen(
                self._arguments[name], cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, env={**os.environ, "PYTHONUNBUFFERED": "1"}, start_new_session=True,
            )  # fmt: skip

    def data(self, node: str) -> Path:
        """The node's data directory, unless another was given."""
        return self.folder / "data" / node

    def _log_path(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def log(self, name: str) -> str:
        """What a process has written since its last start."""
        return self._log_path(name).read_bytes()[self._logs_read[name] :].decode()

    def is_running(self, name: str) -> bool:
        return self._processes[name].poll() is None

    def has_handlers(self, name: str) -> bool:
        """Whether the process has come so far that SIGTERM means an orderly end to it."""
        status = Path(f"/proc/{self._processes[name].pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def exited(self) -> list[str]:
        return [name for name in self._processes if not self.is_running(name)]

    def kill(self, name: str) -> None:
        """SIGKILL, and wait for the end."""
        self._processes[name].kill()
        self._processes[name].wait(10)

    async def lose(self, node: str) -> None:
        """SIGKILL, and wait until NATS knows: for some moments it still sends requests to who is dead."""
        self.kill(node)

        async def is_known() -> bool:
            try:
                await self.bus.client.request(f"{self.root}.node.{node}.inbox", timeout=0.2)
            except NoRespondersError:
                return True
            except NatsTimeoutError:
                pass
            return False

        await until(is_known)

    def pause(self, name: str) -> None:
        self._processes[name].send_signal(signal.SIGSTOP)

    def resume(self, name: str) -> None:
        self._processes[name].send_signal(signal.SIGCONT)

    def restart(self, name: str) -> None:
        """Start it again with the same arguments, killing it if it runs."""
        self.kill(name)
        self._start(name)

    def terminate(self, name: str) -> None:
        """SIGTERM, and wait for nothing."""
        self._processes[name].terminate()

    async def stop(self, name: str, deadline_s: float = 15.0) -> tuple[int, str]:
        """SIGTERM; the exit code and what was written."""
        self.terminate(name)
        return await self.wait_exit(name, deadline_s)

    async def wait_exit(self, name: str, deadline_s: float = 15.0) -> tuple[int, str]:
        """The exit code, and what was written since the start."""

        async def has_ended() -> bool:
            return not self.is_running(name)

        await until(has_ended, deadline_s)
        return self._processes[name].returncode, self.log(name)

    async def close(self) -> None:
        """End everything, and insist that no process has shown a traceback to its user."""
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
        for process in self._processes.values():
            process.wait(10)
        await self.bus.close()
        shown = [n for n in self._processes if "Traceback" in self._log_path(n).read_text()]
        assert not shown, f"a traceback in the log of {shown}: {self._log_path(shown[0])}"

    # ---- what the cluster says ----

    async def wait_healthy(self, *nodes: str, deadline_s: float = START_S) -> None:
        """Return when each of `nodes` (default: those that run) says `ok` about the map that is in force."""
        wanted = set(nodes or [n for n in self._processes if self._is_node(n)])
        agreeing: set[str] = set()
        async with asyncio.timeout(deadline_s):
            while not wanted <= agreeing:
                version = await self._map_version(wanted)
                health = await self._ask_quietly("health")
                if version and health.get("status") == "ok" and health["map_version"] == version:
                    agreeing.add(health["node"])
                elif health:
                    agreeing.discard(health.get("node", ""))
                    await asyncio.sleep(POLL_S)

    def _is_node(self, name: str) -> bool:
        return "-mnodes" in self._arguments[name] and self.is_running(name)

    async def _map_version(self, wanted: set[str]) -> int:
        """The version of a map that has all these nodes up; 0 when it has not."""
        map = await self._ask_quietly("map")
        up = {node["id"] for node in map.get("nodes", ()) if node["state"] == "up"}
        return map["map_version"] if wanted <= up else 0

    async def _ask_quietly(self, verb: str) -> dict[str, Any]:
        try:
            return (await self.bus.ask(verb, timeout_s=1.0)).fields
        except (NoRespondersError, TimeoutError):
            await asyncio.sleep(POLL_S)
            return {}

    async def primary(self, shard: str = "s1") -> str:
        return str((await self.shard(shard))["primary"])

    async def shard(self, shard: str = "s1") -> dict[str, Any]:
        """The shard as the public map has it."""
        map = await self.bus.ok("map")
        return next(s for s in map["shards"] if s["id"] == shard)

    async def until_members(self, *nodes: str, deadline_s: float = START_S) -> None:
        """Return when shard s1 is active with these members, in whatever order, and no learner."""

        async def are_members() -> bool:
            shards = (await self._ask_quietly("map")).get("shards", ())
            states = [(s["state"], sorted(s["members"]), s["learners"]) for s in shards]
            return states[:1] == [("active", sorted(nodes), [])]

        await until(are_members, deadline_s)

    async def admin(self, verb: str, **fields: Any) -> dict[str, Any]:
        """Administration that must succeed: the reply's fields."""
        reply = await self.bus.ask(f"admin.{verb}", timeout_s=12, **fields)
        assert reply.code is None, reply.fields
        return reply.fields

    async def until_ok(
        self, subject: str, *, deadline_s: float = START_S, or_code: str = "", **fields: Any
    ) -> Any:
        """Ask again as the failure allows (`retry`), until it succeeds or fails with `or_code`; the reply's fields."""
        end_s = time.monotonic() + deadline_s
        while True:
            try:
                reply = await self.bus.ask(subject, timeout_s=2.0, **fields)
            except (NoRespondersError, TimeoutError):
                assert time.monotonic() < end_s, f"{subject} was not answered"
            else:
                if reply.code in (None, or_code):
                    return reply.fields
                assert reply.fields["retry"], reply.fields
                assert time.monotonic() < end_s, reply.fields
            await asyncio.sleep(POLL_S)


@asynccontextmanager
async def cluster_on(
    url: str, folder: Path, *, nodes: int = 1, root: str | None = None, **knobs: float
) -> AsyncIterator[Cluster]:
    """A healthy cluster of `nodes` nodes n1, n2 … and a coordinator c1, under a root of its own.

    With no nodes nothing is started.
    """
    root = root or f"t{secrets.token_hex(4)}"
    # Laid out when all have come: so the primary of s1 is n1.
    cluster = Cluster(url, root, folder, {"layout_wait_s": 0.2 if nodes < 3 else 10, **knobs})
    await cluster.open()
    try:
        for i in range(nodes):
            cluster.start_node(f"n{i + 1}")
        if nodes:
            cluster.start_coordinator()
            await cluster.wait_healthy()
        yield cluster
    finally:
        await cluster.close()
