"""`bus-kv load`: put the rows of a file, many at a time, and go on there when it was interrupted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import sys
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from bus_kv.cli.command import Call, CommandFailed, ask, command
from bus_kv.cli.data import Consistency, Keyspace
from bus_kv.cli.load_note import Done, Note, identity
from bus_kv.cli.load_rows import BadRow, Chunk, Shape, chunks
from bus_kv.cli.row_files import Format, Place, RowsError, open_rows
from bus_kv.runtime.clock import Clock
from bus_kv.runtime.process import OK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

    from rich.progress import Progress

    from bus_kv.cli.row_files import RowFile
    from bus_kv.client.client import Client

T = TypeVar("T")

CHUNKS_UNDER_WAY_MAX = 8
BAD_ROWS_SHOWN_MAX = 5
_SUFFIXES = {
    ".jsonl": Format.JSONL,
    ".ndjson": Format.JSONL,
    ".csv": Format.CSV,
    ".parquet": Format.PARQUET,
}


def register(app: typer.Typer) -> None:
    command(app, "load")(load)


async def load(
    call: Call,
    file: Annotated[str, typer.Argument(help="'-' reads JSONL from stdin", show_default=False)],
    format: Annotated[
        Format | None, typer.Option(help="what the file is (default: by its suffix)")
    ] = None,
    key_column: Annotated[str, typer.Option(help="column of the keys")] = "key",
    value_column: Annotated[str, typer.Option(help="column of the values")] = "value",
    json_value: Annotated[
        bool, typer.Option("--json-value", help="the value is the whole row as a JSON object")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="leave bad rows out and count them")
    ] = False,
    progress: Annotated[
        Path | None,
        typer.Option(help="where to note how far it is", show_default="FILE.bus_kv-progress"),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="begin with the first row, whatever is noted")
    ] = False,
    keyspace: Keyspace = "default",
    consistency: Consistency = None,
) -> int:
    """Put the rows of a file: JSON lines, CSV with a header line, or Parquet.

    A row has key, value and, when it has a lifetime, ttl_ms; key_b64 and value_b64 take base64. Of
    rows with the same key the last one counts. A bad row ends the command and is named; complete
    chunks before it are written, nothing after them is.

    Loading only puts, so it is idempotent: the same file can be loaded again. How far it is stands
    in a file beside it; when it was interrupted, the same command goes on there.

    - `bus-kv load fruit.jsonl`
    - `bus-kv load people.csv --key-column id --json-value`
    - `bus-kv load events.parquet --key-column id --value-column body --skip-bad`
    - `zcat fruit.jsonl.gz | bus-kv load -`
    """
    kind = format or _format_of(file)
    shape = Shape(key_column, value_column, json_value)
    where = {"keyspace": keyspace, "consistency": consistency and str(consistency)}
    with _opened(file) as stream:
        note = _note(call, file, stream, progress, {"format": str(kind), **vars(shape), **where})
        if restart and note is not None:
            note.remove()
        loading = _Loading(call, stream, kind, shape, skip_bad, note, where)
        try:
            await ask(call.options, loading.run)
        except RowsError as error:
            raise _rows_failure(file, error) from None
        finally:
            loading.tell_how_to_go_on()
    loading.tell_end()
    return OK


# ---- the file ----


def _format_of(file: str) -> Format:
    if file == "-":
        return Format.JSONL
    try:
        return _SUFFIXES[Path(file).suffix.lower()]
    except KeyError:
        raise typer.BadParameter(f"the name of {file} does not tell its --format") from None


@contextlib.contextmanager
def _opened(file: str) -> Iterator[BinaryIO]:
    try:
        stream = open(0, "rb", closefd=False) if file == "-" else open(file, "rb")  # noqa: SIM115
    except OSError as error:
        raise _file_failure(f"cannot read {file}", error) from None
    try:
        yield stream
    finally:
        # A thread may wait in a pipe, and would be waited for.
        if _is_regular(stream):
            stream.close()


def _is_regular(stream: BinaryIO) -> bool:
    return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)


def _note(
    call: Call, file: str, stream: BinaryIO, path: Path | None, settings: dict[str, Any]
) -> Note | None:
    """Where this load notes how far it is; None for a pipe, which cannot be read again."""
    if file == "-" or not _is_regular(stream):
        if path is not None:
            raise typer.BadParameter("--progress is for files; a pipe cannot be read again")
        return None
    target = {"nats": call.options.addresses, "root": call.options.root}
    about = {**identity(stream), **settings, **target}
    return Note(path or Path(f"{file}.bus_kv-progress"), about)


def _rows_failure(file: str, error: RowsError) -> CommandFailed:
    where = "stdin" if file == "-" else file
    if isinstance(error, BadRow):
        hint = "correct it, or leave such rows out with --skip-bad"
        return CommandFailed("BAD_ROW", f"{where}: {error}; {hint}")
    return CommandFailed("FILE", f"{where}: {error}")


def _file_failure(what: str, error: OSError) -> CommandFailed:
    return CommandFailed("FILE", f"{what}: {error.strerror or error}")


# ---- the work ----


@dataclass
class _Loading:
    """One run: chunks are read one after the other and put several at a time."""

    call: Call
    stream: BinaryIO
    kind: Format
    shape: Shape
    skip_bad: bool
    note: Note | None
    where: dict[str, Any]
    done: Done = field(default_factory=Done)
    rows_before: int = 0
    """Rows that earlier runs have loaded."""
    seconds: float = 0.0
    is_finished: bool = False
    _under_way: deque[tuple[asyncio.Task[None], Chunk]] = field(default_factory=deque)

    async def run(self, db: Client) -> None:
        """Raises RowsError, CommandFailed when the note cannot be written, and what put_many raises."""
        shape = replace(self.shape, value_bytes_max=(await db.health())["value_bytes_max"])
        wanted = None if shape.json_value else shape.wanted()
        file = await self._read(lambda: open_rows(self.stream, self.kind, wanted))
        self._tell_unused(shape, file)
        self._resume(file.unit)
        clock = Clock()
        started_ns = clock.now_ns()
        with _bar(self.call, self.stream) as bar, self._note_kept_if_of_use():

            def advance() -> None:
                self.seconds = (clock.now_ns() - started_ns) / 1e9
                _show(bar, self.done.place.offset, self.rows, self.rows_per_s)

            advance()
            parts = chunks(file, shape, self.done.place, skip_bad=self.skip_bad)
            await self._put_all(db, parts, advance)
            self.is_finished = True

    @contextlib.contextmanager
    def _note_kept_if_of_use(self) -> Iterator[None]:
        """The note goes when everything is done, or when nothing is."""
        try:
            yield
        finally:
            if self.note is not None and (self.is_finished or self.done.place == Place()):
                self.note.remove()

    @property
    def rows(self) -> int:
        """Rows that this run has loaded."""
        return self.done.rows - self.rows_before

    @property
    def rows_per_s(self) -> float:
        return self.rows / max(self.seconds, 1e-9)

    def _resume(self, unit: str) -> None:
        if self.note is None:
            return
        try:
            self.done = self.note.read() or self.done
            # Now rather than after the first chunk: a note that cannot be written stops it at once.
            self.note.write(self.done)
        except OSError as error:
            raise _file_failure(
                f"cannot note the progress in {self.note.path}, see --progress", error
            ) from None
        self.rows_before = self.done.rows
        if self.done.place.line:
            self.call.out.note(
                f"going on after {unit} {self.done.place.line:,}, as {self.note.path} says; "
                "--restart begins anew"
            )

    async def _put_all(
        self, db: Client, parts: Iterator[Chunk], advance: Callable[[], None]
    ) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                while isinstance(part := await self._read(lambda: _next(parts)), Chunk):
                    while self._must_wait(part):
                        await self._settle_first(advance)
                    self._under_way.append((group.create_task(self._put(db, part)), part))
                while self._under_way:
                    await self._settle_first(advance)
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        if part is not None:
            raise part

    async def _read(self, work: Callable[[], T]) -> T:
        """A pipe can be silent for ever and is read in a thread; with a file, that would only cost."""
        if not _is_regular(self.stream):
            return await _in_thread(work)
        await asyncio.sleep(0)
        return work()

    def _must_wait(self, chunk: Chunk) -> bool:
        """Writes of one key must not overtake each other; and only so many chunks are under way."""
        return len(self._under_way) >= CHUNKS_UNDER_WAY_MAX or not all(
            chunk.rows.keys().isdisjoint(other.rows) for _, other in self._under_way
        )

    async def _put(self, db: Client, chunk: Chunk) -> None:
        for ttl_ms, pairs in chunk.by_ttl().items():
            await db.put_many(pairs, ttl_ms=ttl_ms, **self.where)

    async def _settle_first(self, advance: Callable[[], None]) -> None:
        """Wait for the oldest chunk and note that everything up to its end is acknowledged."""
        task, chunk = self._under_way[0]
        await task
        self._under_way.popleft()
        for problem in chunk.bad[: max(BAD_ROWS_SHOWN_MAX - self.done.bad, 0)]:
            self.call.out.note(f"left out: {problem}")
        self.done = Done(chunk.end, self.done.rows + chunk.count, self.done.bad + len(chunk.bad))
        if self.note is not None:
            try:
                self.note.write(self.done)
            except OSError as error:
                raise _file_failure(f"cannot write {self.note.path}", error) from None
        advance()

    # ---- what is told ----

    def _tell_unused(self, shape: Shape, file: RowFile) -> None:
        unused = [] if file.columns is None else shape.unused(file.columns)
        if unused:
            names = ", ".join(unused)
            self.call.out.note(f"columns that are not loaded: {names}; see --json-value")

    def tell_how_to_go_on(self) -> None:
        """After a run that did not come to its end."""
        if self.note is not None and not self.is_finished and self.done.rows:
            self.call.out.note(
                f"{self.done.rows:,} rows are loaded; the same command goes on after them, "
                "or from the first row when the file has changed"
            )

    def tell_end(self) -> None:
        if self.call.out.as_json:
            return self.call.out.document(
                {
                    "rows": self.rows,
                    "rows_before": self.rows_before,
                    "bad": self.done.bad,
                    "seconds": round(self.seconds, 3),
                    "rows_per_s": round(self.rows_per_s, 1),
                }
            )
        bad = f", left out {self.done.bad:,} bad ones" if self.done.bad else ""
        speed = f"in {self.seconds:,.1f} s, {self.rows_per_s:,.0f} rows/s"
        return self.call.out.line(f"loaded {self.rows:,} rows {speed}{bad}")


def _next(parts: Iterator[Chunk]) -> Chunk | RowsError | None:
    """The next chunk; None after the last one, the error where the file cannot be read on."""
    try:
        return next(parts, None)
    except RowsError as error:
        return error


async def _in_thread(work: Callable[[], T]) -> T:
    """Do what may block in a thread that nobody waits for at the end."""
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()

    def run() -> None:
        try:
            outcome.set_result(work())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(outcome)


# ---- the bar ----


def _bar(call: Call, stream: BinaryIO) -> Progress:
    """By bytes of the file, on a terminal only; it has one task."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rows]:,} rows, {task.fields[rows_per_s]:,.0f} rows/s"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=call.out.as_json or not sys.stderr.isatty(),
    )
    size_bytes = os.fstat(stream.fileno()).st_size if _is_regular(stream) else None
    bar.add_task("load", total=size_bytes, rows=0, rows_per_s=0.0)
    return bar


def _show(bar: Progress, offset: int, rows: int, rows_per_s: float) -> None:
    bar.update(bar.task_ids[0], completed=offset, rows=rows, rows_per_s=rows_per_s)
