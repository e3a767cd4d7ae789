"""NATS: the only module that imports its client library, but for the bench's jetstream_kv.py.

`NatsBus` is one connection: it publishes, subscribes with callbacks that never wait, and leads answers back by a
correlation number in the reply subject. A connection that is lost comes back by itself, for ever; what is published
meanwhile is dropped, not kept, because a message that arrives late is worth less than a retry that knows the time.

`MapStore` is the JetStream key-value bucket with the shard map and the coordinators' lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import ssl
from typing import TYPE_CHECKING, Any, TypeAlias

from nats.aio.client import Client as NatsClient
from nats.errors import Error as NatsError
from nats.errors import MaxPayloadError, SecureConnWantedError
from nats.js.api import KeyValueConfig, StorageType, StreamConfig
from nats.js.errors import (
    APIError,
    BucketNotFoundError,
    KeyDeletedError,
    KeyNotFoundError,
    KeyWrongLastSequenceError,
    NotFoundError,
    ServiceUnavailableError,
)  # fmt: skip

from bus_kv.core.machine import Responded, Stored

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from nats.aio.subscription import Subscription as NatsSubscription
    from nats.js import JetStreamContext
    from nats.js.kv import KeyValue

    from bus_kv.runtime.connection import ConnectOptions

    OnMessage: TypeAlias = Callable[[Any], Awaitable[None]]

log = logging.getLogger("bus_kv.bus")

RECONNECT_WAIT_S = 0.25
PING_INTERVAL_S = 5
SUBSCRIPTION_MESSAGES_MAX = 65_536
"""Deep enough that our own bounded inbox always fills first: callbacks never wait."""
TOO_FEW_SERVERS, NO_LEADER = 10005, 10008
TRANSIENT_CODES = (TOO_FEW_SERVERS, NO_LEADER)
"""What JetStream says while servers are starting."""
OTHER_CONFIG = 10058
"""A stream of this name is there, and is set otherwise."""
KEPT_PER_SUBJECT = 30
KEPT_BYTES_MAX = 16 << 20
KEPT_AGE_S = 30 * 24 * 3600.0
WRONG_SEQUENCE_CODES = (10071, 10164)
"""JetStream's two ways to say that a compare-and-set lost."""


class BusError(Exception):
    """The bus refused something; the message says what to do."""


class BusUnreachable(BusError):
    """Nobody answers at any of the addresses."""


class CredentialsRefused(BusError):
    """The server is there and does not let us in."""


class _Client(NatsClient):
    """nats-py, with a shorter way in and out: its own leads over queues and tasks, which cost a message as much as all
    that is done with it. And it refuses to go on in clear text when TLS was asked for: nats-py alone would send the
    credentials unprotected."""

    wants_tls = False

    def __init__(self) -> None:
        super().__init__()
        self._listeners: dict[int, OnMessage] = {}
        self._writer: Any = None
        self._will_write = False

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if self.wants_tls and initial_connection and not info.get("tls_required"):
            raise SecureConnWantedError
        await super()._process_info(info, initial_connection)

    # ---- in ----

    def deliver_to(self, sid: int, on_message: OnMessage) -> None:
        """Call the listener of a subscription as soon as a message is read."""
        self._listeners[sid] = on_message

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> None:
        on_message = self._listeners.get(sid)
        if on_message is None:
            return await super()._process_msg(sid, subject, reply, data, headers)
        if sid not in self._subs:
            del self._listeners[sid]
            return None
        self.stats["in_msgs"] += 1
        self.stats["in_bytes"] += len(data)
        header = await self._process_headers(headers) if headers else None
        try:
            await on_message(self._build_message(sid, subject, reply, data, header))
        except Exception as error:
            await self._error_cb(error)

    # ---- out ----

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        """What is published leaves when whoever runs is done, if nobody has called `write` before."""
        if force_flush:
            return await super()._flush_pending(force_flush=True)
        if not self._will_write:
            self._will_write = True
            asyncio.get_running_loop().call_soon(self.write)
        return None

    def write(self) -> None:
        """Hand what was published to the socket, now. What that does not take is nats-py's to send."""
        self._will_write = False
        if not self._pending_data_size:
            return
        writer: Any = getattr(self._transport, "_io_writer", None)
        try:
            if writer and self.is_connected and not writer.transport.get_write_buffer_size():
                if writer is not self._writer:
                    # Else the loop would keep it until it has nothing else to do.
                    writer.transport.set_write_buffer_limits(high=0)
                    self._writer = writer
                pending, self._pending, self._pending_data_size = self._pending, [], 0
                writer.writelines(pending)
                return
        except (OSError, RuntimeError) as error:
            # The connection is lost, which nats-py will notice; so is what was sent just before.
            log.debug("not sent: %r", error)
            return
        if self._flush_queue is not None and self._flush_queue.empty():
            self._flush_queue.put_nowait(asyncio.Future())


