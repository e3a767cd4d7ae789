"""Connection options against servers that ask for credentials: who gets in, who does not, and how.

The second half pins what nats-py does when a server takes credentials back or goes away, because
the driver is built around it.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import nats
import nats.errors
import nats.js.errors
import pytest
import pytest_asyncio
from nats.aio.client import Client
from nats.aio.msg import Msg

from bus_kv.runtime.connection import ConnectOptions
from tests.support import secure_nats
from tests.support.secure_nats import SecureNats

pytestmark = pytest.mark.asyncio

DEADLINE_S = 10.0
RETRY_S = 0.02
Start = Callable[[Path], AbstractAsyncContextManager[SecureNats]]
STARTS: dict[str, Start] = {
    "user_password": secure_nats.user_password_nats,
    "nkey": secure_nats.nkey_nats,
    "jwt": secure_nats.jwt_nats,
    "tls": secure_nats.tls_nats,
    "domain": secure_nats.domain_nats,
}


@pytest_asyncio.fixture(params=STARTS)
async def secure(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[SecureNats]:
    async with STARTS[request.param](tmp_path) as started:
        yield started


@pytest_asyncio.fixture
async def accounts(tmp_path: Path) -> AsyncIterator[SecureNats]:
    async with secure_nats.user_password_nats(tmp_path) as started:
        yield started


@pytest_asyncio.fixture
async def tls(tmp_path: Path) -> AsyncIterator[SecureNats]:
    async with secure_nats.tls_nats(tmp_path) as started:
        yield started


class Watched:
    """A connection that never gives up, and the callbacks it made, each to be waited for."""

    def __init__(self) -> None:
        self.nc = Client()
        self._errors: asyncio.Queue[Exception] = asyncio.Queue(maxsize=10_000)
        self._reconnected = asyncio.Event()
        self._closed = asyncio.Event()

    async def connect(self, options: ConnectOptions) -> None:
        await self.nc.connect(
            **options.nats_kwargs(),
            error_cb=self._on_error,
            reconnected_cb=self._on_reconnected,
            closed_cb=self._on_closed,
            max_reconnect_attempts=-1,
            reconnect_time_wait=RETRY_S,  # type: ignore[arg-type, unused-ignore]
        )

    async def error(self, text: str, *, times: int = 1) -> None:
        """Return once errors with this text were reported; skips others."""
        async with asyncio.timeout(DEADLINE_S):
            while times:
                times -= text in str(await self._errors.get())

    async def reconnected(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await self._reconnected.wait()
        self._reconnected.clear()

    async def closed(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await self._closed.wait()

    async def _on_error(self, error: Exception) -> None:
        self._errors.put_nowait(error)

    async def _on_reconnected(self) -> None:
        self._reconnected.set()

    async def _on_closed(self) -> None:
        self._closed.set()


@asynccontextmanager
async def watched(options: ConnectOptions) -> AsyncIterator[Watched]:
    connection = Watched()
    async with asyncio.timeout(DEADLINE_S):
        await connection.connect(options)
    try:
        yield connection
    finally:
        async with asyncio.timeout(DEADLINE_S):
            await connection.nc.close()


async def refusal(options: ConnectOptions) -> Exception:
    """The error of one attempt to connect, which must end on its own."""
    kwargs: dict[str, Any] = options.nats_kwargs() | {"allow_reconnect": False}
    attempt = asyncio.create_task(nats.connect(**kwargs, error_cb=_ignore))
    done, _ = await asyncio.wait({attempt}, timeout=DEADLINE_S)
    assert done, "neither let in nor refused"
    error = attempt.exception()
    assert isinstance(error, nats.errors.Error | OSError), "was let in"
    return error


async def _ignore(error: Exception) -> None:
    pass


async def serve_pong(nc: Client, subject: str) -> None:
    async def pong(msg: Msg) -> None:
        await nc.publish(msg.reply, b"pong:" + msg.data)

    await nc.subscribe(subject, cb=pong)
    await settled(nc)


async def settled(nc: Client) -> None:
    """Return once the server has seen everything sent: the first PING may overtake the rest."""
    await nc.flush()
    await nc.flush()


class TestLetIn:
    async def test_node_and_client_talk(self, secure: SecureNats) -> None:
        async with watched(secure.node) as node, watched(secure.client) as client:
            await serve_pong(node.nc, "bkv.get")
            reply = await client.nc.request("bkv.get", b"a", timeout=DEADLINE_S)
            assert reply.data == b"pong:a"

    async def test_the_node_keeps_the_control_bucket(self, secure: SecureNats) -> None:
        async with watched(secure.node) as node:
            jetstream = node.nc.jetstream(domain=secure.node.js_domain, timeout=DEADLINE_S)
            bucket = await jetstream.create_key_value(bucket="bus_kv_bkv")
            revision = await bucket.put("map", b"{}")
            entry = await bucket.get("map")
            assert (entry.value, entry.revision) == (b"{}", revision)

    async def test_subscriptions_outlive_a_restart(self, secure: SecureNats) -> None:
        async with watched(secure.node) as node, watched(secure.client) as client:
            await serve_pong(node.nc, "bkv.get")
            await secure.server.stop()
            await secure.server.start()
            await node.reconnected()
            await client.reconnected()
            await settled(node.nc)
            reply = await client.nc.request("bkv.get", b"a", timeout=DEADLINE_S)
            assert reply.data == b"pong:a"


class TestRefused:
    async def test_the_wrong_credentials(self, secure: SecureNats) -> None:
        error = await refusal(secure.refused)
        # The server closes at once, and its reason may be lost to the reset of the connection.
        known = isinstance(error, ssl.SSLError | ConnectionError)
        assert known or "Authorization Violation" in str(error)

    async def test_no_credentials(self, secure: SecureNats) -> None:
        nobody = ConnectOptions(servers=secure.node.servers, tls_ca=secure.node.tls_ca)
        error = await refusal(nobody)
        known = isinstance(error, ssl.SSLError | ConnectionError)
        assert known or "Authorization Violation" in str(error)

    async def test_a_server_of_another_authority(self, tls: SecureNats, tmp_path: Path) -> None:
        other = replace(tls.node, tls_ca=tmp_path / "other.pem")
        assert isinstance(await refusal(other), ssl.SSLCertVerificationError)

    async def test_a_server_of_another_name(self, tls: SecureNats) -> None:
        other = replace(tls.node, tls_hostname="nats.example")
        assert isinstance(await refusal(other), ssl.SSLCertVerificationError)

    async def test_a_private_authority_nobody_told_about(self, tls: SecureNats) -> None:
        plain = ConnectOptions(servers=(tls.server.url,))
        assert isinstance(await refusal(plain), ssl.SSLCertVerificationError)


class TestRights:
    async def test_what_a_client_may_not_send_is_reported(self, accounts: SecureNats) -> None:
        async with watched(accounts.client) as client:
            await client.nc.publish("$KV.bus_kv_bkv.map", b"forged")
            await client.error("permissions violation for publish")
            assert client.nc.is_connected

    async def test_what_a_client_may_not_hear_is_reported(self, accounts: SecureNats) -> None:
        async with watched(accounts.client) as client:
            await client.nc.subscribe("_INBOX.>", cb=_ignore_msg)
            await client.error("permissions violation for subscription")
            assert client.nc.is_connected

    async def test_an_inbox_that_is_not_ones_own_hears_no_reply(self, accounts: SecureNats) -> None:
        async with watched(accounts.node) as node:
            await serve_pong(node.nc, "bkv.get")
            async with watched(replace(accounts.client, inbox_prefix="_INBOX")) as client:
                with pytest.raises(nats.errors.TimeoutError):
                    await client.nc.request("bkv.get", b"a", timeout=0.1)
                await client.error("permissions violation for subscription")

    async def test_another_tenant_meets_nobody(self, accounts: SecureNats) -> None:
        assert accounts.tenant is not None
        async with watched(accounts.node) as node, watched(accounts.tenant) as tenant:
            await serve_pong(node.nc, "bkv.get")
            with pytest.raises(nats.errors.NoRespondersError):
                await tenant.nc.request("bkv.get", b"a", timeout=DEADLINE_S)

    async def test_an_account_without_jetstream_says_so(self, accounts: SecureNats) -> None:
        async with watched(replace(accounts.node, user="bare")) as bare:
            with pytest.raises(nats.js.errors.ServiceUnavailableError) as raised:
                await bare.nc.jetstream(timeout=DEADLINE_S).key_value("bus_kv_bkv")
            assert raised.value.err_code == 10039

    async def test_a_domain_that_is_not_there_has_no_code(self, accounts: SecureNats) -> None:
        async with watched(accounts.node) as node:
            with pytest.raises(nats.js.errors.ServiceUnavailableError) as raised:
                await node.nc.jetstream(domain="nowhere", timeout=DEADLINE_S).account_info()
            assert raised.value.err_code is None


class TestWhenTheServerChangesItsMind:
    async def test_a_refused_reconnect_is_tried_again(self, accounts: SecureNats) -> None:
        server = accounts.server
        async with watched(accounts.node) as node:
            await server.stop()
            server.write_config(secure_nats.user_password_config("other"))
            await server.start()
            await node.error("Authorization Violation", times=5)
            await server.stop()
            server.write_config(secure_nats.user_password_config("secret"))
            await server.start()
            await node.reconnected()

    async def test_credentials_withdrawn_end_a_live_connection_for_good(
        self, accounts: SecureNats
    ) -> None:
        async with watched(accounts.node) as node:
            accounts.server.write_config(secure_nats.user_password_config("other"))
            accounts.server.reload()
            await node.closed()
            assert isinstance(node.nc.last_error, nats.errors.AuthorizationError)

    async def test_renewed_creds_are_taken_from_the_file(self, tmp_path: Path) -> None:
        async with secure_nats.jwt_nats(tmp_path) as secure:
            creds = tmp_path / "renewed.creds"
            good = (tmp_path / "node.creds").read_text()
            creds.write_text(good)
            async with watched(replace(secure.node, creds=creds)) as node:
                await secure.server.stop()
                creds.write_text("half written")
                await secure.server.start()
                await node.error("holds no user seed", times=2)
                creds.write_text(good)
                await node.reconnected()

    async def test_creds_that_run_out_end_a_live_connection_for_good(self, tmp_path: Path) -> None:
        async with secure_nats.jwt_nats(tmp_path) as secure:
            short = replace(secure.node, creds=tmp_path / "short.creds")
            async with watched(short) as node:
                await node.closed()
                assert "user authentication expired" in str(node.nc.last_error)


async def _ignore_msg(msg: Msg) -> None:
    pass
