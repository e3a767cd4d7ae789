"""How a process reaches NATS: addresses, credentials and TLS from flags, environment and file.

One option has one name everywhere: `tls_ca` in the file is `BUS_KV_TLS_CA` in the environment and
`--tls-ca` on the command line. Flags win over the environment, the environment over the file, the
file over the defaults. Credentials are one choice of three (`creds`, `nkey`, `user` with
`password`): the highest place that names any of them decides which, and what lower places say of
the others is ignored, so `--user` works in a shell that exports `BUS_KV_CREDS`.
"""

import base64
import re
import ssl
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Self
from urllib.parse import SplitResult, urlsplit

OPTIONS = (
    "nats",
    "root",
    "creds",
    "nkey",
    "user",
    "password",
    "tls_ca",
    "tls_cert",
    "tls_key",
    "tls_hostname",
    "js_domain",
    "inbox_prefix",
)
_PATHS = ("creds", "nkey", "tls_ca", "tls_cert", "tls_key")
_METHODS = (frozenset({"creds"}), frozenset({"nkey"}), frozenset({"user", "password"}))
_CREDENTIALS = frozenset().union(*_METHODS)
_PORT_DEFAULT = 4222

_TOKENS = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_TOKENS_CHARS_MAX = 128
_USER_JWT = re.compile(r"BEGIN NATS USER JWT-+\s+([\w-]+\.[\w-]+\.[\w-]+)\s")
_USER_SEED = re.compile(r"\bSU[A-Z2-7]{56}\b")


class ConnectionConfigError(Exception):
    """The options cannot be used as given; the message is one line saying what to change."""


