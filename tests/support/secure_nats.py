"""Real NATS servers that ask for credentials, one per way of asking, for tests of connections.

Each is an async context manager over a scratch folder and yields a `SecureNats`: the server and the
options of its users. `node` may do everything in the database's account; `client` may publish
`bkv.>` and subscribe to its own inboxes, `_INBOX_client.>`, and nothing else.
"""

import asyncio
import base64
import hashlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nkeys  # type: ignore[import-untyped, unused-ignore]
import trustme

from bus_kv.runtime.connection import ConnectOptions
from bus_kv.runtime.nats_server import get_nats_server

START_S = 10.0
SHORT_S = 4
CLIENT_INBOX = "_INBOX_client"
CLIENT_PUBLISH, CLIENT_SUBSCRIBE = "bkv.>", f"{CLIENT_INBOX}.>"
_CLIENT_RIGHTS = f'{{ publish: "{CLIENT_PUBLISH}", subscribe: "{CLIENT_SUBSCRIBE}" }}'
_HOST = "127.0.0.1"


@dataclass(frozen=True)
class SecureNats:
    """A running server and its users; `tenant` lives in another account, `refused` is unknown."""

    server: "Server"
    node: ConnectOptions
    client: ConnectOptions
    refused: ConnectOptions
    tenant: ConnectOptions | None = None


