"""`bus-kv chaos` in its short form: a few faults on real processes, and what the report says."""

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from bus_kv.cli.chaos_faults import FAULTS
from bus_kv.cli.chaos_run import Plan, Trial
from bus_kv.runtime.nats_server import NatsServerMissing
from tests.support.command import DEADLINE_S, run_module, start_module
from tests.support.nats import container_servers

pytestmark = pytest.mark.usefixtures("nats_binary")

QUICK = ("--knob", "heartbeat_interval_s=0.2", "--knob", "lease_s=1")
SHORT = ("--operations", "2000", "--times", "1", "--seed", "1", *QUICK)


async def chaos(folder: Path, *arguments: str, code: int = 0) -> Any:
    ran = await run_module("bus_kv", "chaos", "--data", str(folder), *arguments, cwd=folder)
    assert ran.code == code, (ran.text, ran.err)
    return ran


@pytest.mark.parametrize("fault", ["kill-primary", "kill-in-turn", "cut-primary", "wipe-disk"])
async def test_a_fault_under_load_breaks_no_promise(tmp_path: Path, fault: str):
    ran = await chaos(tmp_path, "--fault", fault, *SHORT)
    document = json.loads((tmp_path / "chaos-report.json").read_text())
    (report,) = document["faults"]
    assert (document["seed"], report["fault"], report["violations"]) == (1, fault, [])
    assert report["operations"] >= 2000
    assert report["acknowledged"] > 1200
    assert len(report["injections"]) == 1
    assert report["injections"][0]["accepted_s"] > 0
    assert fault in ran.text
    assert [path.name for path in tmp_path.iterdir()] == ["chaos-report.json"]


async def test_every_shard_of_a_dead_node_is_taken_over(tmp_path: Path):
    """Enough of them that work which grows with their square would take minutes."""
    many = (
        "--shards",
        "60",
        "--keys",
        "20",
        "--operations",
        "1000",
        "--times",
        "1",
        "--seed",
        "1",
    )
    ran = await chaos(tmp_path, "--fault", "kill-primary", *many, *QUICK)
    document = json.loads((tmp_path / "chaos-report.json").read_text())
    (report,) = document["faults"]
    assert (document["shards"], report["violations"]) == (60, [])
    assert report["injections"][0]["accepted_s"] > 0
    assert "kill-primary" in ran.text


async def test_jetstream_may_lose_its_leader(tmp_path: Path) -> None:
    """Servers in containers where Docker runs and has an image of them, processes elsewhere."""
    plan = Plan(operations=2000, times=1, keys=16, shards=1, seed=1, knobs={"lease_s": 1})
    fault = FAULTS["lose-jetstream-leader"]
    try:
        async with container_servers(fault.servers) as servers:
            trial = Trial(tmp_path, fault, plan, lambda _: None, servers)
            verdict = await trial.run()
    except NatsServerMissing:
        trial = Trial(tmp_path, fault, plan, lambda _: None)
        verdict = await trial.run()
    report = trial.report
    assert verdict.violations == []
    assert len(report.calls) >= 2000
    (injection,) = report.injections
    assert injection.targets[0].startswith("nats-")
    assert injection.accepted_s is not None


async def test_an_interrupted_run_keeps_what_it_measured(tmp_path: Path):
    """Half an hour of strikes is not lost because the last one was not waited for."""
    endless = ("--fault", "kill-backup", "--times", "1000", "--operations", "1000", *QUICK)
    process = await start_module("bus_kv", "chaos", "--data", str(tmp_path), *endless, cwd=tmp_path)
    assert process.stderr is not None
    async with asyncio.timeout(DEADLINE_S):
        while b"1/1000: whole again" not in await process.stderr.readline():
            assert process.returncode is None
        process.send_signal(signal.SIGINT)
        await process.communicate()
    (report,) = json.loads((tmp_path / "chaos-report.json").read_text())["faults"]
    assert (report["judged"], report["lost"]) == (False, None)
    assert report["injections"][0]["accepted_s"] > 0
    assert report["operations"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["chaos-report.json"]


async def test_an_unknown_fault_is_refused_with_the_names_of_all(tmp_path: Path):
    ran = await chaos(tmp_path, "--fault", "flood", code=2)
    assert "flood" in ran.err
    assert "kill-primary" in ran.err
