"""The client's edge: when a call was made, as its session is told."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bus_kv.client.client import Client
from bus_kv.knobs import Knobs
from bus_kv.runtime.connection import ConnectOptions


class Asked:
    """A session that takes everything on, and when it was told that each was asked for."""

    def __init__(self) -> None:
        self.dirty: dict[str, None] = {}
        self.asked_ns: list[int] = []

    def get(self, key: bytes, token: Any, now_ns: int, *_: Any) -> None:
        self._note(now_ns)

    def write(self, kind: int, key: bytes, value: Any, token: Any, now_ns: int, *_: Any) -> None:
        self._note(now_ns)

    def submit_many(
        self, kind: int, keys: list[bytes], values: Any, tokens: Any, now_ns: int, *_: Any
    ) -> None:
        self._note(now_ns)

    def _note(self, now_ns: int) -> None:
        self.asked_ns.append(now_ns)
        self.dirty["lane"] = None


@pytest.fixture
async def client() -> Any:
    client: Any = Client(ConnectOptions(), Knobs(), "c")
    client._session, client._loop = Asked(), asyncio.get_running_loop()
    client._driver = SimpleNamespace(wake=lambda: None)
    times_ns = iter(range(100, 10_000, 100))
    client._clock = SimpleNamespace(now_ns=lambda: next(times_ns))
    client._closed, client._value_bytes_max = "", 100
    return client


async def test_calls_of_one_pass_of_the_loop_are_asked_for_at_one_moment(client: Any) -> None:
    """Whichever came first: a deadline that begins at an older moment would have passed too soon."""
    session = cast("Asked", client._session)
    first = [
        asyncio.ensure_future(call)
        for call in (client.get_many(["a", "b"]), client.put("k", "v"), client.get("k"))
    ]
    await asyncio.sleep(0)
    assert session.asked_ns == [100, 100, 100]
    session.dirty.clear()  # a turn
    later = [asyncio.ensure_future(call) for call in (client.get("k"), client.get_many(["a"]))]
    await asyncio.sleep(0)
    assert session.asked_ns[3:] == [200, 200]
    for task in (*first, *later):
        task.cancel()
