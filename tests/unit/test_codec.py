"""Bodies: what is written is read back, and everything else is refused and nothing but refused."""

import json
from typing import Any

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus_kv.errors import MalformedRequest
from bus_kv.protocol.codec import (
    BYTE_FIELDS,
    Codec,
    codec_of,
    decode_body,
    decode_cbor,
    encode_body,
    encode_json,
)  # fmt: skip

TEXT = st.text('aZ_{}[]":\\,u0\x00\n\u00e9\u2603\U0001f600', max_size=12)
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | TEXT
NAMES = TEXT.filter(lambda name: name.removesuffix("_b64") not in BYTE_FIELDS)
PLAIN = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=5)
BODIES = st.dictionaries(NAMES, PLAIN, max_size=4)
BYTES_BODIES = st.dictionaries(st.sampled_from(sorted(BYTE_FIELDS)), st.binary(max_size=20))


@given(BODIES, BYTES_BODIES, st.sampled_from(Codec))
def test_what_is_encoded_is_decoded(
    plain: dict[str, Any], raw: dict[str, bytes], codec: Codec
) -> None:
    body = {**plain, **raw, "ops": [raw, raw]}
    assert decode_body(encode_body(codec, body)) == (codec, body)


@given(st.binary(max_size=60))
def test_json_text_of_bytes_is_plain_where_it_can_be(value: bytes) -> None:
    (name,) = json.loads(encode_json({"value": value}))
    try:
        value.decode()
    except UnicodeDecodeError:
        assert name == "value_b64"
    else:
        assert name == "value"


@given(st.binary(max_size=200))
def test_any_bytes_are_a_map_or_malformed(body: bytes) -> None:
    _decode_or_refuse(body)


SEEDS = [
    cbor2.dumps({"key": b"a", "ops": [{"op": "put", "value": b"x"}], "limit": 2**40, "f": 1.5}),
    b'{"key":"a","ops":[{"op":"put","value_b64":"eA=="}],"limit":1e3,"n":null}',
]


@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 80), st.binary(max_size=9), st.integers(0, 3)), max_size=4),
)
@settings(max_examples=500)
def test_a_body_that_was_damaged_is_a_map_or_malformed(
    body: bytes, edits: list[tuple[int, bytes, int]]
) -> None:
    for at, inserted, removed in edits:
        body = body[:at] + inserted + body[at + removed :]
    _decode_or_refuse(body)


def _decode_or_refuse(body: bytes) -> None:
    try:
        codec, fields = decode_body(body)
    except MalformedRequest:
        return
    assert type(fields) is dict
    assert codec is codec_of(body)


@pytest.mark.parametrize("depth", [9, 60, 400, 600, 900, 990, 1100, 100_000])
@pytest.mark.parametrize(
    ("head", "open", "close"),
    [
        (b'{"key":', b"[", b"]"), (b"", b'{"a":', b"}"), (b'{"\\u0061":', b"[", b"]"),
        (b"\xa1\x63key", b"\x81", b""), (b"", b"\xa1\x61a", b""),
    ],
)  # fmt: skip
def test_deep_nesting_is_malformed(head: bytes, open: bytes, close: bytes, depth: int) -> None:
    body = head + open * depth + b"1" + close * depth + (b"}" if head[:1] == b"{" else b"")
    with pytest.raises(MalformedRequest):
        decode_body(body)


@pytest.mark.parametrize("tag", [0, 1, 2, 3, 4, 5, 21, 24, 25, 28, 29, 30, 32, 35, 36, 37, 52, 54,
                                 100, 104, 256, 258, 260, 261, 1004, 43000, 55799, 2**40])  # fmt: skip
def test_every_tag_is_malformed(tag: int) -> None:
    contents: list[Any] = [b"x", "x", 1, [1, 2], {}]
    for content in contents:
        body = cbor2.dumps({"key": cbor2.CBORTag(tag, content)})
        with pytest.raises(MalformedRequest):
            decode_cbor(body)


def test_an_empty_body_is_an_empty_map() -> None:
    assert decode_body(b"") == (Codec.JSON, {})


@pytest.mark.parametrize("first", range(256))
def test_the_first_byte_tells_the_codec(first: int) -> None:
    assert codec_of(bytes([first])) is (Codec.CBOR if 0xA0 <= first <= 0xBF else Codec.JSON)
