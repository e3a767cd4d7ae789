"""Threads whose names the system shows as well."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

_NAME_BYTES_MAX = 15
"""Linux keeps this much of a name."""


class NamedThread(threading.Thread):
    """Its name stands in /proc too, where `top -H` and `bus-kv bench --profile` read it.

    Where there is no /proc the name is Python's alone.
    """

    def run(self) -> None:
        comm = Path(f"/proc/self/task/{threading.get_native_id()}/comm")
        with contextlib.suppress(OSError):
            comm.write_bytes(self.name.encode()[:_NAME_BYTES_MAX])
        super().run()
