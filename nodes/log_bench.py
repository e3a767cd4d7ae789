"""`python -m nodes.log_bench`: what a bare commit of the node's log costs, as JSON.

`bus-kv bench` runs it beside its own measurement. Entries hold puts of the given sizes and are
committed one after the other, each waiting for the one before it, the way a shard under constant
load fills them.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import tempfile
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from bus_kv.cli.measure import Result, Timing
from bus_kv.core.machine import Append, EntryRow
from bus_kv.protocol import batch as b
from bus_kv.protocol.batch import Batch
from bus_kv.protocol.entry import Entry
from nodes.log import DiskError, NodeLog

if TYPE_CHECKING:
    from collections.abc import Callable

COMMIT_DEADLINE_S = 30.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nodes.log_bench", description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path(), help="where it makes its log")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--warmup", type=float, default=1.0)
    parser.add_argument("--key-bytes", type=int, default=24)
    parser.add_argument("--value-bytes", type=int, default=100)
    parser.add_argument("--entry-operations", type=int, nargs="+", default=[1, 256, 1000])
    arguments = parser.parse_args()
    timing = Timing(arguments.warmup, arguments.seconds)
    try:
        floors = [
            measure(arguments.directory, _body(count, arguments), count, timing)
            for count in arguments.entry_operations
        ]
    except (DiskError, OSError) as error:
        print(f"bus-kv: {error}", file=sys.stderr)
        return 1
    print(json.dumps(floors))
    return 0


def _body(count: int, arguments: argparse.Namespace) -> bytes:
    """An entry as one message of `count` puts makes it."""
    batch = Batch(
        kinds=bytes([b.PUT]) * count,
        keys=[b"k" * arguments.key_bytes] * count,
        values=[b"v" * arguments.value_bytes] * count,
        client="0123456789abcdef",
        numbers=range(1, count + 1),
    )
    outcomes = bytes([b.CREATED]) * count
    return Entry("s1", 1, 1, count, (1, 0), 0, 0, (outcomes,), (batch.encode(),)).encode()


def measure(directory: Path, body: bytes, count: int, timing: Timing) -> dict[str, Any]:
    """`Result.to_json()` of commits of this entry. Raises DiskError, OSError."""
    with tempfile.TemporaryDirectory(prefix=".log_bench-", dir=directory) as name:
        log = NodeLog(Path(name), "bench")
        try:
            latencies_ns, seconds = _commit_for(log, body, timing)
        finally:
            log.close()
    operations = count * len(latencies_ns)
    result = Result(1, operations, seconds, sorted(latencies_ns))
    return {"entry_operations": count, **result.to_json()}


def _commit_for(log: NodeLog, body: bytes, timing: Timing) -> tuple[list[int], float]:
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    log.start(events.put, events.put)
    begin_ns = perf_counter_ns() + int(timing.warmup_s * 1e9)
    end_ns = begin_ns + int(timing.seconds * 1e9)
    latencies_ns: list[int] = []
    commit = _committer(log, body, events)
    started_ns = ended_ns = perf_counter_ns()
    while ended_ns < end_ns or not latencies_ns:
        commit()
        ended_ns = perf_counter_ns()
        if started_ns >= begin_ns:
            latencies_ns.append(ended_ns - started_ns)
        started_ns = ended_ns
    return latencies_ns, (ended_ns - begin_ns) / 1e9


def _committer(log: NodeLog, body: bytes, events: queue.SimpleQueue[Any]) -> Callable[[], None]:
    last = 0

    def commit() -> None:
        nonlocal last
        last += 1
        log.append(Append(last, [EntryRow("s1", last, 1, body)], []))
        outcome = events.get(timeout=COMMIT_DEADLINE_S)
        if isinstance(outcome, DiskError):
            raise outcome

    return commit


if __name__ == "__main__":
    sys.exit(main())
