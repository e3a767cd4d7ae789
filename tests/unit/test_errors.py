"""Failures: codes, what they promise, and their way over the wire."""

import pytest

from bus_kv.errors import CODES, BusKVError, Conflict, ConsistencyNotMet, Internal, from_body
from bus_kv.protocol.messages import failure_headers

DEFINITE = {
    "MALFORMED_REQUEST": 400, "UNKNOWN_VERB": 404, "KEY_TOO_LARGE": 413, "VALUE_TOO_LARGE": 413,
    "PRECONDITION_FAILED": 412, "CONFLICT": 409, "NO_SHARD": 404, "SHARD_UNKNOWN": 404,
    "NODE_UNKNOWN": 404, "KEYSPACE_UNKNOWN": 404, "FORBIDDEN": 403, "NOT_PRIMARY": 421,
    "WRONG_SHARD": 421, "STALE_EPOCH": 421, "SHARD_UNAVAILABLE": 503, "OVERLOADED": 429,
    "SQL_REFUSED": 403, "SQL_FAILED": 400,
}  # fmt: skip
INDEFINITE = {"OUTCOME_UNKNOWN": 504, "CONSISTENCY_NOT_MET": 424, "INTERNAL": 500}
RETRIABLE = {
    "NOT_PRIMARY", "WRONG_SHARD", "STALE_EPOCH", "SHARD_UNAVAILABLE", "OVERLOADED",
    "OUTCOME_UNKNOWN",
}  # fmt: skip


def test_the_codes_are_those_of_the_contract() -> None:
    assert {code: cls.status for code, cls in CODES.items()} == DEFINITE | INDEFINITE


@pytest.mark.parametrize("code", CODES)
def test_each_class_promises_what_its_code_does(code: str) -> None:
    error = CODES[code]("what to do")
    assert error.definite is (code in DEFINITE)
    assert error.retriable is (code in RETRIABLE)
    assert error.to_body() == {"code": code, "message": "what to do", "retry": code in RETRIABLE}


@pytest.mark.parametrize("code", ["NOT_PRIMARY", "WRONG_SHARD", "STALE_EPOCH"])
def test_an_old_map_is_to_be_read_again(code: str) -> None:
    assert CODES[code].refreshes_map


@pytest.mark.parametrize("code", CODES)
def test_a_failure_comes_back_from_its_body(code: str) -> None:
    error = from_body(CODES[code]("text", met="quorum").to_body())
    assert type(error) is CODES[code]
    assert (error.message, error.detail) == ("text", {"met": "quorum"})


def test_details_travel_in_the_body() -> None:
    error = ConsistencyNotMet("text", met="quorum", version=[1, 2])
    assert error.to_body()["version"] == [1, 2]
    assert error.to_body()["met"] == "quorum"


def test_a_conflict_says_for_itself_whether_to_repeat() -> None:
    assert from_body(Conflict("locked", retriable=True).to_body()).retriable is True
    assert from_body(Conflict("read again").to_body()).retriable is False


def test_a_code_of_a_later_release_is_of_unknown_outcome() -> None:
    error = from_body({"code": "NEW", "message": "text", "retry": True})
    assert type(error) is Internal
    assert "NEW: text" in error.message


@pytest.mark.parametrize("message", ["plain", "größer ☃", "two\r\nlines", "a\x00b", "\x7f\x1b[0m"])
def test_headers_are_one_line_of_printable_ascii(message: str) -> None:
    headers = failure_headers(Internal(message))
    text = headers["Nats-Service-Error"]
    assert text.startswith("INTERNAL: ")
    assert text.isascii()
    assert text.isprintable()
    assert headers["Nats-Service-Error-Code"] == "500"


def test_every_failure_is_one_of_ours() -> None:
    assert all(issubclass(cls, BusKVError) for cls in CODES.values())
