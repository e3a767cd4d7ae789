"""What a checkpoint overwrites in the state's file, kept until the checkpoint is complete.

DuckDB writes a checkpoint to free blocks and then a header that refers to them: a process that is killed in between
leaves the file as it was. The blocks of its metadata are the exception. Many small pieces share one of them, those of
the last checkpoint and free ones, and a checkpoint writes such a block again where it is. Killed while it does, it
leaves a block of which one part is new and one old: its checksum is wrong, and the file cannot be read any more.

So these blocks are copied beside the file before. While the file's headers are those of the copy no checkpoint has
been completed since, and the blocks of the copy belong where they were.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from nodes.log import sync_directory

if TYPE_CHECKING:
    from pathlib import Path

    from duckdb import DuckDBPyConnection

HEADERS_BYTES = 3 * 4096
BLOCK_BYTES = 256 << 10
"""The file is attached with blocks of this size."""
UNDO_SUFFIX = ".undo"
UNFINISHED_SUFFIX = ".undo.new"
_ID_BYTES = 8


class Undo:
    """Of an attached file. It stays open until `close`: closing any descriptor of a file gives up all locks that the
    process has on it, DuckDB's too."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._path = path
        self._state = os.open(path, os.O_RDONLY)

    def keep(self, db: DuckDBPyConnection) -> None:
        """To be called before every checkpoint of the file, attached as `state`. Raises OSError and duckdb.Error."""
        rows = db.execute("SELECT block_id FROM pragma_metadata_info('state')").fetchall()
        unfinished = _beside(self._path, UNFINISHED_SUFFIX)
        try:
            with unfinished.open("wb") as undo:
                undo.write(os.pread(self._state, HEADERS_BYTES, 0))
                for (block_id,) in rows:
                    block = os.pread(self._state, BLOCK_BYTES, _place(block_id))
                    if len(block) == BLOCK_BYTES:  # else it has never been written
                        undo.write(block_id.to_bytes(_ID_BYTES, "little") + block)
                undo.flush()
                os.fsync(undo.fileno())
            unfinished.rename(_beside(self._path, UNDO_SUFFIX))
            sync_directory(self._path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink(
                    missing_ok=True
                )  # where there is no space, others need what it took
            raise

    def forget(self) -> None:
        """The checkpoint is complete."""
        forget(self._path)

    def close(self) -> None:
        """To be called when the file is not attached any more."""
        os.close(self._state)


def forget(path: Path) -> None:
    """A copy that stays all the same is of other headers, and not used."""
    with contextlib.suppress(OSError):
        _beside(path, UNDO_SUFFIX).unlink(missing_ok=True)


def undo_unfinished(path: Path) -> None:
    """Undo what a checkpoint has begun and not completed; while the file is not attached. Raises OSError."""
    kept = _beside(path, UNDO_SUFFIX)
    if not kept.exists():
        return
    with path.open("r+b") as state, kept.open("rb") as undo:
        if state.read(HEADERS_BYTES) != undo.read(HEADERS_BYTES):
            return
        while block_id := undo.read(_ID_BYTES):
            state.seek(_place(int.from_bytes(block_id, "little")))
            state.write(undo.read(BLOCK_BYTES))
        state.flush()
        os.fsync(state.fileno())


def _place(block_id: int) -> int:
    return HEADERS_BYTES + block_id * BLOCK_BYTES


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
