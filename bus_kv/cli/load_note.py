"""How far a load has come, noted beside its file, so that it can go on there after an interruption."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bus_kv.cli.row_files import Place

if TYPE_CHECKING:
    from typing import BinaryIO

HEAD_BYTES = 4096
"""So much of its beginning tells a file from others of its name."""


@dataclass
class Done:
    """Everything before `place` is acknowledged: so many rows, and so many bad ones left out."""

    place: Place = field(default_factory=Place)
    rows: int = 0
    bad: int = 0


@dataclass(frozen=True)
class Note:
    """`load` says which file goes where and how; a note about anything else does not count."""

    path: Path
    load: dict[str, Any]

    def read(self) -> Done | None:
        """None when there is no note about this load. Raises OSError."""
        try:
            noted = json.loads(self.path.read_bytes())
            if noted["load"] != self.load:
                return None
            return Done(Place(*map(int, noted["place"])), int(noted["rows"]), int(noted["bad"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            # Torn by a crash, or not ours: beginning anew is always right, as loading only puts.
            return None

    def write(self, done: Done) -> None:
        """Replace the note at one blow. Raises OSError."""
        noted = {"load": self.load, "place": done.place, "rows": done.rows, "bad": done.bad}
        new = self.path.with_name(f"{self.path.name}.new")
        new.write_text(json.dumps(noted))
        os.replace(new, self.path)

    def remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


def identity(stream: BinaryIO) -> dict[str, Any]:
    """What changes when the file does; leaves the stream at its beginning."""
    about = os.fstat(stream.fileno())
    head = hashlib.sha256(stream.read(HEAD_BYTES)).hexdigest()
    stream.seek(0)
    return {"size_bytes": about.st_size, "mtime_ns": about.st_mtime_ns, "head": head}
