"""The cluster that `bus-kv chaos` does harm to: processes of this machine, the nodes behind links if asked for."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from bus_kv.cli.chaos_history import hot_key
from bus_kv.cli.chaos_link import Link
from bus_kv.cli.local_cluster import COORDINATOR, ClusterError, LocalCluster
from bus_kv.errors import BusKVError
from bus_kv.protocol.shard_map import Keyspace, Member, Shard, ShardMap, ShardState, to_document
from bus_kv.runtime.connection import ConnectOptions
from bus_kv.runtime.nats_bus import BusError, NatsBus
from bus_kv.runtime.nats_server import NatsCluster, NatsServer, NatsServerError
from bus_kv.subjects import Subjects

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from bus_kv.cli.processes import Child
    from bus_kv.client.client import Client
    from bus_kv.core.machine import Responded

COORDINATORS = (COORDINATOR, "c2")
FAILURES = (ClusterError, BusKVError, BusError, NatsServerError, TimeoutError)
"""What can go wrong once a cluster runs: a finding, not the end of the run."""
FIRST_SHARD = "s1"
"""A fresh cluster has one; of several this is the one whose primary is harmed."""
_POLL_S = 0.05
_ASK_S = 2.0
_LEADER_DEADLINE_S = 20.0


class Server(Protocol):
    """A nats-server, one process or one container."""

    @property
    def name(self) -> str: ...

    @property
    def url(self) -> str:
        """Where clients reach it, the same through a restart; known once started."""

    @property
    def pid(self) -> int | None:
        """None when somebody else sees to it that it ends with this program."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def kill(self) -> None: ...


def server_processes(folder: Path, count: int) -> Sequence[Server]:
    """nats-servers of this machine, one or a cluster."""
    return [NatsServer(folder / "nats")] if count == 1 else NatsCluster(folder, size=count).servers


