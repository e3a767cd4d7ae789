"""`bus-kv serve node|coordinator`: becomes the server process, whose options it takes."""

from __future__ import annotations

import os
from typing import NoReturn

import typer

from bus_kv.cli.processes import module_argv, module_env

_PASS_THROUGH = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}


def register(app: typer.Typer) -> None:
    serve = typer.Typer(no_args_is_help=True, help="Run one server process, in the foreground.")
    serve.command("node", context_settings=_PASS_THROUGH)(node)
    serve.command("coordinator", context_settings=_PASS_THROUGH)(coordinator)
    app.add_typer(serve, name="serve")


def node(context: typer.Context) -> None:
    """Run a node: bus-kv serve node --id n1 --data DIR --nats URL (--help tells all options)"""
    _become("nodes", context.args)


def coordinator(context: typer.Context) -> None:
    """Run a coordinator: bus-kv serve coordinator --id c1 --nats URL (--help tells all options)"""
    _become("coordinator", context.args)


def _become(module: str, arguments: list[str]) -> NoReturn:
    argv = module_argv(module, *arguments)
    os.execve(argv[0], argv, os.environ | module_env())
