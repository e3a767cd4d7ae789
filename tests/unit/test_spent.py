"""What is no longer needed goes in parts: none takes long, and in the end nothing is held."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nodes.machine.spent import RECORDS_PER_TURN, Spent

if TYPE_CHECKING:
    from nodes.machine.table import Writes


@pytest.mark.parametrize("sizes", [[3 * RECORDS_PER_TURN + 1], [100] * 500, [7, 9000, 7]])
def test_all_of_it_goes_a_part_a_turn(sizes: list[int]) -> None:
    spent, held = Spent(), set[bytes]()

    class Value(bytes):
        def __del__(self) -> None:
            held.discard(bytes(self))

    def writes(place: int, size: int) -> Writes:
        keys = [b"%d/%d" % (place, i) for i in range(size)]
        held.update(keys)
        return {key: (Value(key), 1, 1, None) for key in keys}

    for place, size in enumerate(sizes):
        spent.add(writes(place, size))
    while held:
        before = len(held)
        spent.release_some()
        assert 0 < before - len(held) <= RECORDS_PER_TURN
