"""All keys in order against a sorted set, while the keys on disk are still being learned and afterwards."""

from hypothesis import given
from hypothesis import strategies as st

from bus_kv.core.machine import LoggedBatch
from bus_kv.protocol import batch as b
from bus_kv.protocol.batch import Batch
from nodes.machine.key_order import KeyOrder

KEYS = st.sampled_from([b"a", b"b", b"c", b"d", b"e"])
STEPS = st.lists(st.lists(st.tuples(KEYS, st.booleans()), min_size=1, max_size=4), max_size=10)


def logged(keys: set[bytes], operations: list[tuple[bytes, bool]]) -> LoggedBatch:
    """Puts and deletes as a primary decides them; `keys` becomes what is there afterwards."""
    outcomes = []
    for key, is_put in operations:
        if is_put:
            outcomes.append(b.REPLACED if key in keys else b.CREATED)
            keys.add(key)
        else:
            outcomes.append(b.DELETED if key in keys else b.ABSENT)
            keys.discard(key)
    kinds = bytes([b.PUT if is_put else b.DELETE for _, is_put in operations])
    return LoggedBatch(Batch(kinds, [key for key, _ in operations]), bytes(outcomes), 1, 1, 0)


@given(st.sets(KEYS), STEPS, STEPS, st.booleans())
def test_the_order_is_that_of_the_keys_that_are_there(
    on_disk: set[bytes], during: list, after: list, reverse: bool
) -> None:
    keys = set(on_disk)
    order = KeyOrder(complete=not on_disk)
    for step in during:
        order.follow(logged(keys, step))
    if on_disk:
        order.learn(sorted(on_disk))
        order.learn(sorted(on_disk))
        order.finish()
    for step in after:
        order.follow(logged(keys, step))
        assert [*order.range(b"", None, reverse)] == sorted(keys, reverse=reverse)
    assert len(order) == len(keys)
    assert [*order.range(b"b", b"d", reverse)] == sorted(keys & {b"b", b"c"}, reverse=reverse)
