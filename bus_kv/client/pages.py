"""Replies that come page by page: each page names where the next one begins, the last one does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Call = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]


async def pages(
    call: Call,
    verb: str,
    fields: dict[str, Any],
    items: str,
    limit: int | None,
    page_size: int = 1000,
) -> AsyncIterator[list[dict[str, Any]]]:
    """The field `items` of every page, until there are no more or `limit` items in all; None means no limit.

    Raises whatever `call` raises. Fewer items than were asked for do not end it, only a cursor that is None does.
    """
    left = limit
    while left is None or left > 0:
        count = page_size if left is None else min(left, page_size)
        page = await call(verb, {**fields, "limit": count})
        yield page[items]
        if page["cursor"] is None:
            return
        left = None if left is None else left - len(page[items])
        fields = {**fields, "cursor": page["cursor"]}


async def count_pages(call: Call, fields: dict[str, Any]) -> int:
    """The sum of the counts of all pages of a scan that only counts."""
    total = 0
    while True:
        page = await call("scan", {**fields, "count_only": True})
        total += int(page["count"])
        if page["cursor"] is None:
            return total
        fields = {**fields, "cursor": page["cursor"]}


def range_fields(
    bounds: dict[str, str | bytes | None], keyspace: str, consistency: str | None
) -> dict[str, Any]:
    """The fields of a scan over these `bounds` (start, end, prefix), those that are given."""
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    fields: dict[str, Any] = {"keyspace": keyspace}
    fields |= {n: bound.encode() if isinstance(bound, str) else bound for n, bound in given.items()}
    return fields if consistency is None else fields | {"consistency": consistency}
