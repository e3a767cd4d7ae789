"""nats-server processes for development clusters, measurements and tests: their configuration and their life."""

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
from pathlib import Path
from typing import Any, Self

from bus_kv.runtime.nats_program import (
    NatsServerError,
    NatsServerMissing,
    Version,
    find_nats_cli,
    find_nats_server,
    get_nats_server,
    server_version,
)

__all__ = [
    "DEFAULT_PORT",
    "SYNC_ALWAYS_VERSION_MIN",
    "NatsCluster",
    "NatsServer",
    "NatsServerError",
    "NatsServerMissing",
    "Version",
    "find_nats_cli",
    "find_nats_server",
    "get_nats_server",
    "next_free_port",
    "read_info",
    "server_version",
    "write_config",
]

SYNC_ALWAYS_VERSION_MIN = (2, 10, 0)
"""Older servers refuse the option and write to disk once a minute."""

DEFAULT_PORT = 4222
_HOST = "127.0.0.1"
_PORTS_TRIED_MAX = 100
_PORT_END = 65_536
_LOG_LINES_MAX = 5
_INFO_BYTES_MAX = 1 << 20

_START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 10.0
_POLL_INTERVAL_S = 0.02


def write_config(
    version: Version, *, port: int, store_dir: Path, host: str = _HOST, extra: str = "",
    sync_always: bool = True,
) -> str:  # fmt: skip
    """The configuration of a development server of this version; nats.conf tells the reasons.

    `port` -1 lets the server choose. `extra` is appended as it is. Without `sync_always`, and in
    servers too old for it, JetStream acknowledges what is not on disk yet.
    """
    always = sync_always and version >= SYNC_ALWAYS_VERSION_MIN
    sync = "sync_interval: always" if always else ""
    return f"""\
host: {json.dumps(host)}
port: {port}
max_payload: 1MB
max_pending: 64MB
max_control_line: 4KB
write_deadline: "10s"
ping_interval: "5s"
ping_max: 2
jetstream {{
  store_dir: {json.dumps(str(store_dir), ensure_ascii=False)}
  {sync}
}}
{extra}
"""


def next_free_port(first: int = DEFAULT_PORT, host: str = _HOST) -> int:
    """The first port from `first` on that nobody listens on. Raises NatsServerError."""
    end = min(first + _PORTS_TRIED_MAX, _PORT_END)
    for port in range(first, end):
        with socket.socket() as probe:
            # As the server does, so that a port it has just left counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise NatsServerError(f"no free port on {host} from {first} on: name another")


async def read_info(host: str, port: int) -> dict[str, Any]:
    """The INFO with which a NATS server greets. Raises OSError if no NATS server answers there.

    The caller sets the deadline.
    """
    reader, writer = await asyncio.open_connection(host, port, limit=_INFO_BYTES_MAX)
    try:
        line = await reader.readline()
    finally:
        writer.close()
    if not line.startswith(b"INFO "):
        raise ConnectionError(f"{host}:{port} is no NATS server")
    info: dict[str, Any] = json.loads(line[len(b"INFO ") :])
    return info