@dataclass(frozen=True, slots=True)
class ConnectOptions:
    """Everything a process needs to reach NATS; immutable and checked when made.

    `servers` are full URLs (`nats://host:port` or `tls://host:port`; a missing scheme or port is
    filled in). `root` may contain dots. `nkey` is a file with a user seed. `name` labels the
    connection in the server's monitoring and is the one field no place but the program sets.

    Raises ConnectionConfigError. Files are not opened before `nats_kwargs`.
    """

    servers: tuple[str, ...] = (f"nats://127.0.0.1:{_PORT_DEFAULT}",)
    root: str = "bkv"
    creds: Path | None = None
    nkey: Path | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_hostname: str | None = None
    js_domain: str | None = None
    inbox_prefix: str = "_INBOX"
    name: str | None = None

    def __post_init__(self) -> None:
        # A frozen instance stores its normal form this one way.
        object.__setattr__(self, "servers", tuple(_server_url(text) for text in self.servers))
        if not self.servers:
            raise ConnectionConfigError("nats: the list of servers is empty: give at least one URL")
        _check_tokens("root", self.root)
        _check_tokens("inbox_prefix", self.inbox_prefix)
        if self.js_domain is not None:
            _check_tokens("js_domain", self.js_domain)
        self._check_credentials()
        self._check_tls()

    @classmethod
    def load(
        cls, *, config: Path | None, env: Mapping[str, str], flags: Mapping[str, object]
    ) -> Self:
        """The options in effect, merged from flags, `BUS_KV_*` environment, file and defaults.

        `config` is the TOML file (`BUS_KV_CONFIG` if None). `flags` are keyed by option name; None
        means not given. `nats` is a comma-separated text or a list. An empty variable counts as
        not set. Relative paths in the file start at the file's folder.

        Raises ConnectionConfigError.
        """
        if config is None and env.get("BUS_KV_CONFIG"):
            config = Path(env["BUS_KV_CONFIG"]).expanduser()
        file = {} if config is None else _read_file(config)
        given = _merge(_given_flags(flags), _given_env(env), file)
        values: dict[str, Any] = {name: _value(name, given[name]) for name in given}
        if "nats" in values:
            values["servers"] = values.pop("nats")
        return cls(**values)

    @property
    def addresses(self) -> str:
        """The servers as `host:port, host:port`, for messages: never with a password."""
        return ", ".join(_address(url) for url in self.servers)

    @property
    def uses_tls(self) -> bool:
        """Whether the connection must be encrypted: a `tls_*` option or a tls:// URL says so."""
        named = (self.tls_ca, self.tls_cert, self.tls_key, self.tls_hostname)
        return any(named) or any(url.startswith("tls://") for url in self.servers)

    def nats_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `nats.connect`: whom to reach and how to be let in.

        Opens every file named, so that a wrong one is told here and not by a connection that
        retries for ever. Raises ConnectionConfigError.
        """
        kwargs: dict[str, Any] = {
            "servers": list(self.servers),
            "inbox_prefix": self.inbox_prefix.encode(),
        }
        if self.name is not None:
            kwargs["name"] = self.name
        if self.uses_tls:
            kwargs["tls"] = self._ssl_context()
        if self.tls_hostname is not None:
            kwargs["tls_hostname"] = self.tls_hostname
        return kwargs | self._credential_kwargs()

    def argv(self) -> list[str]:
        """Flags that, together with `env`, give a child process these very options."""
        flags: list[str] = []
        for name, text in self._texts().items():
            if text and name not in self._secrets():
                flags.append(f"--{name.replace('_', '-')}={text}")
        return flags

    def env(self) -> dict[str, str]:
        """Variables to set for a child process, besides `argv`: secrets, which `ps` must not show.

        Every other option, and the file, is set to nothing, so that the child takes none from the
        environment it inherits.
        """
        texts, secrets = self._texts(), self._secrets()
        shown = {name: text if name in secrets else "" for name, text in texts.items()}
        return {_variable(name): text for name, text in shown.items()} | {"BUS_KV_CONFIG": ""}

    def _texts(self) -> dict[str, str]:
        values = {name: getattr(self, name) for name in OPTIONS if name != "nats"}
        texts = {name: "" if value is None else str(value) for name, value in values.items()}
        return {"nats": ",".join(self.servers)} | texts

    def _secrets(self) -> frozenset[str]:
        in_url = any("@" in url for url in self.servers)
        return frozenset({"password", "nats"} if in_url else {"password"})

    def _check_credentials(self) -> None:
        named = [name for name in ("creds", "nkey", "user") if getattr(self, name) is not None]
        if len(named) > 1:
            raise ConnectionConfigError(
                f"{' and '.join(named)} are given together: keep one of creds, nkey or user"
            )
        if self.password is not None and named and named != ["user"]:
            raise ConnectionConfigError(
                f"{named[0]} and password are given together: a password goes with user"
            )
        if (self.user is None) != (self.password is None):
            missing, present = ("password", "user") if self.user else ("user", "password")
            raise ConnectionConfigError(f"{present} is given without {missing}: give both")

    def _check_tls(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            missing, present = ("tls_key", "tls_cert") if self.tls_cert else ("tls_cert", "tls_key")
            raise ConnectionConfigError(f"{present} is given without {missing}: give both")

    def _credential_kwargs(self) -> dict[str, Any]:
        if self.creds is not None:
            return _creds_kwargs(self.creds)
        if self.nkey is not None:
            return {"nkeys_seed_str": _read_seed("nkey", self.nkey)}
        if self.user is not None:
            return {"user": self.user, "password": self.password}
        return {}

    def _ssl_context(self) -> ssl.SSLContext:
        context = _trusting(self.tls_ca)
        if self.tls_cert is not None and self.tls_key is not None:
            _load_cert(context, self.tls_cert, self.tls_key)
        return context


def _given_flags(flags: Mapping[str, object]) -> dict[str, object]:
    given = {name: value for name, value in flags.items() if value is not None}
    _check_known(given, "flags")
    return given


def _given_env(env: Mapping[str, str]) -> dict[str, object]:
    return {name: env[_variable(name)] for name in OPTIONS if env.get(_variable(name))}


def _variable(option: str) -> str:
    return "BUS_KV_" + option.upper()


def _read_file(config: Path) -> dict[str, object]:
    try:
        document: dict[str, object] = tomllib.loads(_read_text("config", config))
    except tomllib.TOMLDecodeError as cause:
        raise ConnectionConfigError(f"config: {config} is not TOML: {cause}") from None
    table = document.pop("connection", {})
    if not isinstance(table, dict):
        raise ConnectionConfigError(f"config: {config}: connection must be a table")
    given = document | table
    _check_known(given, str(config))
    for name in given.keys() & set(_PATHS):
        given[name] = config.parent / _path(name, given[name])
    return given


def _check_known(given: Mapping[str, object], place: str) -> None:
    for name in given:
        if name not in OPTIONS:
            known = ", ".join(OPTIONS)
            raise ConnectionConfigError(f"{place}: unknown option {name!r}; known are {known}")


def _merge(*places: dict[str, object]) -> dict[str, object]:
    """The value of each option from the first place that gives one; highest place first."""
    merged: dict[str, object] = {}
    accepted: frozenset[str] = frozenset()
    for given in places:
        named = (method for method in _METHODS if not method.isdisjoint(given))
        accepted = accepted or frozenset().union(*named)
        for name, value in given.items():
            if name not in _CREDENTIALS or name in accepted:
                merged.setdefault(name, value)
    return merged


def _value(name: str, value: object) -> object:
    if name == "nats":
        return _server_list(value)
    if name in _PATHS:
        return _path(name, value)
    if not isinstance(value, str) or not value:
        raise ConnectionConfigError(f"{name}: must be a text that is not empty")
    return value


def _path(name: str, value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise ConnectionConfigError(f"{name}: must be the path of a file, not {value!r}")
    return Path(value).expanduser()


def _server_list(value: object) -> tuple[str, ...]:
    texts = value.split(",") if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ConnectionConfigError(f"nats: must be a URL or a list of URLs, not {value!r}")
    return tuple(text.strip() for text in texts if text.strip())


def _server_url(text: str) -> str:
    parts = _split_url(text if "://" in text else "nats://" + text)
    if parts is None or parts.scheme not in ("nats", "tls"):
        # What stands before the @ may be a password.
        shown = text.rpartition("@")[2]
        raise ConnectionConfigError(
            f"nats: {shown!r} is no server address: write nats://host:4222 or tls://host:4222"
        )
    netloc = parts.netloc if parts.port is not None else f"{parts.netloc}:{_PORT_DEFAULT}"
    return f"{parts.scheme}://{netloc}"


def _split_url(url: str) -> SplitResult | None:
    """The URL's parts; None unless it is scheme, host and perhaps port and user, nothing else."""
    try:
        parts = urlsplit(url)
        port_ok = parts.port is None or parts.port > 0
    except ValueError:
        return None
    extra = parts.path.strip("/") or parts.query or parts.fragment
    odd = re.search(r"[\s,]|:$", parts.netloc)
    return parts if parts.hostname and port_ok and not odd and not extra else None


