"""`make sim`: many seeds, or one with its trace.

Columns of a trace: seconds since the start, process, what happened. `->` is a message leaving; `starts`, `crashes`,
`pauses`, `is cut` are faults; `k = ok (epoch, seq)` is a call's outcome.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from tests.simulator.run import Result, run
from tests.simulator.world import Violation


def attempt(seed: int) -> Result | str:
    try:
        return run(seed)
    except Violation as violation:
        return str(violation)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, help="how many seeds to run")
    parser.add_argument("--first", type=int, default=1, help="the first of them")
    parser.add_argument("--seed", type=int, help="run one seed and print its trace")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        print(run(arguments.seed, trace=True))
        return 0
    return run_many(range(arguments.first, arguments.first + arguments.seeds))


def run_many(seeds: range) -> int:
    started = time.monotonic()
    failures: list[str] = []
    done: list[Result] = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(attempt, seeds, chunksize=8):
            if isinstance(result, str):
                failures.append(result)
                print(f"FAILED {result}", flush=True)
            else:
                done.append(result)
    print(
        f"{len(seeds)} seeds, {sum(r.events for r in done)} events, "
        f"{sum(r.acknowledged for r in done)} acknowledged writes, "
        f"{sum(r.epochs for r in done)} epochs, {sum(r.shared for r in done)} times several shards "
        f"in one message or fsync, {sum(r.forgot for r in done)} stores that forgot, "
        f"{time.monotonic() - started:.1f} s: {len(failures)} failed"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
