"""Real data to be tried out with: the Unicode character database that comes with Python."""

from __future__ import annotations

import json
import sys
import unicodedata
from typing import Any


def key_of(code_point: int) -> bytes:
    """`U+01F600`: of one length, so that key order is code point order."""
    return b"U+%06X" % code_point


def record(code_point: int, **more: Any) -> bytes:
    """What Python knows of a character, as JSON; `more` is added to it."""
    character = chr(code_point)
    fields = {
        "name": unicodedata.name(character),
        "category": unicodedata.category(character),
        "bidirectional": unicodedata.bidirectional(character),
        "combining": unicodedata.combining(character),
        "decomposition": unicodedata.decomposition(character),
        "numeric": unicodedata.numeric(character, None),
        "mirrored": bool(unicodedata.mirrored(character)),
        "east_asian_width": unicodedata.east_asian_width(character),
        **more,
    }
    return json.dumps(fields, separators=(",", ":")).encode()


def named_characters() -> list[int]:
    """The code points that have a name, ascending: 138,552 in Python 3.11, more in later ones."""
    every = range(sys.maxunicode + 1)
    return [code_point for code_point in every if unicodedata.name(chr(code_point), "")]