def _address(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]


def _check_tokens(name: str, text: str) -> None:
    if not _TOKENS.fullmatch(text) or len(text) > _TOKENS_CHARS_MAX:
        raise ConnectionConfigError(
            f"{name}: {text!r} must be tokens of letters, digits, _ and - separated by dots, "
            f"{_TOKENS_CHARS_MAX} characters at most"
        )


def _read_text(name: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConnectionConfigError(f"{name}: there is no file {path}") from None
    except OSError as cause:
        raise ConnectionConfigError(f"{name}: cannot read {path}: {cause.strerror}") from None
    except UnicodeDecodeError:
        raise ConnectionConfigError(f"{name}: {path} is not a text file") from None


def _read_seed(name: str, path: Path) -> str:
    seed = _USER_SEED.search(_read_text(name, path))
    if seed is None:
        raise ConnectionConfigError(f"{name}: {path} holds no user seed (SU… and 56 characters)")
    return seed.group()


def _read_jwt(path: Path) -> str:
    jwt = _USER_JWT.search(_read_text("creds", path))
    if jwt is None:
        raise ConnectionConfigError(f"creds: {path} holds no NATS user JWT")
    return jwt.group(1)


def _creds_kwargs(path: Path) -> dict[str, Any]:
    """Callbacks that read the file at every connect, so that renewed credentials take effect.

    nats-py's own reader never returns when the file holds no JWT, and its reconnect loop survives
    only errors of its own and OSError, which a file caught half-written must therefore be.
    """

    def jwt() -> bytes:
        return _retriable(lambda: _read_jwt(path)).encode()

    def signature(nonce: str) -> bytes:
        return _sign(_retriable(lambda: _read_seed("creds", path)), nonce)

    _read_jwt(path)
    _read_seed("creds", path)
    return {"user_jwt_cb": jwt, "signature_cb": signature}


def _retriable(read: Callable[[], str]) -> str:
    try:
        return read()
    except ConnectionConfigError as cause:
        raise OSError(str(cause)) from cause


def _sign(seed: str, nonce: str) -> bytes:
    # Imported late: only credentials need it, and it loads a cryptography library.
    import nkeys  # type: ignore[import-untyped, unused-ignore]

    return base64.b64encode(nkeys.from_seed(bytearray(seed, "ascii")).sign(nonce.encode()))


def _trusting(ca: Path | None) -> ssl.SSLContext:
    if ca is not None:
        _read_text("tls_ca", ca)
    try:
        return ssl.create_default_context(cafile=ca)
    except ssl.SSLError:
        raise ConnectionConfigError(f"tls_ca: {ca} holds no certificate in PEM form") from None


def _load_cert(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    def refuse_encrypted() -> NoReturn:
        # Otherwise OpenSSL asks for the passphrase on the terminal.
        raise ConnectionConfigError(f"tls_key: {key} is encrypted: give a key without passphrase")

    _read_text("tls_cert", cert)
    _read_text("tls_key", key)
    try:
        context.load_cert_chain(cert, key, password=refuse_encrypted)
    except ssl.SSLError as cause:
        raise ConnectionConfigError(
            f"tls_cert: {cert} and tls_key: {key} are no matching PEM pair: {cause.reason}"
        ) from None
