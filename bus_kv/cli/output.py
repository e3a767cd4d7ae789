"""What a command says: one JSON document, or tables and lines for people."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from bus_kv.protocol.codec import to_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_PIPE_COLUMNS = 10_000
"""Nothing is wrapped for a program that reads the table."""
_CELL_CHARS_MAX = 200
"""A longer key or value is cut in a table, never in JSON."""


class Output:
    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def document(self, value: Any) -> None:
        """The one JSON document; bytes become text, or base64 under `<name>_b64`."""
        indent = 2 if sys.stdout.isatty() else None
        print(json.dumps(to_json(value), ensure_ascii=False, indent=indent), flush=True)

    def line(self, text: str = "") -> None:
        """A line for people; nothing in JSON mode."""
        if not self.as_json:
            print(text, flush=True)

    def note(self, text: str) -> None:
        """A line for people about the output, on stderr; nothing in JSON mode."""
        if not self.as_json:
            print(text, file=sys.stderr, flush=True)

    def warning(self, text: str) -> None:
        """A line on stderr, in JSON mode too."""
        print(f"bus-kv: {text}", file=sys.stderr, flush=True)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Rows under headings; None is shown as -, numbers to the right."""
        print_table(columns, rows)

    def failure(self, body: dict[str, Any]) -> None:
        """A failure body: JSON on stdout, or `bus-kv: CODE: message` on stderr."""
        if self.as_json:
            self.document(body)
        else:
            message = " ".join(str(body["message"]).split())
            print(f"bus-kv: {body['code']}: {message}", file=sys.stderr, flush=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    # Imported late: most commands print no table, and a lone get should start fast.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [*rows]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[i], int | float | None) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    width = None if sys.stdout.isatty() else _PIPE_COLUMNS
    Console(width=width, highlight=False).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bytes):
        return show(value)
    if isinstance(value, float):
        return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def show(data: bytes, chars_max: int = _CELL_CHARS_MAX) -> str:
    """Bytes as printable text: what is no text is escaped, what is long is cut."""
    cut = data[: chars_max * 4]
    text = cut.decode(errors="backslashreplace")
    printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    whole = len(cut) == len(data) and len(printable) <= chars_max
    return printable if whole else f"{printable[: chars_max - 1]}…"


def version_text(version: Any) -> str | None:
    """(epoch, seq) as `--if-version` takes it; None stays None."""
    return None if version is None else f"{version[0]},{version[1]}"
