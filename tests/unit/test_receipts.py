"""A receipt asks until it knows enough, with pauses that grow; what it knows already it does not ask."""

from typing import Any

import pytest

from bus_kv.client.receipts import BusFates
from bus_kv.client.results import Receipt
from bus_kv.errors import (
    BusKVError,
    ConsistencyNotMet,
    OutcomeUnknown,
    ShardUnavailable,
    ShardUnknown,
)  # fmt: skip


class Shard:
    """Answers receipts with these states or failures, one after the other, the last one for ever."""

    def __init__(self, *answers: str | BusKVError, timeout_s: float = 10.0) -> None:
        self.answers = [*answers]
        self.asked: list[dict[str, Any]] = []
        self.pauses_s: list[float] = []
        self.fates = BusFates(self.call, timeout_s, self.pause)

    async def call(self, verb: str, fields: dict[str, Any]) -> dict[str, Any]:
        assert verb == "receipt"
        answer = self.answers[min(len(self.asked), len(self.answers) - 1)]
        self.asked.append(fields)
        if isinstance(answer, BusKVError):
            raise answer
        return {"state": answer}

    async def pause(self, pause_s: float) -> None:
        self.pauses_s.append(pause_s)
        if len(self.pauses_s) > 100:
            raise TimeoutError  # as the client's timeout does

    def receipt(self, level: str = "one", version: tuple[int, int] | None = (3, 43)) -> Receipt:
        return Receipt("s1", version, True, level, self.fates)


async def test_it_asks_until_the_write_is_committed_and_pauses_longer_each_time() -> None:
    shard = Shard("unknown", "primary", "primary", "quorum")
    receipt = shard.receipt()
    await receipt.quorum()
    assert shard.asked == [{"shard": "s1", "version": [3, 43]}] * 4
    assert len(shard.pauses_s) == 3
    assert shard.pauses_s == sorted({*shard.pauses_s})
    assert all(0.005 <= pause_s <= 0.5 for pause_s in shard.pauses_s)


async def test_pauses_have_an_upper_bound() -> None:
    shard = Shard("primary")
    with pytest.raises(OutcomeUnknown):
        await shard.receipt().quorum()
    assert max(shard.pauses_s) == shard.pauses_s[-1] <= 0.5


@pytest.mark.parametrize(("level", "asked"), [("one", 1), ("quorum", 0), ("all", 0)])
async def test_what_was_acknowledged_at_quorum_is_not_asked_for(level: str, asked: int) -> None:
    shard = Shard("all")
    receipt = shard.receipt(level)
    await receipt.quorum()
    await receipt.quorum()
    assert len(shard.asked) == asked


async def test_all_is_more_than_quorum() -> None:
    shard = Shard("quorum", "quorum", "all")
    receipt = shard.receipt("quorum")
    await receipt.all()
    assert len(shard.asked) == 3
    await receipt.all()
    assert await receipt.state() == "all"
    assert len(shard.asked) == 3


async def test_a_delete_of_nothing_has_nothing_to_wait_for() -> None:
    shard = Shard()
    receipt = shard.receipt("one", None)
    await receipt.quorum()
    await receipt.all()
    assert await receipt.state() == "all"


@pytest.mark.parametrize("wait", ["quorum", "all"])
async def test_a_write_that_was_rolled_back_is_a_failure_for_ever(wait: str) -> None:
    shard = Shard("primary", "rolled_back")
    receipt = shard.receipt()
    for _ in range(2):
        with pytest.raises(ConsistencyNotMet, match=r"3,43 of shard s1 was rolled back") as failure:
            await getattr(receipt, wait)()
    assert failure.value.detail == {"met": "rolled_back", "version": (3, 43)}
    assert await receipt.state() == "rolled_back"
    assert len(shard.asked) == 2


async def test_no_member_short_of_all_of_them_is_consistency_not_met() -> None:
    with pytest.raises(ConsistencyNotMet, match="committed at quorum") as failure:
        await Shard("primary", "quorum").receipt().all()
    assert failure.value.detail == {"met": "quorum", "version": (3, 43)}


async def test_a_shard_that_cannot_be_asked_is_asked_again_and_named_in_the_end() -> None:
    shard = Shard(ShardUnavailable("nobody serves it"), "quorum")
    await shard.receipt().quorum()
    with pytest.raises(OutcomeUnknown, match="nobody serves it"):
        await Shard(ShardUnavailable("nobody serves it")).receipt().quorum()


async def test_the_timeout_ends_a_question_that_is_under_way() -> None:
    shard = Shard("primary", timeout_s=0.0)
    with pytest.raises(OutcomeUnknown, match="not at quorum in time"):
        await shard.receipt().quorum()


async def test_a_refusal_that_asking_again_does_not_change_is_told() -> None:
    with pytest.raises(ShardUnknown):
        await Shard(ShardUnknown("there is no shard 's1'")).receipt().quorum()
