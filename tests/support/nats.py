"""A NATS server for the tests: $NATS_URL, a nats-server program, or a container, in this order."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bus_kv.runtime.nats_program import NatsServerMissing, docker_answers, find_nats_server
from bus_kv.runtime.nats_server import NatsServer, next_free_port, read_info

IMAGE = "nats:2.12-alpine"
"""Overridden by $BUS_KV_TEST_NATS_IMAGE."""
_PORT = 4222
_ROUTE_PORT = 6222
_PORTS_FIRST = 24_222
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
    """The URL of a server in a container. Raises NatsServerMissing if Docker or the image does not answer."""
    async with container_servers(1) as (server,):
        yield server.url


@asynccontextmanager
async def container_servers(count: int) -> AsyncIterator[list["ContainerServer"]]:
    """Running servers in containers, a cluster if there are several. Raises as `container_nats`."""
    # Asked first, because the library leaks a socket when nobody answers.
    if not await asyncio.to_thread(docker_answers):
        raise NatsServerMissing
    # Its helper container is one more image to fetch, and what is made here is removed here as well.
    os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")
    # Imported late: reads the environment, and most machines never need it.
    from docker.errors import DockerException
    from testcontainers.core.network import Network

    with Network() as network:
        names = [f"nats-{i}" for i in range(1, count + 1)]
        servers = [ContainerServer(name, names, network) for name in names]
        try:
            try:
                await asyncio.gather(*(server.start() for server in servers))
            except DockerException as error:
                raise NatsServerMissing from error
            yield servers
        finally:
            await asyncio.gather(*(server.remove() for server in servers))


class ContainerServer:
    """A nats-server in a container; port and data stay the same through a restart (`chaos_cluster.Server`)."""

    pid = None

    def __init__(self, name: str, all_names: list[str], network: Any) -> None:
        from testcontainers.core.container import DockerContainer

        self.name = name
        self._port = next_free_port(_PORTS_FIRST + all_names.index(name))
        command = f"-js -sd /data -n {name}"
        if len(all_names) > 1:
            routes = ",".join(f"nats://{other}:{_ROUTE_PORT}" for other in all_names)
            # Its clients are outside of the network, where the addresses of the others lead nowhere.
            command += (
                f" --cluster_name bus_kv --cluster nats://0.0.0.0:{_ROUTE_PORT} --no_advertise"
                f" --routes {routes}"
            )
        image = os.environ.get("BUS_KV_TEST_NATS_IMAGE", IMAGE)
        self._container = (
            DockerContainer(image)
            .with_command(command)
            .with_bind_ports(_PORT, self._port)
            .with_network(network)
            .with_network_aliases(name)
        )
        self._is_made = False

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self._port}"

    async def start(self) -> None:
        """Start it, or do nothing when it runs."""
        if self._is_made:
            await asyncio.to_thread(self._container.get_wrapped_container().start)
        else:
            await asyncio.to_thread(self._container.start)
            self._is_made = True
        async with asyncio.timeout(_CONTAINER_START_TIMEOUT_S):
            await _until_it_greets("127.0.0.1", self._port)

    async def stop(self) -> None:
        """It goes on until it is removed."""

    async def kill(self) -> None:
        await asyncio.to_thread(self._container.get_wrapped_container().kill)

    async def remove(self) -> None:
        if self._is_made:
            await asyncio.to_thread(self._container.stop)


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
