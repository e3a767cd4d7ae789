"""The arithmetic behind `bus-kv bench`: what is picked, and what percentiles say."""

from collections import Counter

import pytest

from bus_kv.cli.measure import Result, Spread, Timing, in_turn, pick, run_callers


def test_percentiles_are_of_the_sorted_latencies():
    result = Result(1, 100, 2.0, [n * 1_000_000 for n in range(1, 101)])
    document = result.to_json()
    assert document["operations_per_s"] == 50.0
    assert document["latency_ms"] == {"p50": 51.0, "p90": 91.0, "p99": 100.0, "max": 100.0}


@pytest.mark.parametrize("distribution", ["uniform", "zipfian"])
def test_picks_lie_among_the_keys_and_repeat_with_the_seed(distribution: str):
    picked = pick(1000, distribution, seed=7, picks=5000)
    assert len(picked) == 5000
    assert set(picked) <= set(range(1000))
    assert picked == pick(1000, distribution, seed=7, picks=5000)
    assert picked != pick(1000, distribution, seed=8, picks=5000)


def test_zipfian_picks_have_hot_keys_and_uniform_ones_have_not():
    def share_of_hottest(distribution: str) -> float:
        counts = Counter(pick(10_000, distribution, seed=1))
        return counts.most_common(1)[0][1] / counts.total()

    assert share_of_hottest("zipfian") > 0.05
    assert share_of_hottest("uniform") < 0.005


async def test_every_caller_is_counted_however_short_the_time():
    async def call(argument: int) -> None:
        del argument

    result = await run_callers(call, [1, 2, 3], callers=5, timing=Timing(0.0, 0.0))
    assert result.operations >= 5
    assert result.latency_ms(100) >= result.latency_ms(50) >= 0


async def test_a_failing_call_ends_the_measurement_with_its_failure():
    async def call(argument: int) -> None:
        raise ValueError(argument)

    with pytest.raises(ValueError, match="1"):
        await run_callers(call, [1], callers=3, timing=Timing(0.0, 1.0))


async def test_rounds_are_taken_in_turn_and_kept_in_pairs():
    order: list[str] = []

    async def run(name: str, round: int) -> Result:
        order.append(name)
        return Result(round, 1, 1.0 if name == "first" else 2.0, [1])

    pairs = await in_turn(lambda i: run("first", i), lambda i: run("second", i), rounds=3)
    assert order == ["first", "second", "second", "first", "first", "second"]
    assert [(a.callers, b.callers) for a, b in pairs] == [(0, 0), (1, 1), (2, 2)]
    assert {(a.seconds, b.seconds) for a, b in pairs} == {(1.0, 2.0)}


def test_a_spread_is_the_median_between_least_and_most():
    assert Spread.of([3, 1, 2, 10, 2.5]) == Spread(2.5, 1, 10)
    assert str(Spread.of([1, 2, 4])) == "2.00 (1.00–4.00)"
    assert str(Spread.of([900, 1100.4, 20_000])) == "1,100 (900–20,000)"
