"""Options that both server programs take: the connection, and settings by `--knob name=value`."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bus_kv.knobs import Knobs
from bus_kv.runtime.connection import OPTIONS, ConnectOptions

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

HELP = {
    "nats": "NATS servers, comma-separated URLs (default nats://127.0.0.1:4222)",
    "root": "first token(s) of every subject (default bkv)",
    "creds": "credentials file (JWT and seed)",
    "nkey": "file with an nkey seed",
    "user": "user name",
    "password": "password; better given as BUS_KV_PASSWORD",
    "tls_ca": "certificate authority to trust (PEM)",
    "tls_cert": "client certificate (PEM)",
    "tls_key": "key of the client certificate (PEM)",
    "tls_hostname": "name the server's certificate must bear, if not its address",
    "js_domain": "JetStream domain of the map's bucket",
    "inbox_prefix": "prefix of reply subjects (default _INBOX)",
}
"""Help text of each connection option; the command line uses the same."""


def add_connection(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("connection (also BUS_KV_* in the environment, or --config)")
    group.add_argument("--config", type=Path, help="TOML file with these options")
    for option in OPTIONS:
        group.add_argument(f"--{option.replace('_', '-')}", help=HELP[option])


def add_knobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--knob", action="append", default=[], metavar="NAME=VALUE",
        help="a setting of bus_kv/knobs.py, for example heartbeat_interval_s=1",
    )  # fmt: skip


def connection_of(
    arguments: argparse.Namespace, env: Mapping[str, str], name: str
) -> ConnectOptions:
    """Raises ConnectionConfigError."""
    flags = {option: getattr(arguments, option) for option in OPTIONS}
    return replace(ConnectOptions.load(config=arguments.config, env=env, flags=flags), name=name)


def knobs_of(arguments: argparse.Namespace) -> Knobs:
    """Raises ValueError with a line for the operator."""
    defaults = Knobs()
    types: dict[str, type[int | float]] = {
        f.name: type(getattr(defaults, f.name)) for f in fields(Knobs)
    }
    changes: dict[str, float] = {}
    for text in arguments.knob:
        name, _, value = text.partition("=")
        if name not in types:
            raise ValueError(f"there is no knob {name!r}; see bus_kv/knobs.py")
        try:
            changes[name] = types[name](value)
        except ValueError:
            raise ValueError(f"knob {name} takes a number, not {value!r}") from None
        if not 0 < changes[name] < float("inf"):
            raise ValueError(f"knob {name} is a number greater than 0, not {value}")
    return replace(defaults, **changes)  # type: ignore[arg-type]  # converted to each field's type
