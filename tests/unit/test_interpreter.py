"""Which Python set-up picks: how it was built makes a difference of a quarter to a third in speed."""

import importlib.util
import subprocess
import sys
import sysconfig

import pytest

from bus_kv.runtime import interpreter


@pytest.mark.parametrize(
    ("arguments", "prefix", "is_optimized"),
    [
        ("'--enable-optimizations' '--with-lto'", "/usr/local", True),
        ("'--enable-shared'", "/opt/pyenv/versions/3.11.7", False),
        (None, "/opt/python", False),
        ("'--enable-shared'", "/usr", True),
    ],
)
def test_who_built_his_own_has_to_have_asked_for_optimizations(
    monkeypatch: pytest.MonkeyPatch, arguments: str | None, prefix: str, is_optimized: bool
):
    monkeypatch.setattr(sysconfig, "get_config_var", {"CONFIG_ARGS": arguments}.get)
    monkeypatch.setattr(sys, "base_prefix", prefix)
    assert interpreter.is_optimized() is is_optimized


def test_set_up_hears_from_the_exit_code_whether_this_python_will_do():
    told = subprocess.run([sys.executable, interpreter.__file__], check=False).returncode
    assert told == (interpreter.FIT if interpreter.is_optimized() else interpreter.SLOW)


def test_a_python_that_is_old_or_cannot_make_an_environment_will_not_do(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(interpreter, "VERSION_MIN", (sys.version_info.major, 99))
    assert interpreter.fitness() == interpreter.UNFIT
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", {"ensurepip": None, "venv": object()}.get)
    assert interpreter.fitness() == interpreter.UNFIT