class ChaosCluster(LocalCluster):
    """Nodes, two coordinators and nats-servers: the own process, or those given.

    With `links` every node reaches the bus through a `Link` of its own; only with one nats-server, because several tell
    their clients each other's addresses.
    """

    def __init__(
        self, folder: Path, *, servers: Sequence[Server] = (), links: bool = False, nodes: int = 3,
        shards: int = 1, knobs: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(folder, nodes=nodes, connection=ConnectOptions(), knobs=knobs)
        self._servers = servers or server_processes(folder, 1)
        assert len(self._servers) == 1 or not links
        self._has_links = links
        self._shards = shards
        self._bus = NatsBus(self.connection)
        self._leaders: asyncio.Queue[Responded] = asyncio.Queue(1)
        self.links: dict[str, Link] = {}

    # ---- life ----

    async def start(self) -> None:
        """As `LocalCluster.start`."""
        await super().start()
        try:
            self.children[COORDINATORS[1]] = self._child(COORDINATORS[1])
            await self.children[COORDINATORS[1]].start()
            self._bus = NatsBus(self.connection)
            await self._bus.open()
            await self._bus.answer_to(self._on_answer)
        except BaseException:
            await self.stop()
            raise

    async def _start_nats(self) -> None:
        for server in self._servers:
            await self._start_server(server)
        urls = tuple(server.url for server in self._servers)
        self._connection = ConnectOptions(servers=urls, root=self._root)
        for node in self.node_ids if self._has_links else ():
            address = urlsplit(urls[0])
            self.links[node] = Link(address.hostname or "", address.port or 0)
            await self.links[node].start()
        if self._shards > 1:
            await self._lay_out()

    async def _lay_out(self) -> None:
        bus = NatsBus(self.connection)
        await bus.open()
        try:
            store = bus.map_store(Subjects(self.connection.root).bucket, _ASK_S)
            await store.prepare()
            map = _first_map(self._shards, self.node_ids[0])
            stored = await store.cas(0, "map", 0, to_document(map))
            if stored.failure is not None:
                raise ClusterError(f"the map cannot be written: {stored.failure}")
        finally:
            await bus.close()

    async def _start_server(self, server: Server) -> None:
        await server.start()
        if server.pid is not None:
            self._guard.watch(server.pid)

    def _child(self, id: str) -> Child:
        """It takes the connection that is set while it is made: its own link, if it has one."""
        direct = self.connection
        if id in self.links:
            self._connection = replace(direct, servers=(self.links[id].url,))
        try:
            return super()._child(id)
        finally:
            self._connection = direct

    async def stop(self) -> None:
        for link in self.links.values():
            link.mend()
        for child in self.children.values():
            self.resume(child.name)
        await self._bus.close()
        await super().stop()
        await asyncio.gather(*(link.stop() for link in self.links.values()))
        await asyncio.gather(*(server.stop() for server in self._servers))

    # ---- harm ----

    def pause(self, id: str) -> None:
        self.children[id].signal(signal.SIGSTOP)

    def resume(self, id: str) -> None:
        if self.children[id].is_running:
            self.children[id].signal(signal.SIGCONT)

    async def wipe(self, id: str) -> None:
        """Take the disk of a node that does not run."""
        assert not self.children[id].is_running
        await asyncio.to_thread(shutil.rmtree, self.folder / id)

    async def kill_server(self, name: str) -> None:
        """End a nats-server as a crash would."""
        server = self._server(name)
        pid = server.pid
        await server.kill()
        if pid is not None:
            self._guard.forget(pid)

    async def restart_server(self, name: str) -> None:
        await self._start_server(self._server(name))

    def _server(self, name: str) -> Server:
        return next(server for server in self._servers if server.name == name)

    # ---- who is who ----

    @property
    def server_names(self) -> list[str]:
        return [server.name for server in self._servers]

    async def primary(self, db: Client) -> str:
        shards = (await db.map())["shards"]
        return str(next(shard["primary"] for shard in shards if shard["id"] == FIRST_SHARD))

    async def active_coordinator(self) -> str:
        """Raises ClusterError when none has become active in time."""
        store = self._bus.map_store(Subjects(self.connection.root).bucket, _ASK_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(_LEADER_DEADLINE_S):
                while True:
                    document = (await store.get(0, "leader")).document or {}
                    if document.get("holder") in COORDINATORS:
                        return str(document["holder"])
                    await asyncio.sleep(_POLL_S)
        raise ClusterError("no coordinator has become active")

    async def jetstream_leader(self) -> str:
        """The nats-server that leads the stream of the map. Raises ClusterError when there is none in time."""
        subject = f"$JS.API.STREAM.INFO.KV_{Subjects(self.connection.root).bucket}"
        with suppress(TimeoutError):
            async with asyncio.timeout(_LEADER_DEADLINE_S):
                while True:
                    leader = await self._ask_for_leader(subject)
                    if leader in self.server_names:
                        return leader
                    await asyncio.sleep(_POLL_S)
        raise ClusterError("JetStream has no leader for the map")

    async def _ask_for_leader(self, subject: str) -> str:
        with suppress(TimeoutError):
            await self._bus.publish(subject, b"", reply=self._bus.reply_subject(1))
            async with asyncio.timeout(_ASK_S):
                answer = await self._leaders.get()
                return str(json.loads(answer.body or b"{}").get("cluster", {}).get("leader", ""))
        return ""

    def _on_answer(self, answer: Responded) -> None:
        with suppress(asyncio.QueueFull):
            self._leaders.put_nowait(answer)

    # ---- how it is ----

    async def wait_whole(self, db: Client, deadline_s: float) -> None:
        """Return when the map has every node up and a member of every shard, and every shard served.

        Raises ClusterError with what is missing, and with the processes that have ended, when that takes too long.
        """
        lacks = "nobody tells the map"
        try:
            async with asyncio.timeout(deadline_s):
                while lacks:
                    lacks = await self.lacks(db)
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            reasons = "; ".join([lacks, *self.obituaries().values()])
            raise ClusterError(f"not whole {deadline_s:.0f} s after healing: {reasons}") from None

    async def lacks(self, db: Client) -> str:
        """What the map lacks now; empty when nothing."""
        try:
            return self._lacks(await db.map())
        except BusKVError as error:
            return str(error)

    def _lacks(self, map: dict[str, Any]) -> str:
        missing = [
            f"shard {shard['id']} is {shard['state']} on {', '.join(shard['members'])}"
            for shard in map["shards"]
            if shard["state"] != "active"
            or shard["learners"]
            or sorted(shard["members"]) != self.node_ids
        ]
        missing += [f"{n['id']} is {n['state']}" for n in map["nodes"] if n["state"] != "up"]
        return "; ".join(missing if map["shards"] else ["no shard"])


def _first_map(count: int, node: str) -> ShardMap:
    """So many shards that nobody has opened yet, to be had by the nodes that are up, under this one if it is."""
    bounds = [b"", *(hot_key(i) for i in range(1, count)), None]
    members = (Member(node, ""),)
    shards = {
        f"s{i}": Shard(
            f"s{i}", "default", start or b"", end, i, "layout", members, node, ShardState.RECOVERING
        )
        for i, (start, end) in enumerate(pairwise(bounds), 1)
    }
    return ShardMap(1, count, "layout", {"default": Keyspace()}, shards, {})
