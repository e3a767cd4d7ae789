"""The least that a request and a commit can cost here, measured beside the real thing."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
from typing import TYPE_CHECKING, Any

from bus_kv.cli.measure import Result, Timing, run_callers
from bus_kv.cli.processes import Child, Guard, module_argv, module_env
from bus_kv.runtime.nats_bus import NatsBus

if TYPE_CHECKING:
    from pathlib import Path

    from bus_kv.core.machine import Responded
    from bus_kv.runtime.connection import ConnectOptions

_READY_DEADLINE_S = 10.0
_READY_POLL_INTERVAL_S = 0.02


class FloorError(Exception):
    """A floor could not be measured; the message says why."""


class _Caller:
    """Requests over the same client library that bus_kv uses, one message each."""

    def __init__(self, bus: NatsBus, subject: str) -> None:
        self._bus, self._subject = bus, subject
        self._waiting: dict[int, asyncio.Future[bytes | None]] = {}
        self._correlation = 0

    def on_response(self, response: Responded) -> None:
        future = self._waiting.pop(response.correlation, None)
        if future is not None and not future.done():
            future.set_result(response.body)

    async def __call__(self, body: bytes) -> bytes | None:
        """The answer; None when nobody listens."""
        self._correlation += 1
        future = asyncio.get_running_loop().create_future()
        self._waiting[self._correlation] = future
        reply = self._bus.reply_subject(self._correlation)
        await self._bus.publish(self._subject, body, reply=reply)
        answer: bytes | None = await future
        return answer


async def measure_echo(
    options: ConnectOptions, folder: Path, body_bytes: int, callers: list[int], timing: Timing
) -> list[Result]:
    """Echo requests of this size through NATS, to another process, for each number of callers.

    Raises FloorError, BusUnreachable.
    """
    subject = f"{options.inbox_prefix}.{secrets.token_hex(8)}"
    argv = module_argv("bus_kv.cli.echo", "--subject", subject, *options.argv())
    bus = NatsBus(options)
    async with Guard() as guard:
        responder = Child("echo", argv, module_env() | options.env(), folder / "echo.log", guard)
        await responder.start()
        try:
            await bus.open()
            return await _measure_echo(bus, responder, subject, b"e" * body_bytes, callers, timing)
        finally:
            await responder.stop()
            await bus.close()


async def _measure_echo(
    bus: NatsBus, responder: Child, subject: str, body: bytes, callers: list[int], timing: Timing
) -> list[Result]:
    caller = _Caller(bus, subject)
    await bus.answer_to(caller.on_response)
    try:
        async with asyncio.timeout(_READY_DEADLINE_S):
            await _until_it_listens(caller, body)
        deadline_s = timing.warmup_s + timing.seconds + _READY_DEADLINE_S
        async with asyncio.timeout(deadline_s * len(callers)):
            return [await run_callers(caller, [body], callers=n, timing=timing) for n in callers]
    except TimeoutError:
        reason = responder.obituary() or "it does not answer"
        raise FloorError(f"the echo could not be measured: {reason}") from None


async def _until_it_listens(caller: _Caller, body: bytes) -> None:
    while True:
        if await caller(body) is not None:
            return
        await asyncio.sleep(_READY_POLL_INTERVAL_S)


async def measure_log(
    folder: Path, key_bytes: int, value_bytes: int, entry_operations: list[int], timing: Timing
) -> list[dict[str, Any]]:
    """Commits of entries with so many puts each, through the node's own log, in `folder`.

    Returns `Result.to_json()` with `entry_operations`. Raises FloorError.
    """
    argv = module_argv(
        "nodes.log_bench", "--directory", str(folder), "--seconds", str(timing.seconds),
        "--warmup", str(timing.warmup_s), "--key-bytes", str(key_bytes),
        "--value-bytes", str(value_bytes), "--entry-operations", *map(str, entry_operations),
    )  # fmt: skip
    timeout_s = (timing.warmup_s + timing.seconds + _READY_DEADLINE_S) * len(entry_operations)
    run = await asyncio.to_thread(_run, argv, timeout_s)
    floors: list[dict[str, Any]] = json.loads(run)
    return floors


def _run(argv: list[str], timeout_s: float) -> str:
    try:
        done = subprocess.run(
            argv, env=os.environ | module_env(), capture_output=True, text=True, check=False,
            timeout=timeout_s,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise FloorError(f"the log could not be measured in {timeout_s:.0f} s") from None
    if done.returncode:
        raise FloorError(f"the log could not be measured: {done.stderr.strip()}")
    return done.stdout
