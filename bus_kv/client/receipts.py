"""What became of writes after they were acknowledged: receipts ask the shard's primary, now and then."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from bus_kv.errors import BusKVError, ConsistencyNotMet, OutcomeUnknown

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from bus_kv.client.results import Receipt

    Call = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]
    Pause = Callable[[float], Awaitable[object]]

STATES = ("unknown", "primary", "quorum", "all")
"""From nothing to the whole: each includes those before it. Beside them there is "rolled_back", which is final."""
_PAUSE_S = 0.01
_PAUSE_S_MAX = 0.5


class BusFates:
    """Asks for the receipts of one client; `call` sends a verb to any node."""

    def __init__(self, call: Call, timeout_s: float, pause: Pause = asyncio.sleep) -> None:
        self._call, self._timeout_s, self._pause = call, timeout_s, pause

    async def ask(self, receipt: Receipt) -> str:
        """The write's state now. Raises what the call raises."""
        assert receipt.version is not None
        fields = {"shard": receipt.shard, "version": [*receipt.version]}
        return str((await self._call("receipt", fields))["state"])

    async def reach(self, receipt: Receipt, level: str) -> None:
        """Return when the write is at this level; asks again after pauses that grow.

        Raises ConsistencyNotMet when it was rolled back, or has only come to quorum when the client's timeout passes;
        OutcomeUnknown when it is not known to have come even so far.
        """
        trouble: BusKVError | None = None
        pause_s = _PAUSE_S
        try:
            async with asyncio.timeout(self._timeout_s):
                while not receipt.is_known_at(level):
                    try:
                        state, trouble = await receipt.state(), None
                    except BusKVError as error:
                        if not error.retriable:
                            raise
                        state, trouble = "unknown", error
                    if state == "rolled_back":
                        raise _rolled_back(receipt)
                    if not receipt.is_known_at(level):
                        await self._pause(pause_s)
                        pause_s = min(2 * pause_s, _PAUSE_S_MAX)
        except TimeoutError:
            raise _not_reached(receipt, level, trouble) from None


def _rolled_back(receipt: Receipt) -> BusKVError:
    return ConsistencyNotMet(
        f"{_name(receipt)} was rolled back: its primary was lost before a majority had it; "
        "write it again",
        met="rolled_back",
        version=receipt.version,
    )


def _not_reached(receipt: Receipt, level: str, trouble: BusKVError | None) -> BusKVError:
    if receipt.is_known_at("quorum"):
        return ConsistencyNotMet(
            f"{_name(receipt)} is committed at quorum, not every member has it in time",
            met="quorum",
            version=receipt.version,
        )
    reason = f" ({trouble.message})" if trouble else ""
    return OutcomeUnknown(f"{_name(receipt)} is not at {level} in time{reason}; ask again")


def _name(receipt: Receipt) -> str:
    assert receipt.version is not None
    epoch, seq = receipt.version
    return f"the write at version {epoch},{seq} of shard {receipt.shard}"
