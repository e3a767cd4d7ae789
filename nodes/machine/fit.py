"""Replies that fit into one message: pages are cut, values that a batch read left out, results of writes never."""

from __future__ import annotations

from typing import Any

from bus_kv.errors import ValueTooLarge
from bus_kv.protocol.codec import Codec, encode_body
from bus_kv.protocol.requests import cursor_before


def encode_fitting(codec: Codec, result: dict[str, Any], bytes_max: int) -> bytes | None:
    """The encoded reply, cut down if need be; None when even its least form is too big."""
    while len(body := encode_body(codec, result)) > bytes_max:
        if "cursor" in result and len(result.get("items", ())) > 1:
            result = _half_page(result)
        elif len(result.get("versions", ())) > 1:
            result = _half_history(result)
        elif not _leave_out_a_value(result, codec):
            return None
    return body


def _half_page(page: dict[str, Any]) -> dict[str, Any]:
    kept = page["items"][: len(page["items"]) // 2]
    next_key = page["items"][len(kept)]["key"]
    reverse = next_key < kept[-1]["key"]
    return {"items": kept, "cursor": cursor_before(kept[-1]["key"], next_key, reverse)}


def _half_history(page: dict[str, Any]) -> dict[str, Any]:
    kept = page["versions"][: len(page["versions"]) // 2]
    epoch, seq = kept[-1]["version"]
    return {**page, "versions": kept, "cursor": f"{epoch}.{seq}"}


def _leave_out_a_value(result: dict[str, Any], codec: Codec) -> bool:
    """Replace the last half of the results of a batch's largest gets by failures; False when there is none."""
    results = result.get("results", [])
    sizes = [(len(r["value"]), i) for i, r in enumerate(results) if r.get("value") is not None]
    if not sizes:
        return False
    hint = "ask for it alone" if codec is Codec.CBOR else "ask for it alone, or in CBOR"
    failure = ValueTooLarge(f"the value does not fit into the reply beside the others; {hint}")
    largest = max(sizes)[0]
    large = [i for size, i in sizes if 2 * size >= largest]
    for i in large[len(large) // 2 :]:
        results[i] = failure.to_body()
    return True
