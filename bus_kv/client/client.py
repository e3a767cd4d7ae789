"""The asyncio client: what a program calls. Everything it decides is in `session.py`; here are futures and the bus."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Mapping
from contextlib import asynccontextmanager
from itertools import repeat
from typing import TYPE_CHECKING, Any, TypeAlias

from bus_kv.client.pages import count_pages, pages, range_fields
from bus_kv.client.receipts import BusFates
from bus_kv.client.results import ClusterStats, Entry, PastVersion, Receipt, Rows
from bus_kv.client.session import Session
from bus_kv.errors import BusKVError, MalformedRequest, ShardUnavailable, from_body
from bus_kv.knobs import KEY_BYTES_MAX, Knobs
from bus_kv.protocol import batch as b
from bus_kv.protocol.sizes import Sizes
from bus_kv.runtime.clock import Clock
from bus_kv.runtime.connection import ConnectOptions
from bus_kv.runtime.driver import Driver
from bus_kv.runtime.nats_bus import NatsBus
from bus_kv.subjects import Subjects

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

    from bus_kv.protocol.batch import Version

    Text: TypeAlias = str | bytes


SLICE_OPERATIONS = 4000
SLICES_MAX = 4
"""put_many and its like go out in slices, so that the cluster works on one while the client prepares the next."""


class _Group:
    """Many operations awaited as one: outcomes by position, and the future of the whole."""

    __slots__ = ("future", "missing", "outcomes")

    def __init__(self, count: int, future: asyncio.Future[list[Any]]) -> None:
        self.outcomes: list[Any] = [None] * count
        self.missing = count
        self.future = future

    def tokens(self) -> list[tuple[_Group, int]]:
        return [*zip(repeat(self), range(self.missing), strict=False)]


@asynccontextmanager
async def connect(
    servers: str | Sequence[str] | None = None, *, root: str | None = None,
    options: ConnectOptions | None = None, knobs: Knobs | None = None, client_id: str | None = None,
    **connection: Any,
) -> AsyncIterator[Client]:  # fmt: skip
    """Connect to the cluster at these NATS servers: `async with bus_kv.connect(url) as db:`.

    `connection` takes the options of the command line: creds, nkey, user, password, tls_ca, tls_cert, tls_key,
    js_domain, inbox_prefix. What is not given comes from `BUS_KV_*` in the environment. Raises ConnectionConfigError,
    BusUnreachable after 10 s, CredentialsRefused at once.
    """
    options = options or _options(servers, root, connection)
    client = Client(options, knobs or Knobs(), client_id or secrets.token_hex(8))
    await client.open()
    try:
        yield client
    finally:
        await client.close()


def _options(
    servers: str | Sequence[str] | None, root: str | None, connection: dict[str, Any]
) -> ConnectOptions:
    import os

    nats = servers if servers is None or isinstance(servers, str) else ",".join(servers)
    return ConnectOptions.load(
        config=None, env=os.environ, flags={"nats": nats, "root": root, **connection}
    )


class Client:
    """One client of a cluster. Calls may be made from any number of tasks of one event loop; those made together
    travel together. Keys and values are `str` (taken as UTF-8) or `bytes`."""

    def __init__(self, options: ConnectOptions, knobs: Knobs, client_id: str) -> None:
        self._options, self._knobs, self._id = options, knobs, client_id
        self._clock = Clock()
        self._bus = NatsBus(options, self._on_restored)
        self._fates = BusFates(self.call, knobs.client_timeout_s)
        self._session: Session
        self._driver: Driver
        self._loop: asyncio.AbstractEventLoop
        self._task: asyncio.Task[Any] | None = None
        self._value_bytes_max = 0
        self._asked_ns = 0
        """When the first operation was asked for that waits for the next turn."""
        self._closed = "the client is not open"
        """Why no call can be made; empty while they can."""

    async def open(self, deadline_s: float = 10.0) -> None:
        self._loop = asyncio.get_running_loop()
        await self._bus.open(deadline_s)
        payload = self._bus.max_payload_bytes
        self._value_bytes_max = Sizes(payload).value
        subjects = Subjects(self._options.root)
        self._session = Session(self._id, subjects, self._knobs, payload, _tell)
        self._session.fates = self._fates
        self._driver = Driver(
            self._session, self._bus, self._clock, inbox_messages_max=self._knobs.inbox_messages_max
        )
        await self._bus.answer_to(self._driver.offer)
        await self._driver.listen("map", subjects.map_event, is_optional=True)
        self._closed = ""
        self._task = self._loop.create_task(self._run())

    async def close(self) -> None:
        """Close the connection; calls that are under way end with a failure that says so."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=1.0)
        await self._bus.close()

    def _on_restored(self) -> None:
        """The connection is back: what was announced meanwhile is lost."""
        if not self._closed:
            self._session.fetch_routes(self._clock.now_ns())
            self._driver.wake()

    async def _run(self) -> None:
        """Run the session; whatever ends it, nobody is left waiting."""
        reason = "the client was closed"
        try:
            await self._driver.run()
        except Exception as error:
            reason = f"the client failed and cannot go on, open a new one: {error!r}"
            raise
        finally:
            self._closed = reason
            self._session.close(reason)

    # ---- single operations ----

    async def get(
        self, key: Text, *, consistency: str | None = None, keyspace: str = "default"
    ) -> Entry:
        """Read a key. An absent one is an Entry with `found` False."""
        if self._closed:
            raise ShardUnavailable(self._closed)
        future: asyncio.Future[Entry] = self._loop.create_future()
        self._session.get(_key(key), future, self._asked_at_ns(), keyspace, consistency)
        return await future

    async def put(
        self, key: Text, value: Text, *, consistency: str | None = None, ttl_ms: int | None = None,
        if_absent: bool = False, if_version: Version | None = None, keyspace: str = "default",
        request_id: str | None = None,
    ) -> Receipt:  # fmt: skip
        """Write a key. Raises PreconditionFailed when the key is not as `if_absent` or `if_version` asks.

        With `request_id` ("<client>:<number>") the caller names the request, so that it can repeat it after its own
        restart; without one the client repeats by itself, under its own ids.
        """
        if request_id is not None:
            return await self._named(
                "put", key, request_id, consistency, keyspace, value=_bytes(value), ttl_ms=ttl_ms,
                if_absent=if_absent or None, if_version=if_version and list(if_version),
            )  # fmt: skip
        if if_absent and if_version is not None:
            raise MalformedRequest("a put has if_absent or if_version, not both")
        if ttl_ms is not None:
            b.check_ttl(ttl_ms)
        return await self._write(
            b.PUT, _key(key), self._value(value), keyspace, consistency, if_absent, if_version,
            ttl_ms,
        )  # fmt: skip

    async def delete(
        self, key: Text, *, consistency: str | None = None, if_version: Version | None = None,
        keyspace: str = "default", request_id: str | None = None,
    ) -> Receipt:  # fmt: skip
        """Delete a key; deleting an absent one is no failure (`found` False, no version)."""
        if request_id is not None:
            return await self._named(
                "delete", key, request_id, consistency, keyspace,
                if_version=if_version and list(if_version),
            )  # fmt: skip
        return await self._write(
            b.DELETE, _key(key), None, keyspace, consistency, False, if_version
        )

    async def _named(
        self, verb: str, key: Text, request_id: str, consistency: str | None, keyspace: str,
        **fields: Any,
    ) -> Receipt:  # fmt: skip
        """A write under the caller's own request_id goes through any node."""
        body = {
            "key": _key(key), "request_id": request_id, "consistency": consistency,
            "keyspace": keyspace, **fields,
        }  # fmt: skip
        reply = await self.call(verb, {n: value for n, value in body.items() if value is not None})
        version = reply["version"] and tuple(reply["version"])
        return Receipt(
            reply["shard"], version, reply["found"], reply["consistency"], self._fates
        )  # fmt: skip

    def _write(
        self, kind: int, key: bytes, value: bytes | None, keyspace: str, consistency: str | None,
        if_absent: bool = False, if_version: Version | None = None, ttl_ms: int | None = None,
    ) -> asyncio.Future[Receipt]:  # fmt: skip
        if self._closed:
            raise ShardUnavailable(self._closed)
        future: asyncio.Future[Receipt] = self._loop.create_future()
        self._session.write(
            kind, key, value, future, self._asked_at_ns(), keyspace, consistency, if_absent,
            if_version, ttl_ms,
        )  # fmt: skip
        return future

    def _asked_at_ns(self) -> int:
        """Now; for all that is asked for until the session's next turn, which comes soon, it is the same moment."""
        if not self._session.dirty:
            self._asked_ns = self._clock.now_ns()
            self._driver.wake()
        return self._asked_ns

    def _value(self, value: Text) -> bytes:
        encoded = _bytes(value)
        if len(encoded) > self._value_bytes_max:
            b.check_values([encoded], self._value_bytes_max)
        return encoded

    # ---- many at once ----

    async def put_many(
        self, items: Mapping[Any, Text] | Iterable[tuple[Text, Text]], *,
        consistency: str | None = None, ttl_ms: int | None = None, keyspace: str = "default",
    ) -> list[Receipt]:  # fmt: skip
        """Write many keys, a mapping or pairs, not atomically; receipts in order. Raises the first failure when all
        have ended."""
        if ttl_ms is not None:
            b.check_ttl(ttl_ms)
        pairs = [*(items.items() if isinstance(items, Mapping) else items)]
        keys = [_bytes(key) for key, _ in pairs]
        values = [_bytes(value) for _, value in pairs]
        b.check_values(values, self._value_bytes_max)
        receipts: list[Receipt] = await self._submit_many(
            b.PUT, keys, values, keyspace, consistency, ttl_ms
        )
        return receipts

    async def get_many(
        self, keys: Iterable[Text], *, consistency: str | None = None, keyspace: str = "default"
    ) -> list[Entry]:
        """Read many keys; entries in order."""
        names = [*map(_bytes, keys)]
        nothing = [None] * len(names)
        entries: list[Entry] = await self._submit_many(b.GET, names, nothing, keyspace, consistency)
        return entries

    async def delete_many(
        self, keys: Iterable[Text], *, consistency: str | None = None, keyspace: str = "default"
    ) -> list[Receipt]:
        """Delete many keys, not atomically; receipts in order."""
        names = [*map(_bytes, keys)]
        nothing = [None] * len(names)
        receipts: list[Receipt] = await self._submit_many(
            b.DELETE, names, nothing, keyspace, consistency
        )
        return receipts

    async def _submit_many(
        self, kind: int, keys: list[bytes], values: Sequence[bytes | None], keyspace: str,
        consistency: str | None, ttl_ms: int | None = None,
    ) -> list[Any]:  # fmt: skip
        if keys:
            b.check_keys(keys)
        outcomes: list[Any] = []
        under_way: deque[asyncio.Future[list[Any]]] = deque()
        for i in range(0, len(keys), SLICE_OPERATIONS):
            if self._closed:
                raise ShardUnavailable(self._closed)
            part = slice(i, i + SLICE_OPERATIONS)
            future: asyncio.Future[list[Any]] = self._loop.create_future()
            tokens = _Group(len(keys[part]), future).tokens()
            self._session.submit_many(
                kind, keys[part], values[part], tokens, self._asked_at_ns(), keyspace, consistency,
                ttl_ms,
            )  # fmt: skip
            under_way.append(future)
            # Let it leave before the next one is prepared.
            await asyncio.sleep(0)
            if len(under_way) == SLICES_MAX:
                outcomes += await under_way.popleft()
        for future in under_way:
            outcomes += await future
        for outcome in outcomes:
            if isinstance(outcome, BusKVError):
                raise outcome
        return outcomes

    # ---- scans and information ----

    async def scan(
        self, start: Text | None = None, end: Text | None = None, *, prefix: Text | None = None,
        limit: int | None = None, reverse: bool = False, keys_only: bool = False,
        consistency: str | None = None, keyspace: str = "default", page_size: int = 1000,
    ) -> AsyncIterator[Entry]:  # fmt: skip
        """Entries of [start, end) or of a prefix, in key order, page by page; `limit` None means all of them.

        Each page is read at one moment; keys that change between pages are seen as they are then.
        """
        bounds = {"start": start, "end": end, "prefix": prefix}
        fields = range_fields(bounds, keyspace, consistency)
        fields |= {"reverse": reverse, "keys_only": keys_only}
        async for items in pages(self.call, "scan", fields, "items", limit, page_size):
            for item in items:
                epoch, seq = item["version"]
                yield Entry(item["key"], item.get("value"), (epoch, seq))

    async def count(
        self, start: Text | None = None, end: Text | None = None, *, prefix: Text | None = None,
        consistency: str | None = None, keyspace: str = "default",
    ) -> int:  # fmt: skip
        """How many keys there are in [start, end) or of a prefix; each page is counted at one moment, as in a scan."""
        bounds = {"start": start, "end": end, "prefix": prefix}
        return await count_pages(self.call, range_fields(bounds, keyspace, consistency))

    async def history(
        self, key: Text, *, limit: int | None = None, keyspace: str = "default"
    ) -> AsyncIterator[PastVersion]:
        """What was written to a key, newest first, as far back as it is kept; `limit` None means all of it."""
        fields: dict[str, Any] = {"key": _key(key), "keyspace": keyspace}
        async for versions in pages(self.call, "history", fields, "versions", limit):
            for past in versions:
                yield PastVersion.from_wire(past)

    async def sql(self, query: str) -> Rows:
        """A SELECT over the views `kv` and `oplog` of the whole cluster. Raises SqlRefused, SqlFailed."""
        reply = await self.call("sql", {"query": query})
        return Rows(reply["columns"], reply["rows"])

    async def delete_prefix(self, prefix: Text, *, keyspace: str = "default") -> int:
        """Delete every key that begins so, part by part and not atomically; how many keys that were."""
        operation = {"op": "delete_prefix", "prefix": _bytes(prefix)}
        deleted, more = 0, True
        while more:
            (result,) = await self.batch([operation], keyspace=keyspace)
            if "code" in result:
                raise from_body(result)
            deleted, more = deleted + result["deleted"], result["more"]
        return deleted

    async def batch(
        self, operations: Sequence[dict[str, Any]], *, atomic: bool = False,
        consistency: str | None = None, keyspace: str = "default",
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Operations of contract §2 (`{"op": "put", "key": …, "value": …}`) as one request; a result for each."""
        fields: dict[str, Any] = {"ops": list(operations), "atomic": atomic, "keyspace": keyspace}
        if consistency is not None:
            fields["consistency"] = consistency
        results: list[dict[str, Any]] = (await self.call("batch", fields))["results"]
        return results

    async def health(self) -> dict[str, Any]:
        return await self.call("health", {})

    async def stats(self) -> dict[str, Any]:
        """Totals of the cluster and the newest report of every node and shard."""
        return await self.call("stats", {})

    async def get_cluster_stats(self) -> ClusterStats:
        """The totals of `stats`, by name."""
        return ClusterStats.from_wire(await self.stats())

    async def is_cluster_healthy(self) -> bool:
        """Whether every shard has an active primary and as many members up as it takes to write."""
        return bool((await self.health())["status"] == "ok")

    async def map(self) -> dict[str, Any]:
        """The shard map, read from the store."""
        return await self.call("map", {})

    async def call(self, verb: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Send a verb to any node and return its reply as it stands on the wire. Raises the failure it carries."""
        return await self._ask(self._session.call, verb, fields)

    async def admin(self, verb: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Ask the active coordinator, and return its reply when the change is in effect.

        Raises the failure it carries, NoCoordinator when there is none, OutcomeUnknown when none has answered in time.
        """
        return await self._ask(self._session.administer, verb, fields)

    async def _ask(self, ask: Callable[..., None], *what: Any) -> dict[str, Any]:
        if self._closed:
            raise ShardUnavailable(self._closed)
        future: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        ask(*what, future, self._clock.now_ns())
        self._driver.wake()
        return await future


def _tell(tokens: Sequence[Any], outcomes: Sequence[Any]) -> None:
    """Hand outcomes to those who await them; a caller that was cancelled is passed over."""
    for token, outcome in zip(tokens, outcomes, strict=True):
        if type(token) is tuple:
            group, i = token
            group.outcomes[i] = outcome
            group.missing -= 1
            if not group.missing and not group.future.done():
                group.future.set_result(group.outcomes)
        elif token.done():
            continue
        elif isinstance(outcome, BusKVError):
            token.set_exception(outcome)
        else:
            token.set_result(outcome)


def _bytes(text: Text) -> bytes:
    return text.encode() if isinstance(text, str) else text


def _key(key: Text) -> bytes:
    encoded = key if type(key) is bytes else _bytes(key)
    if not 0 < len(encoded) <= KEY_BYTES_MAX:
        b.check_keys([encoded])
    return encoded
