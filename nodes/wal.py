"""A look into SQLite's write-ahead log that SQLite itself does not take.

SQLite ends its log at the first frame whose checksum is wrong, whatever follows. Behind a torn last write there is at
most one commit; two or more mean that bytes in the middle went bad: acknowledged entries would silently be gone.
Format: https://www.sqlite.org/fileformat2.html, "The Write-Ahead Log".
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_HEADER = struct.Struct(">IIII8s8s")
"""Magic, format, page size, checkpoint number, salts, checksums."""
_FRAME = struct.Struct(">II8s8s")
"""Page number, database pages after a commit (0: no commit), salts, checksums."""


def cut_commits(path: Path, valid_frames: int) -> int:
    """How many commits of the same log stand behind the frames that SQLite takes for valid."""
    if not path.exists():
        return 0
    with path.open("rb") as wal:
        header = wal.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return 0
        _, _, page_bytes, _, salts, _ = _HEADER.unpack(header)
        frame_bytes = _FRAME.size + page_bytes
        wal.seek(max(valid_frames, 0) * frame_bytes, 1)
        commits = 0
        while len(frame := wal.read(frame_bytes)) == frame_bytes:
            _, pages, frame_salts, _ = _FRAME.unpack(frame[: _FRAME.size])
            commits += bool(pages) and frame_salts == salts
    return commits
