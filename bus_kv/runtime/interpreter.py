"""Which Python to run on: how it was built makes a difference of a quarter to a third in speed.

Imports nothing but the standard library, so that set-up can ask each Python it finds by running this file with it. The
exit code tells whether it will do: 0 well, 3 slowly, anything else not.
"""

import importlib.util
import sys
import sysconfig

FIT, SLOW, UNFIT = 0, 3, 4
VERSION_MIN = (3, 11)
SYSTEM_PREFIX = "/usr"
"""Pythons that a system brings along are all built well, and not all of them say so."""


def is_optimized() -> bool:
    """Whether it was built with profile-guided optimizations; who builds his own (pyenv) has to ask for them."""
    arguments = sysconfig.get_config_var("CONFIG_ARGS") or ""
    return "--enable-optimizations" in arguments or sys.base_prefix == SYSTEM_PREFIX


def fitness() -> int:
    makes_environments = all(importlib.util.find_spec(name) for name in ("ensurepip", "venv"))
    if sys.version_info < VERSION_MIN or not makes_environments:
        return UNFIT
    return FIT if is_optimized() else SLOW


if __name__ == "__main__":
    sys.exit(fitness())
