"""Acknowledged means fsynced: the kernel is asked what came first, on every member that an acknowledgement counts."""

from contextlib import AsyncExitStack
from pathlib import Path

import pytest

import bus_kv
from tests.support.cluster import cluster_on
from tests.support.strace import Trace, traced

NODES = ("n1", "n2", "n3")
PUTS = 10


@pytest.mark.parametrize(("level", "counted"), [("one", 1), ("quorum", 2), ("all", 3)])
async def test_every_counted_member_has_fsynced_before_the_acknowledgement(
    nats_url: str, tmp_path: Path, level: str, counted: int
) -> None:
    puts: dict[bytes, int] = {}
    async with cluster_on(nats_url, tmp_path, nodes=3) as cluster, AsyncExitStack() as stack:
        traces = {
            node: await stack.enter_async_context(
                traced(cluster.pid(node), tmp_path / f"{node}.strace")
            )
            for node in NODES
        }
        async with bus_kv.connect(nats_url, root=cluster.root) as db:
            assert await cluster.primary() == "n1"
            for i in range(PUTS):
                value = f"value-{level}-{i}".encode()
                receipt = await db.put("key", value, consistency=level)
                assert receipt.version is not None
                await receipt.all()
                puts[value] = receipt.version[1]
    for value, seq in puts.items():
        assert_in_order(traces, value, seq, counted)


def assert_in_order(traces: dict[str, Trace], value: bytes, seq: int, counted: int) -> None:
    primary, *backups = (traces[node] for node in NODES)
    answered = primary.answered_at(after=primary.append_of(value))
    assert primary.append_of(value) < primary.durable_at(value) <= answered
    for backup in backups:
        assert backup.append_of(value) < backup.durable_at(value) <= backup.matched_at(seq)
    durable = [trace for trace in traces.values() if trace.durable_at(value) <= answered]
    assert len(durable) >= counted