class Server:
    """One nats-server process with JetStream; it keeps its port and data through a restart."""

    def __init__(self, folder: Path, config: str, *, jetstream: str = "") -> None:
        self._folder = folder
        self._jetstream = f'jetstream {{ store_dir: "{folder / "jetstream"}", {jetstream} }}\n'
        self._port = -1
        self._process: asyncio.subprocess.Process | None = None
        self._drained: asyncio.Task[bytes] | None = None
        self.write_config(config)

    @property
    def url(self) -> str:
        return f"nats://{_HOST}:{self._port}"

    def write_config(self, config: str) -> None:
        """Replace what is in force from the next `start` or `reload` on."""
        (self._folder / "nats.conf").write_text(self._jetstream + config)

    async def start(self) -> None:
        """Start and wait until clients are served; raises RuntimeError with the server's log."""
        self._process = await asyncio.create_subprocess_exec(
            str(get_nats_server(print)),
            *("--config", str(self._folder / "nats.conf")),
            *("--addr", _HOST, "--port", str(self._port)),
            stderr=asyncio.subprocess.PIPE,
        )
        assert self._process.stderr is not None
        async with asyncio.timeout(START_S):
            await self._ready(self._process.stderr)
        # An unread pipe would stop the server once full.
        self._drained = asyncio.create_task(self._process.stderr.read())

    async def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End the process, at once unless `how` says otherwise; nothing if there is none."""
        if self._process is None or self._process.returncode is not None:
            return
        self._process.send_signal(how)
        async with asyncio.timeout(START_S):
            await self._process.wait()
            if self._drained is not None:
                await self._drained

    def reload(self) -> None:
        """Make the server read its configuration again, keeping connections that still may stay."""
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    async def _ready(self, stderr: asyncio.StreamReader) -> None:
        log = []
        async for line in stderr:
            log.append(line.decode())
            if "Listening for client connections on" in log[-1]:
                self._port = int(log[-1].rsplit(":", 1)[1])
            if "Server is ready" in log[-1]:
                return
        raise RuntimeError("nats-server did not start:\n" + "".join(log))


@asynccontextmanager
async def running(folder: Path, config: str = "", *, jetstream: str = "") -> AsyncIterator[Server]:
    """A server of this configuration, gone at the end."""
    server = Server(folder, config, jetstream=jetstream)
    try:
        await server.start()
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def user_password_nats(folder: Path) -> AsyncIterator[SecureNats]:
    """(a) Accounts with users and passwords; the database's account and another tenant's."""
    async with running(folder, user_password_config("secret")) as server:
        node = _as_user(server, "node", "secret")
        yield SecureNats(
            server,
            node=node,
            client=replace(_as_user(server, "client", "secret"), inbox_prefix=CLIENT_INBOX),
            tenant=_as_user(server, "tenant", "secret"),
            refused=replace(node, password="wrong"),
        )


def user_password_config(password: str) -> str:
    """The accounts of `user_password_nats`; user `bare` is of an account without JetStream."""
    return f"""
        accounts {{
          DATABASE {{
            jetstream: enabled
            users: [
              {{ user: node, password: {password} }}
              {{ user: client, password: {password}, permissions: {_CLIENT_RIGHTS} }}
            ]
          }}
          TENANT {{ jetstream: enabled, users: [ {{ user: tenant, password: {password} }} ] }}
          BARE {{ users: [ {{ user: bare, password: {password} }} ] }}
        }}
    """


@asynccontextmanager
async def nkey_nats(folder: Path) -> AsyncIterator[SecureNats]:
    """(b) Users known by their public nkey."""
    node, client, refused = (Key.make("user") for _ in range(3))
    config = f"""
        authorization {{ users: [
          {{ nkey: {node.public} }}
          {{ nkey: {client.public}, permissions: {_CLIENT_RIGHTS} }}
        ] }}
    """
    async with running(folder, config) as server:
        options = {
            name: ConnectOptions(
                servers=(server.url,), nkey=_write(folder / f"{name}.nk", key.seed + "\n")
            )
            for name, key in (("node", node), ("client", client), ("refused", refused))
        }
        yield SecureNats(
            server,
            node=options["node"],
            client=replace(options["client"], inbox_prefix=CLIENT_INBOX),
            refused=options["refused"],
        )


@asynccontextmanager
async def jwt_nats(folder: Path) -> AsyncIterator[SecureNats]:
    """(c) Operator mode: accounts and users are JWTs, users connect with `.creds` files.

    The folder also gets `short.creds`, of a user like `node` who is let in for SHORT_S only.
    """
    operator, system, account = Key.make("operator"), Key.make("account"), Key.make("account")
    stranger = Key.make("account")
    system_jwt = _account_jwt(operator, system, "SYS", jetstream=False)
    account_jwt = _account_jwt(operator, account, "DATABASE", jetstream=True)
    config = f"""
        operator: {operator.jwt(operator, "operator", {"type": "operator", "version": 2})}
        system_account: {system.public}
        resolver: MEMORY
        resolver_preload: {{ {system.public}: {system_jwt}, {account.public}: {account_jwt} }}
    """
    async with running(folder, config) as server:
        node = ConnectOptions(
            servers=(server.url,), creds=write_creds(folder / "node.creds", account)
        )
        client = write_creds(folder / "client.creds", account, limited=True)
        write_creds(folder / "short.creds", account, expires_s=SHORT_S)
        yield SecureNats(
            server,
            node=node,
            client=replace(node, creds=client, inbox_prefix=CLIENT_INBOX),
            refused=replace(node, creds=write_creds(folder / "refused.creds", stranger)),
        )


@asynccontextmanager
async def tls_nats(folder: Path) -> AsyncIterator[SecureNats]:
    """(d) TLS with client certificates verified; `refused` has one of another authority."""
    ca, other = trustme.CA(), trustme.CA()
    server_cert, _ = _write_cert(ca, folder, _HOST)
    config = f"""
        tls {{
          cert_file: "{server_cert}", key_file: "{folder / (_HOST + ".key")}"
          ca_file: "{_write_ca(ca, folder / "ca.pem")}", verify: true
        }}
    """
    async with running(folder, config) as server:
        cert, key = _write_cert(ca, folder, "node@bus-kv.example")
        node = ConnectOptions(
            servers=(server.url.replace("nats:", "tls:"),),
            tls_ca=folder / "ca.pem",
            tls_cert=cert,
            tls_key=key,
        )
        _write_ca(other, folder / "other.pem")
        cert, key = _write_cert(other, folder, "refused@bus-kv.example")
        yield SecureNats(
            server,
            node=node,
            client=replace(node, inbox_prefix=CLIENT_INBOX),
            refused=replace(node, tls_cert=cert, tls_key=key),
        )


@asynccontextmanager
async def domain_nats(folder: Path) -> AsyncIterator[SecureNats]:
    """(e) A JetStream domain, `hub`, with the users of (a)."""
    config = user_password_config("secret")
    async with running(folder, config, jetstream="domain: hub") as server:
        node = replace(_as_user(server, "node", "secret"), js_domain="hub")
        yield SecureNats(
            server,
            node=node,
            client=replace(_as_user(server, "client", "secret"), inbox_prefix=CLIENT_INBOX),
            refused=replace(node, password="wrong"),
        )


@dataclass(frozen=True)
class Key:
    """An nkey: `seed` and `public` in their written form, and what signs a JWT."""

    seed: str
    public: str

    @classmethod
    def make(cls, role: str) -> "Key":
        prefix = getattr(nkeys, f"PREFIX_BYTE_{role.upper()}")
        seed = nkeys.encode_seed(os.urandom(32), prefix)
        public = nkeys.from_seed(bytearray(seed)).public_key
        return cls(seed.decode(), public.decode().rstrip("="))

    def jwt(
        self, subject: "Key", name: str, nats: dict[str, Any], *, expires_s: int | None = None
    ) -> str:
        """A NATS JWT about `subject`, signed by this key; `expires_s` counts from now."""
        now_s = int(time.time())
        claims = {"iss": self.public, "sub": subject.public, "name": name, "iat": now_s}
        claims |= {} if expires_s is None else {"exp": now_s + expires_s}
        digest = hashlib.sha256(json.dumps(claims | {"nats": nats}).encode()).digest()
        claims |= {"jti": base64.b32encode(digest).decode().rstrip("="), "nats": nats}
        header = {"typ": "JWT", "alg": "ed25519-nkey"}
        text = f"{_base64url(json.dumps(header))}.{_base64url(json.dumps(claims))}"
        signature = nkeys.from_seed(bytearray(self.seed, "ascii")).sign(text.encode())
        return f"{text}.{_base64url(signature)}"


def write_creds(
    path: Path, account: Key, *, limited: bool = False, expires_s: int | None = None
) -> Path:
    """A `.creds` file of a new user of `account`, with the client's rights if `limited`."""
    user = Key.make("user")
    rights: dict[str, Any] = {"pub": {}, "sub": {}}
    if limited:
        rights = {"pub": {"allow": [CLIENT_PUBLISH]}, "sub": {"allow": [CLIENT_SUBSCRIBE]}}
    limits = {"subs": -1, "data": -1, "payload": -1, "type": "user", "version": 2}
    jwt = account.jwt(user, path.stem, rights | limits, expires_s=expires_s)
    return _write(
        path,
        f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user.seed}\n------END USER NKEY SEED------\n",
    )


def _account_jwt(operator: Key, account: Key, name: str, *, jetstream: bool) -> str:
    unlimited = ("subs", "data", "payload", "imports", "exports", "conn", "leaf")
    storage = ("mem_storage", "disk_storage", "streams", "consumer")
    limits: dict[str, Any] = dict.fromkeys(unlimited + (storage if jetstream else ()), -1)
    limits["wildcards"] = True
    return operator.jwt(account, name, {"limits": limits, "type": "account", "version": 2})


def _as_user(server: Server, user: str, password: str) -> ConnectOptions:
    return ConnectOptions(servers=(server.url,), user=user, password=password)


def _write_ca(ca: trustme.CA, path: Path) -> Path:
    ca.cert_pem.write_to_path(str(path))
    return path


def _write_cert(ca: trustme.CA, folder: Path, identity: str) -> tuple[Path, Path]:
    issued = ca.issue_cert(identity)
    cert, key = folder / f"{identity}.pem", folder / f"{identity}.key"
    cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(key))
    return cert, key


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def _base64url(raw: str | bytes) -> str:
    raw = raw.encode() if isinstance(raw, str) else raw
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")
