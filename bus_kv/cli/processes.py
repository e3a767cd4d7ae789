"""Child processes that log to a file, are stopped in order, and never outlive their parent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

import bus_kv
from bus_kv.cli import guard

if TYPE_CHECKING:
    from collections.abc import Mapping

_STOP_DEADLINE_S = 15.0
"""Longer than a node takes to finish the requests it has."""
_LOG_TAIL_BYTES = 4096


def module_argv(module: str, *arguments: str) -> list[str]:
    """How to run one of our programs; -P keeps a user's folder of the same name out of the way."""
    return [sys.executable, "-P", "-m", module, *arguments]


def module_env() -> dict[str, str]:
    """Variables with which it is found also when bus_kv runs from a checkout, not installed."""
    checkout = str(Path(bus_kv.__file__).resolve().parents[1])
    others = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([checkout, others] if others else [checkout])}


class Guard:
    """A process that kills our children when we end without having stopped them."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._pipe = -1

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        read_end, self._pipe = os.pipe()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", guard.__file__,
                stdin=read_end, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(read_end)

    def watch(self, pid: int) -> None:
        self._tell(f"+{pid}\n")

    def forget(self, pid: int) -> None:
        """To be called as soon as a child has ended: its number may be given to somebody else."""
        self._tell(f"-{pid}\n")

    def _tell(self, line: str) -> None:
        # Short writes to a pipe are whole; without a guard there is nobody to tell.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._pipe, line.encode())

    async def stop(self) -> None:
        """Let it go; it kills what it still watches."""
        if self._process is None:
            return
        os.close(self._pipe)
        async with asyncio.timeout(_STOP_DEADLINE_S):
            await self._process.wait()
        self._process = None


class Child:
    """One process under a guard. It can be started again after its end."""

    def __init__(
        self, name: str, argv: list[str], env: Mapping[str, str], log_path: Path, guard: Guard
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._argv, self._env, self._guard = argv, {**os.environ, **env}, guard
        self._process: asyncio.subprocess.Process | None = None
        self._log_start_bytes = 0

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} was never started"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        assert not self.is_running
        log = os.open(self.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            self._log_start_bytes = os.fstat(log).st_size
            self._process = await asyncio.create_subprocess_exec(
                *self._argv, env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                # Ctrl-C is for the parent, who stops its children in order.
                start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(log)
        self._guard.watch(self._process.pid)

    async def stop(self) -> None:
        """End it in order, by force after 15 s."""
        if not self.is_running:
            return
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(_STOP_DEADLINE_S):
                await self._ended()
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """End it as a crash would (SIGKILL)."""
        if self.is_running:
            self.signal(signal.SIGKILL)
            async with asyncio.timeout(_STOP_DEADLINE_S):
                await self._ended()

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def _ended(self) -> None:
        assert self._process is not None
        await self._process.wait()
        self._guard.forget(self._process.pid)

    def obituary(self) -> str | None:
        """Why it ended, with the last line of its log; None while it runs."""
        if self._process is None or self._process.returncode is None:
            return None
        self._guard.forget(self._process.pid)
        code = self._process.returncode
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        last = self._last_line()
        return f"{self.name} ended with {how}{f': {last}' if last else ''} (log: {self.log_path})"

    def _last_line(self) -> str:
        """What it said before it ended: its own complaint if there is one."""
        with self.log_path.open("rb") as log:
            size_bytes = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start_bytes, size_bytes - _LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        complaints = [line for line in lines if line.startswith("bus-kv: ")]
        return (complaints or lines or [""])[-1].removeprefix("bus-kv: ")