class NatsBus:
    """One connection to the bus, for ever: see `open`."""

    def __init__(
        self, options: ConnectOptions, on_restored: Callable[[], None] | None = None
    ) -> None:
        self._options = options
        self._on_restored = on_restored or (lambda: None)
        self._inbox = f"{options.inbox_prefix}.{secrets.token_hex(8)}"
        self._client = _Client()
        self._subscriptions: dict[Subscription, None] = {}
        self._reopening: asyncio.Task[None] | None = None
        self._opened = self._closing = False

    async def open(self, deadline_s: float = 10.0) -> None:
        """Connect within `deadline_s`; from then on the connection comes back by itself whenever it is lost.

        Raises BusUnreachable when nobody answers in time, CredentialsRefused as soon as a server says no.
        """
        client, errors = _Client(), list[Exception]()
        client.wants_tls = self._options.uses_tls

        async def on_first_error(error: Exception) -> None:
            errors.append(error)
            if _is_refusal(error):
                raise CredentialsRefused(
                    f"NATS at {self._options.addresses} refused the connection: {error}"
                )

        try:
            async with asyncio.timeout(deadline_s):
                await client.connect(
                    **self._options.nats_kwargs(),
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=RECONNECT_WAIT_S,  # type: ignore[arg-type]  # it sleeps this long
                    ping_interval=PING_INTERVAL_S,
                    max_outstanding_pings=2,
                    connect_timeout=2,
                    error_cb=on_first_error,
                    reconnected_cb=self._on_reconnected,
                    disconnected_cb=self._on_disconnected,
                    closed_cb=self._on_closed,
                )
        except TimeoutError:
            await self._abandon(client)
            reason = f": {errors[-1] or type(errors[-1]).__name__}" if errors else ""
            raise BusUnreachable(
                f"no NATS server answers at {self._options.addresses}{reason}"
            ) from None
        except (CredentialsRefused, asyncio.CancelledError):
            await self._abandon(client)
            raise
        client._error_cb = self._on_error  # the only way to be quiet after opening
        self._client, self._opened = client, True

    async def _abandon(self, client: _Client) -> None:
        client._closed_cb = None  # this client never was ours
        client._error_cb = self._on_error
        with contextlib.suppress(TimeoutError, NatsError, OSError):
            async with asyncio.timeout(1.0):
                await client.close()

    async def _on_error(self, error: Exception) -> None:
        may_do_without = any(s.is_optional and s.is_named_in(error) for s in self._subscriptions)
        level = logging.DEBUG if may_do_without else logging.WARNING
        log.log(level, "NATS: %s", error or type(error).__name__)

    async def _on_disconnected(self) -> None:
        if not self._closing:
            log.warning("NATS: connection lost; connecting again")

    async def _on_reconnected(self) -> None:
        log.warning("NATS: connected again")
        self._on_restored()

    async def _on_closed(self) -> None:
        """The server ended the connection for good as nats-py sees it (`-ERR`); for us nothing is for good."""
        if not self._closing and self._reopening is None:
            self._reopening = asyncio.get_running_loop().create_task(self._reopen())

    async def _reopen(self) -> None:
        while not self._closing:
            try:
                await self.open()
                for subscription in list(self._subscriptions):
                    await subscription.start(self._client)
                self._reopening = None
                if self._client.is_closed:
                    return await self._on_closed()
                return await self._on_reconnected()
            except (BusError, NatsError, OSError) as error:
                log.warning("NATS: %s", error)
            await asyncio.sleep(1.0)
        return None

    @property
    def max_payload_bytes(self) -> int:
        return self._client.max_payload

    @property
    def is_connected(self) -> bool:
        return self._client.is_connected

    @property
    def is_clustered(self) -> bool:
        return bool(self._client._server_info.get("cluster"))  # no public accessor

    def jetstream(self, timeout_s: float, unacknowledged_max: int = 4000) -> JetStreamContext:
        """JetStream on this connection; `unacknowledged_max` bounds what `publish_async` has under way."""
        return self._client.jetstream(
            domain=self._options.js_domain, timeout=timeout_s,
            publish_async_max_pending=unacknowledged_max,
        )  # fmt: skip

    def reply_subject(self, correlation: int) -> str:
        return f"{self._inbox}.{correlation}"

    async def answer_to(self, on_response: Callable[[Responded], object]) -> None:
        """Lead the answers to our requests to `on_response`."""
        prefix = len(self._inbox) + 1

        async def on_message(message: Any) -> None:
            headers = message.headers
            nobody = not message.data and headers and headers.get("Status") == "503"
            body = None if nobody else message.data
            on_response(Responded(int(message.subject[prefix:]), body))

        await self.subscribe(f"{self._inbox}.*", on_message)

    async def publish(
        self, subject: str, body: bytes, *, reply: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Send, at most once. Without a connection the message is dropped: its sender retries by its own clock."""
        if not self._client.is_connected:
            return
        try:
            await self._client.publish(subject, body, reply, dict(headers) if headers else None)
        except MaxPayloadError:
            log.error("%d bytes are too many for one message to %s: not sent", len(body), subject)
        except (NatsError, OSError) as error:
            log.debug("not sent to %s: %r", subject, error)

    def send(self) -> None:
        """What was published leaves now, not when the loop has nothing else to do."""
        self._client.write()

    async def subscribe(
        self, subject: str, on_message: OnMessage, queue: str = "", is_optional: bool = False
    ) -> Subscription:
        """Call `on_message` for each message, one at a time; also after the connection was lost and came back.

        What is optional may be forbidden by the server: nobody is warned of that.
        """
        subscription = Subscription(subject, on_message, queue, is_optional)
        self._subscriptions[subscription] = None
        try:
            await subscription.start(self._client)
        except NatsError as error:
            # Closed just now: reopening starts every subscription that is known.
            log.debug("not subscribed to %s yet: %r", subject, error)
        return subscription

    async def drain(self, subscription: Subscription) -> None:
        """Take no new messages, and return when those that came in have been handled."""
        self._subscriptions.pop(subscription, None)
        await subscription.drain()

    async def flush(self, deadline_s: float = 2.0) -> None:
        """Return when the server has seen everything sent before. Raises BusError.

        Twice, because nats-py's PING overtakes commands that are still in its queue.
        """
        try:
            async with asyncio.timeout(deadline_s):
                await self._client.flush()
                await self._client.flush()
        except (NatsError, TimeoutError, OSError) as error:
            raise BusError(f"NATS does not answer: {error or type(error).__name__}") from None

    def map_store(self, bucket: str, timeout_s: float) -> MapStore:
        return MapStore(self, bucket, timeout_s)

    async def kept_events(
        self, stream: str, subject: str, timeout_s: float
    ) -> list[tuple[str, bytes]]:
        """Have JetStream keep the newest events of a subject from now on; those it has, oldest first: (subject, body).

        In memory, on every server: they are worth remembering, and no disk has to wait for them. Raises BusError when
        it is refused or takes too long.
        """
        jetstream = self.jetstream(timeout_s)
        config = StreamConfig(
            stream, subjects=[subject], max_msgs_per_subject=KEPT_PER_SUBJECT,
            max_bytes=KEPT_BYTES_MAX, max_age=KEPT_AGE_S, storage=StorageType.MEMORY,
            num_replicas=3 if self.is_clustered else 1,
        )  # fmt: skip
        messages: list[Any] = []
        try:
            async with asyncio.timeout(2 * timeout_s):
                if not await _keep(jetstream, config):
                    return []
                reader = await jetstream.subscribe(subject, stream=stream, ordered_consumer=True)
                try:
                    while not messages or messages[-1].metadata.num_pending:
                        messages.append(await reader.next_msg(None))
                finally:
                    await reader.unsubscribe()
        except (NatsError, TimeoutError, OSError) as error:
            if not messages:
                reason = _reason(error)
                raise BusError(f"JetStream stream {stream} cannot be used: {reason}") from None
        return [(message.subject, message.data) for message in messages]

    async def close(self) -> None:
        self._closing = True
        if self._reopening is not None:
            self._reopening.cancel()
        if not self._opened:
            return
        # uvloop says RuntimeError of a transport that is closing while the server is away.
        with contextlib.suppress(TimeoutError, NatsError, OSError, RuntimeError):
            async with asyncio.timeout(2.0):
                await self._client.close()


async def _keep(jetstream: JetStreamContext, config: StreamConfig) -> int:
    """Make the stream unless it is there; how many messages it has."""
    try:
        kept = await jetstream.add_stream(config)
    except APIError as error:
        if error.err_code == TOO_FEW_SERVERS and config.num_replicas != 1:
            return await _keep(jetstream, config.evolve(num_replicas=1))
        if error.err_code != OTHER_CONFIG:
            raise
        kept = await jetstream.stream_info(config.name or "")  # of another release, or moved
    return kept.state.messages


def _is_refusal(error: Exception) -> bool:
    text = str(error).lower()
    refused = "authorization violation" in text or "authentication" in text
    return refused or isinstance(error, ssl.SSLError | SecureConnWantedError)


class Subscription:
    """A subject and who listens; it outlives the connection."""

    def __init__(self, subject: str, on_message: OnMessage, queue: str, is_optional: bool) -> None:
        self._subject, self._on_message, self._queue = subject, on_message, queue
        self.is_optional = is_optional
        self._handle: NatsSubscription | None = None

    async def start(self, client: _Client) -> None:
        self._handle = await client.subscribe(
            self._subject, self._queue, cb=self._on_message,
            pending_msgs_limit=SUBSCRIPTION_MESSAGES_MAX, pending_bytes_limit=1 << 30,
        )  # fmt: skip
        client.deliver_to(self._handle._id, self._on_message)

    def is_named_in(self, error: Exception) -> bool:
        """Whether the server refused this very subject; nats-py tells its words in small letters."""
        return f'"{self._subject}"'.lower() in str(error).lower()

    async def drain(self) -> None:
        with contextlib.suppress(NatsError):
            if self._handle is not None:
                await self._handle.drain()  # type: ignore[no-untyped-call]


class MapStore:
    """Compare-and-set on JSON documents in one JetStream bucket. Answers are events; only success proves anything."""

    def __init__(self, bus: NatsBus, bucket: str, timeout_s: float) -> None:
        self._bus = bus
        self._bucket = bucket
        self._timeout_s = timeout_s

    async def prepare(self, patience_s: float = 30.0) -> None:
        """Create the bucket unless it is there, with three replicas in a cluster of servers.

        Raises BusError when JetStream is not there, or has had no leader for `patience_s`. Servers that have just
        started are waited for; where there are fewer than three for a third of that time, one replica has to do.
        """
        loop = asyncio.get_running_loop()
        began_s, few_since_s = loop.time(), loop.time()
        while True:
            has_enough = self._bus.is_clustered and loop.time() - few_since_s < patience_s / 3
            failure, code = await self._try_to_open(3 if has_enough else 1)
            if not failure:
                return
            if code not in TRANSIENT_CODES or loop.time() - began_s > patience_s:
                raise BusError(f"JetStream bucket {self._bucket} cannot be used: {failure}")
            if code != TOO_FEW_SERVERS:
                few_since_s = loop.time()
            await asyncio.sleep(0.5)

    async def _try_to_open(self, replicas: int) -> tuple[str, int | None]:
        """Why it failed (empty: it has not), and JetStream's number for that."""
        try:
            await self._open_or_create(replicas)
        except ServiceUnavailableError as error:
            if error.err_code in TRANSIENT_CODES:
                return _reason(error), error.err_code
            return f"{error}; enable JetStream for this account (see nats.conf)", error.err_code
        except APIError as error:
            return _reason(error), error.err_code
        except (NatsError, TimeoutError, OSError) as error:
            return _reason(error), NO_LEADER if self._bus.is_clustered else None
        return "", None

    async def _open_or_create(self, replicas: int) -> None:
        jetstream = self._bus.jetstream(self._timeout_s)
        try:
            await jetstream.key_value(self._bucket)
        except (BucketNotFoundError, NotFoundError):
            config = KeyValueConfig(
                self._bucket, description="bus_kv shard map and coordinators' lease", history=1,
                storage=StorageType.FILE, replicas=replicas, direct=False,
            )  # fmt: skip
            await jetstream.create_key_value(config)

    async def _bucket_now(self) -> KeyValue:
        return await self._bus.jetstream(self._timeout_s).key_value(self._bucket)

    async def get(self, correlation: int, key: str) -> Stored:
        """Read through the stream's leader."""
        try:
            entry = await (await self._bucket_now()).get(key)
        except KeyDeletedError as error:
            return Stored(correlation, error.entry.revision or 0)
        except (KeyNotFoundError, BucketNotFoundError, NotFoundError):
            return Stored(correlation)
        except (NatsError, TimeoutError, OSError) as error:
            return Stored(correlation, failure=_reason(error))
        return _stored(correlation, entry.revision or 0, entry.value or b"null")

    async def cas(
        self, correlation: int, key: str, revision: int, document: dict[str, Any]
    ) -> Stored:
        try:
            body = json.dumps(document, separators=(",", ":")).encode()
            written = await (await self._bucket_now()).update(key, body, last=revision)
        except KeyWrongLastSequenceError as error:
            return Stored(correlation, failure=_reason(error), conflict=True)
        except APIError as error:
            conflict = error.err_code in WRONG_SEQUENCE_CODES
            return Stored(correlation, failure=_reason(error), conflict=conflict)
        except (NatsError, TimeoutError, OSError) as error:
            return Stored(correlation, failure=_reason(error))
        return Stored(correlation, written, document)


def _stored(correlation: int, revision: int, value: bytes) -> Stored:
    try:
        return Stored(correlation, revision, json.loads(value))
    except ValueError:
        return Stored(correlation, failure="the value in the store is not JSON")


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
