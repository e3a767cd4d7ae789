"""A whole cluster behind a NATS that asks for credentials: processes, Python client and command line alike."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

import bus_kv
from bus_kv.cli.local_cluster import LocalCluster
from bus_kv.runtime.nats_bus import CredentialsRefused
from tests.integration.test_secure_nats import STARTS
from tests.support.cluster import until
from tests.support.command import run_module

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.secure_nats import SecureNats


@pytest_asyncio.fixture(params=STARTS)
async def secure(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[SecureNats]:
    async with STARTS[request.param](tmp_path) as started:
        yield started


async def test_nodes_client_and_command_line_reach_a_guarded_cluster(
    secure: SecureNats, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The client may subscribe to nothing but its inboxes: it is not warned, and learns of changes by answers."""
    knobs = {"layout_wait_s": 0.2}
    folder = tmp_path / "cluster"
    async with LocalCluster(folder, nodes=1, connection=secure.node, knobs=knobs) as cluster:
        await cluster.wait_healthy()
        async with bus_kv.connect(options=secure.client) as db:
            await db.put("apple", "fruit")
            assert (await db.get("apple")).text == "fruit"
            await db.admin("config", {"consistency": "one"})

            async def is_followed() -> bool:
                return (await db.get("apple")).read is not None

            await until(is_followed)
        done = await run_module(
            "bus_kv", "get", "apple", *secure.client.argv(), env=secure.client.env()
        )
        assert (done.code, done.out) == (0, b"fruit")

    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [record for record in warnings if record.name.startswith("bus_kv")]


async def test_whoever_is_refused_is_told_so(secure: SecureNats) -> None:
    with pytest.raises(CredentialsRefused, match="refused the connection"):
        async with bus_kv.connect(options=secure.refused):
            pass
    done = await run_module(
        "bus_kv", "get", "apple", *secure.refused.argv(), env=secure.refused.env()
    )
    assert done.code == 1
    assert "refused the connection" in done.err
