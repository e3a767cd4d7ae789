"""A NATS server for the tests: $NATS_URL, a nats-server program, or a container, in this order."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from bus_kv.runtime.nats_program import NatsServerMissing, docker_answers, find_nats_server
from bus_kv.runtime.nats_server import NatsServer, read_info

IMAGE = "nats:2.12-alpine"
"""Overridden by $BUS_KV_TEST_NATS_IMAGE."""
_PORT = 4222
_CONTAINER_START_TIMEOUT_S = 60.0
_CONTAINER_POLL_INTERVAL_S = 0.1


@asynccontextmanager
async def any_nats(folder: Path) -> AsyncIterator[str]:
    """The URL of a server with JetStream, our own unless $NATS_URL names one.

    `folder` is for its data. Raises NatsServerMissing when there is no way to one.
    """
    if url := os.environ.get("NATS_URL"):
        yield url
    elif binary := find_nats_server():
        async with NatsServer(folder, binary=binary) as server:
            yield server.url
    else:
        async with container_nats() as url:
            yield url


@asynccontextmanager
async def container_nats() -> AsyncIterator[str]:
    """The URL of a server in a container. Raises NatsServerMissing if Docker does not answer."""
    # Asked first, because the library leaks a socket when nobody answers.
    if not await asyncio.to_thread(docker_answers):
        raise NatsServerMissing
    # Its helper container is one more image to fetch, and `with` removes ours as well.
    os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")
    # Imported late: reads the environment, and most machines never need it.
    from docker.errors import DockerException
    from testcontainers.core.container import DockerContainer

    image = os.environ.get("BUS_KV_TEST_NATS_IMAGE", IMAGE)
    try:
        container = DockerContainer(image).with_command("-js -sd /data").with_exposed_ports(_PORT)
        await asyncio.to_thread(container.start)
    except DockerException as error:
        raise NatsServerMissing from error
    try:
        host, port = container.get_container_host_ip(), int(container.get_exposed_port(_PORT))
        async with asyncio.timeout(_CONTAINER_START_TIMEOUT_S):
            await _until_it_greets(host, port)
        yield f"nats://{host}:{port}"
    finally:
        await asyncio.to_thread(container.stop)


async def greeting(url: str) -> dict[str, object]:
    """The INFO of the server at this URL."""
    address = urlsplit(url)
    assert address.hostname is not None
    async with asyncio.timeout(10):
        return await read_info(address.hostname, address.port or _PORT)


async def _until_it_greets(host: str, port: int) -> None:
    """Docker accepts connections on the port before the server does, and closes them."""
    while True:
        try:
            await read_info(host, port)
        except OSError:
            await asyncio.sleep(_CONTAINER_POLL_INTERVAL_S)
        else:
            return