class NatsServer:
    """One nats-server process with JetStream; port and data stay the same through a restart.

    Its configuration, log and data are in `folder`. Without `port` the first start takes a free
    one. `extra` is added to the configuration and `sync_always` goes into it (`write_config`);
    `config` is a file used instead of it, whose relative paths start at `folder`. Use it as an
    async context manager, or call `start` and `stop`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        binary: Path | None = None,
        host: str = _HOST,
        port: int | None = None,
        extra: str = "",
        sync_always: bool = True,
        config: Path | None = None,
    ) -> None:
        self.folder = folder.absolute()
        self.log_path = self.folder / "nats-server.log"
        self._binary = binary
        self._host = host
        self._port = port
        self._extra = extra
        self._sync_always = sync_always
        self._config = config
        self._process: asyncio.subprocess.Process | None = None
        self.version: Version = (0, 0, 0)
        """Of the program; known once started."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.stop()

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def url(self) -> str:
        """`nats://host:port`, known once started."""
        assert self._port is not None
        return f"nats://{self._host}:{self._port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start it and wait until it accepts clients.

        Raises NatsServerMissing, and NatsServerError with the end of its log if it does not come
        up in 10 s.
        """
        assert self._process is None
        binary = self._binary or find_nats_server()
        if binary is None:
            raise NatsServerMissing
        self.version = await asyncio.to_thread(server_version, binary)
        log_start_bytes = self._prepare()
        self._process = await self._spawn(binary)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                self._port = await self._ready(self._process)
        except (NatsServerError, TimeoutError, OSError):
            await self.kill()
            raise NatsServerError(self._failure(log_start_bytes)) from None
        except BaseException:
            await self.kill()
            raise

    async def stop(self) -> None:
        """End it in order, by force after 10 s. Does nothing when it does not run."""
        if self._process is None:
            return
        if self._process.returncode is None:
            self._process.terminate()
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            await self.kill()
        self._process = None

    async def kill(self) -> None:
        """End it as a crash would (SIGKILL). Does nothing when it does not run."""
        if self._process is None:
            return
        if self._process.returncode is None:
            self._process.kill()
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            await self._process.wait()
        self._process = None

    async def restart(self) -> None:
        """Stop it if it runs, and start it on the same port with the same data."""
        await self.stop()
        await self.start()

    def _prepare(self) -> int:
        """Write what the process needs; the log's length in bytes before it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in self.folder.glob("*.ports"):
                stale.unlink()
            self._config_path.write_text(self._config_text())
            with self.log_path.open("ab") as log:
                return log.tell()
        except OSError as error:
            raise NatsServerError(f"cannot write to {self.folder}: {error.strerror}") from error

    @property
    def _config_path(self) -> Path:
        return self.folder / "nats.conf"

    def _config_text(self) -> str:
        if self._config is not None:
            return self._config.read_text()
        return write_config(
            self.version,
            port=self._port or -1,
            store_dir=self.folder / "jetstream",
            host=self._host,
            extra=self._extra,
            sync_always=self._sync_always,
        )

    def _argv(self, binary: Path) -> list[str]:
        return [
            str(binary.absolute()),
            *("--config", str(self._config_path)),
            *("--addr", self._host, "--port", str(self._port or -1)),
            *("--ports_file_dir", str(self.folder)),
        ]

    async def _spawn(self, binary: Path) -> asyncio.subprocess.Process:
        log = os.open(self.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            return await asyncio.create_subprocess_exec(
                *self._argv(binary),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is for its owner, who stops it last.
                start_new_session=True,
            )
        finally:
            os.close(log)

    async def _ready(self, process: asyncio.subprocess.Process) -> int:
        """The port on which this very process accepts clients."""
        while (port := self._announced_port(process.pid)) is None:
            if process.returncode is not None:
                raise NatsServerError
            await asyncio.sleep(_POLL_INTERVAL_S)
        await read_info(self._host, port)
        return port

    def _announced_port(self, pid: int) -> int | None:
        for path in self.folder.glob(f"*_{pid}.ports"):
            try:
                return int(json.loads(path.read_text())["nats"][0].rpartition(":")[2])
            except json.JSONDecodeError:
                return None  # Still being written.
        return None

    def _failure(self, log_start_bytes: int) -> str:
        with self.log_path.open("rb") as log:
            log.seek(log_start_bytes)
            lines = log.read().decode(errors="replace").splitlines()
        complaints = [line for line in lines if "[INF]" not in line] or lines
        reason = "; ".join(
            re.sub(r"^\[\d+\] \S+ \S+ (\[\w+\] )?", "", line).strip(" ;")
            for line in complaints[-_LOG_LINES_MAX:]
        )
        return f"nats-server did not start: {reason or 'it wrote no log'} (log: {self.log_path})"


class NatsCluster:
    """Servers of this machine that replicate JetStream among themselves, each as `NatsServer` has it."""

    def __init__(self, folder: Path, *, size: int = 3, sync_always: bool = True) -> None:
        ports = _free_ports(size)
        routes = [f"nats://{_HOST}:{port}" for port in ports]
        self.servers = [
            NatsServer(
                folder / f"nats-{i}", extra=_route_config(f"nats-{i}", port, routes),
                sync_always=sync_always,
            )
            for i, port in enumerate(ports, 1)
        ]  # fmt: skip

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.stop()

    @property
    def urls(self) -> tuple[str, ...]:
        """Of all servers, known once started."""
        return tuple(server.url for server in self.servers)

    @property
    def version(self) -> Version:
        """Of the program, known once started."""
        return self.servers[0].version

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by server name."""
        return {server.name: server.pid for server in self.servers}

    async def start(self) -> None:
        """Start all and wait until they accept clients; JetStream elects its leader after that.

        Raises as `NatsServer.start`.
        """
        try:
            for server in self.servers:
                await server.start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        await asyncio.gather(*(server.stop() for server in self.servers))


def _free_ports(count: int) -> list[int]:
    """Ports for routes, which every server has to know before any of them runs."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((_HOST, 0))
        return [probe.getsockname()[1] for probe in probes]


def _route_config(name: str, port: int, routes: list[str]) -> str:
    return f"""\
server_name: {name}
cluster {{
  name: bus_kv
  listen: "{_HOST}:{port}"
  routes: {json.dumps(routes)}
}}
"""
