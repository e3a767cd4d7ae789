"""CPU time of processes and their threads, as Linux tells it in /proc."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")

LOOP, LOG, STATE, OTHER = "event loop", "log", "state", "other"


def is_available() -> bool:
    return (_PROC / "self" / "task").is_dir()


def cpu_s(pid: int) -> float:
    """What the process has used so far, ended threads included. Raises OSError when it is gone."""
    return _read(_PROC / str(pid) / "stat")[1]


def cpu_by_thread_s(pid: int) -> dict[str, float]:
    """The same of its living threads, by kind: the main one runs the event loop, others have names (`NamedThread`).

    Raises OSError when the process is gone.
    """
    used_s = {LOOP: 0.0}
    for task in (_PROC / str(pid) / "task").iterdir():
        # A thread may end between being listed and being read.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            name, seconds = _read(task / "stat")
            kind = LOOP if task.name == str(pid) else _kind(name)
            used_s[kind] = used_s.get(kind, 0.0) + seconds
    return {kind: used_s[kind] for kind in (LOOP, LOG, STATE, OTHER) if kind in used_s}


def _kind(name: str) -> str:
    return next((kind for kind in (LOG, STATE) if name.startswith(kind)), OTHER)


def _read(stat: Path) -> tuple[str, float]:
    """Name, and user and system time (proc(5): the fields follow the name, which is in parentheses)."""
    head, _, tail = stat.read_text().rpartition(")")
    fields = tail.split()
    return head.partition("(")[2], (int(fields[11]) + int(fields[12])) * _TICK_S
