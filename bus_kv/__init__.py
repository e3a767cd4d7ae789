"""bus_kv: a distributed key-value database whose nodes are services on a NATS bus.

async with bus_kv.connect("nats://127.0.0.1:4222") as db:
    await db.put("apple", "fruit")
    print((await db.get("apple")).text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bus_kv.client.client import Client, connect
    from bus_kv.client.results import (
        ClusterStats,
        Entry,
        PastVersion,
        ReadState,
        Receipt,
        Rows,
    )

__version__ = "0.1.0"

_WHERE = {
    "connect": "bus_kv.client.client",
    "Client": "bus_kv.client.client",
    "ClusterStats": "bus_kv.client.results",
    "Entry": "bus_kv.client.results",
    "PastVersion": "bus_kv.client.results",
    "ReadState": "bus_kv.client.results",
    "Receipt": "bus_kv.client.results",
    "Rows": "bus_kv.client.results",
}

__all__ = [
    "Client", "ClusterStats", "Entry", "PastVersion", "ReadState", "Receipt", "Rows", "__version__", "connect",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Public names are imported on first use, so that importing the protocol alone stays cheap."""
    if name in _WHERE:
        from importlib import import_module

        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'bus_kv' has no attribute {name!r}")
