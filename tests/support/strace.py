"""What a process does to its log and to the bus, as the kernel sees it."""

from __future__ import annotations

import asyncio
import re
import shutil
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import cbor2
import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

DEADLINE_S = 10.0
_CALLS = "pwrite64,fdatasync,write,writev,sendto,sendmsg"
_STRING_BYTES_MAX = 1 << 16
_LINE = re.compile(r"(\d+) +(\d+\.\d+) (?:<\.\.\. )?(\w+)(.*)")
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_TOOK = re.compile(r"<(\d+\.\d+)>$")
_PUBLISHED = re.compile(rb"(?<!H)PUB (\S+) (?:\S* )?(\d+)\r\n")


@dataclass
class Trace:
    """Moments in seconds of the system's clock, in order."""

    appends: list[tuple[float, bytes]] = field(default_factory=list)
    """(begin, bytes) of every write to the log's WAL."""
    syncs: list[tuple[float, float]] = field(default_factory=list)
    """(begin, end) of every fdatasync of it that succeeded."""
    messages: list[tuple[float, str, bytes]] = field(default_factory=list)
    """(begin of the write to the socket, subject, body) of every message."""

    def append_of(self, value: bytes) -> float:
        """When the entry with this value was first written."""
        return next(at for at, written in self.appends if value in written)

    def durable_at(self, value: bytes) -> float:
        """When the first fdatasync ended that began after the entry was written."""
        append = self.append_of(value)
        ends = [end for begin, end in self.syncs if begin >= append]
        assert ends, f"{value!r} was written and never fsynced"
        return min(ends)

    def matched_at(self, seq: int) -> float:
        """When it first told its primary that its log matches so far."""
        return next(at for at, match in self._matches() if match >= seq)

    def _matches(self) -> list[tuple[float, int]]:
        told = [
            (at, cbor2.loads(body)) for at, subject, body in self.messages if ".node." in subject
        ]
        return [
            (at, item["match"])
            for at, fields in told
            for item in _items(fields)
            if item.get("type") == "matched"
        ]

    def answered_at(self, after: float) -> float:
        """When the first answer to a request left after this moment."""
        return next(at for at, to, _ in self.messages if at >= after and to.startswith("_INBOX."))


def _items(fields: dict[str, Any]) -> list[dict[str, Any]]:
    packed = [cbor2.loads(i) if isinstance(i, bytes) else i for i in fields.get("items", ())]
    return packed or [fields]


@asynccontextmanager
async def traced(pid: int, path: Path) -> AsyncIterator[Trace]:
    """Trace a process meanwhile; the trace is filled at the end. Skips the test where that is impossible."""
    program = shutil.which("strace")
    if program is None:
        pytest.skip("needs strace")
    tracer = await asyncio.create_subprocess_exec(
        *(program, "-f", "-y", "-ttt", "-T", "-xx", "-s", str(_STRING_BYTES_MAX)),
        *("-e", f"trace={_CALLS}", "-o", str(path), "-p", str(pid)),
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert tracer.stderr is not None
    async with asyncio.timeout(DEADLINE_S):
        said = (await tracer.stderr.readline()).decode()
    if "attached" not in said:
        pytest.skip(f"strace may not trace: {said.strip()}")
    trace = Trace()
    try:
        yield trace
    finally:
        tracer.terminate()
        async with asyncio.timeout(DEADLINE_S):
            await tracer.communicate()
    _read(path, trace)


def _read(path: Path, trace: Trace) -> None:
    begun: dict[str, float] = {}
    """Thread -> when it began the fdatasync that it is in."""
    for line in path.read_text().splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        thread, at, call, rest = match[1], float(match[2]), match[3], match[4]
        if call == "fdatasync":
            _read_sync(trace, begun, thread, at, rest)
        elif "resumed>" in rest:
            continue  # its bytes stand where it began
        elif call == "pwrite64":
            if _is_wal(rest):
                trace.appends.append((at, _bytes(rest)))
        else:
            trace.messages += [(at, *message) for message in _messages(_bytes(rest))]


def _read_sync(trace: Trace, begun: dict[str, float], thread: str, at: float, rest: str) -> None:
    took = _TOOK.search(rest)
    if "unfinished" in rest:
        if _is_wal(rest):
            begun[thread] = at
    elif "resumed>" in rest:
        if thread in begun and "= 0" in rest:
            trace.syncs.append((begun.pop(thread), at))
    elif _is_wal(rest) and "= 0" in rest and took is not None:
        trace.syncs.append((at, at + float(took[1])))


def _is_wal(rest: str) -> bool:
    """With -xx the path after the descriptor is in hex, too."""
    name = re.search(r"\(\d+<([^>]*)>", rest)
    return name is not None and _unhex(name[1]).endswith(b"log.sqlite-wal")


def _unhex(text: str) -> bytes:
    if "\\x" not in text:
        return text.encode()
    return bytes.fromhex(text.replace("\\x", ""))


def _bytes(rest: str) -> bytes:
    """What is in the line's strings: one, or the pieces of a gathering write."""
    return b"".join(_unhex(text) for text in _STRING.findall(rest))


def _messages(sent: bytes) -> list[tuple[str, bytes]]:
    """The messages in what was written to the bus, those without headers."""
    found = []
    for match in _PUBLISHED.finditer(sent):
        body = sent[match.end() : match.end() + int(match[2])]
        found.append((match[1].decode(), body))
    return found
