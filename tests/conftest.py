"""What every test may ask for. A test run has its own NATS server, and every test its own root."""

import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from bus_kv.runtime.nats_server import NatsServer, find_nats_server
from tests.support.nats import any_nats


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def nats_url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """The URL of the NATS server that all tests share, with JetStream."""
    async with any_nats(tmp_path_factory.mktemp("nats")) as url:
        yield url


@pytest.fixture
def root() -> str:
    """A root for this test alone, so that tests which share a server do not meet."""
    return f"t{secrets.token_hex(4)}"


@pytest.fixture
def nats_binary() -> Path:
    """The program nats-server."""
    binary = find_nats_server()
    if binary is None:
        pytest.skip("needs a nats-server program of its own")
    return binary


@pytest.fixture
async def nats_server(nats_binary: Path, tmp_path: Path) -> AsyncIterator[NatsServer]:
    """A server for this test alone, running, to be killed and restarted at will."""
    async with NatsServer(tmp_path / "nats", binary=nats_binary) as server:
        yield server
