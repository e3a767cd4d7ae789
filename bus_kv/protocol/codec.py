"""Bodies on the bus: strict JSON and CBOR, told apart by the first byte.

JSON when the body is empty (it stands for `{}`) or starts with `{`; CBOR when it starts with a map (0xa0–0xbf). What
does not decode entirely and unambiguously is refused here, so that every later layer sees a plain dict with text
names: trailing bytes, duplicate names, CBOR tags, NaN and infinities, lone surrogates, deep nesting.

Byte fields have one shape inside the program, `bytes` under the plain name. In JSON they are UTF-8 text under that
name or base64 under `<name>_b64`; in CBOR they are byte strings, text being accepted.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from enum import Enum
from typing import Any, NoReturn

import cbor2

from bus_kv.errors import MalformedRequest

BYTE_FIELDS = frozenset({"key", "value", "start", "end", "prefix"})
"""Names whose values are bytes."""
_BYTE_NAMES = BYTE_FIELDS | {f"{name}_b64" for name in BYTE_FIELDS}

_DEPTH_MAX = 8
"""Deepest nesting of containers in a body; the deepest legal request has four."""
_TAGS = (
    *range(6), *range(21, 26), *range(28, 38), 52, 54, 100, 256, 258, 260, 261, 1004, 43000, 55799,
)  # fmt: skip
"""Tags that cbor2 would turn into values; every other tag reaches `tag_hook`."""


class Codec(Enum):
    JSON = "json"
    CBOR = "cbor"


def codec_of(body: bytes) -> Codec:
    """The codec to answer `body` in, decodable or not; JSON when it cannot be told."""
    return Codec.CBOR if body and 0xA0 <= body[0] <= 0xBF else Codec.JSON


def decode_body(body: bytes) -> tuple[Codec, dict[str, Any]]:
    """Decode a request or reply; byte fields become `bytes` at every level. Raises MalformedRequest."""
    if codec_of(body) is Codec.CBOR:
        return Codec.CBOR, _text_to_bytes(decode_cbor(body))
    if body and body[:1] != b"{":
        raise MalformedRequest("the body is neither a JSON object nor a CBOR map")
    return Codec.JSON, _from_json(_decode_json(body or b"{}"), _DEPTH_MAX)


def decode_cbor(body: bytes) -> dict[str, Any]:
    """Decode one CBOR map strictly, leaving its values as they are. Raises MalformedRequest."""
    stream = io.BytesIO(body)
    decoder = cbor2.CBORDecoder(
        stream,
        tag_hook=_refuse_tag,
        semantic_decoders=_REFUSED_TAGS,
        max_depth=_DEPTH_MAX,
        allow_duplicate_keys=False,
        strict_hashable_types=True,
    )
    try:
        value = decoder.decode()
    except (cbor2.CBORDecodeError, ValueError, RecursionError) as error:
        raise MalformedRequest(f"the body is not valid CBOR: {error}") from None
    if stream.tell() != len(body):
        raise MalformedRequest("bytes follow after the CBOR map")
    if type(value) is not dict:
        raise MalformedRequest("the body is not a map")
    return value


def encode_cbor(value: Any) -> bytes:
    return cbor2.dumps(value)


def encode_body(codec: Codec, value: dict[str, Any]) -> bytes:
    """Encode a reply in the codec of its request."""
    return cbor2.dumps(value) if codec is Codec.CBOR else encode_json(value)


def encode_json(value: dict[str, Any]) -> bytes:
    """Encode as JSON text; byte fields become UTF-8 text, or base64 under `<name>_b64`."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    except TypeError:  # it has bytes
        text = json.dumps(to_json(value), ensure_ascii=False, separators=(",", ":"))
    return text.encode()


def to_json(value: Any) -> Any:
    """The same value as JSON can hold it."""
    if isinstance(value, dict):
        return dict(_json_item(name, item) for name, item in value.items())
    if isinstance(value, list | tuple):
        return [_json_cell(item) for item in value]
    return value


def _json_cell(item: Any) -> Any:
    """An item of a list has no name that could say what it is: bytes that are no text become {"b64": …}."""
    if not isinstance(item, bytes):
        return to_json(item)
    try:
        return item.decode()
    except UnicodeDecodeError:
        return {"b64": base64.b64encode(item).decode()}


def _json_item(name: Any, item: Any) -> tuple[str, Any]:
    if isinstance(item, bytes):
        try:
            return name, item.decode()
        except UnicodeDecodeError:
            return f"{name}_b64", base64.b64encode(item).decode()
    return name, to_json(item)


def _refuse_tag(*_: Any) -> NoReturn:
    raise ValueError("tags are not allowed")


_REFUSED_TAGS = dict.fromkeys(_TAGS, _refuse_tag)


def _decode_json(body: bytes) -> dict[str, Any]:
    try:
        text = body.decode()
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise MalformedRequest("the JSON text holds a lone surrogate") from None
    except (ValueError, RecursionError) as error:
        raise MalformedRequest(f"the body is not valid JSON: {error}") from None
    if type(value) is not dict:
        raise MalformedRequest("the body is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


def _from_json(value: Any, depth: int) -> Any:
    if not isinstance(value, list | dict):
        return value
    if not depth:
        raise MalformedRequest(f"the body is nested deeper than {_DEPTH_MAX}")
    if isinstance(value, list):
        return [_from_json(item, depth - 1) for item in value]
    result: dict[str, Any] = {}
    for name, item in value.items():
        if name in _BYTE_NAMES:
            plain, decoded = _json_field(name, item, depth - 1)
        else:
            plain, decoded = name, item
            if isinstance(item, list | dict):
                decoded = _from_json(item, depth - 1)
        if plain in result:
            raise MalformedRequest(f"{plain} and {plain}_b64 are both given")
        result[plain] = decoded
    return result


def _json_field(name: str, item: Any, depth: int) -> tuple[str, Any]:
    if name in BYTE_FIELDS and isinstance(item, str):
        return name, item.encode()
    plain = name.removesuffix("_b64")
    if plain == name:
        return name, _from_json(item, depth)
    try:
        return plain, base64.b64decode(item, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise MalformedRequest(f"{name} is not base64 text") from None


def _text_to_bytes(value: Any) -> Any:
    if isinstance(value, list):
        return [_text_to_bytes(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        name: item.encode()
        if name in BYTE_FIELDS and isinstance(item, str)
        else _text_to_bytes(item)
        for name, item in value.items()
    }
