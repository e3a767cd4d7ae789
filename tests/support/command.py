"""The command line as a user runs it: a process, what it says, its exit code."""

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
DEADLINE_S = 60.0
_POLL_INTERVAL_S = 0.02


@dataclass(frozen=True, slots=True)
class Ran:
    code: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode()

    def document(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours, without what would reach another cluster."""
    clean = {name: text for name, text in os.environ.items() if not name.startswith("BUS_KV_")}
    return {**clean, "PYTHONPATH": str(REPOSITORY), **(changes or {})}


async def start_module(
    module: str, *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        env=environment(env),
        cwd=cwd,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def run_module(
    module: str,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    cwd: Path | None = None,
) -> Ran:
    process = await start_module(module, *arguments, env=env, cwd=cwd)
    async with asyncio.timeout(DEADLINE_S):
        out, err = await process.communicate(stdin)
    assert process.returncode is not None
    ran = Ran(process.returncode, out, err.decode())
    assert "Traceback" not in ran.err, ran.err
    return ran


async def until_gone(pid: int) -> None:
    """Return when the process has ended, be it that nobody has asked for its exit code yet."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if not _is_running(pid):
                return
            await asyncio.sleep(_POLL_INTERVAL_S)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat").read_text()
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        # No /proc on this system, or gone just now.
        return not Path("/proc/self").exists()
    return status.rpartition(")")[2].split()[0] != "Z"
