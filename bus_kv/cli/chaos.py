"""`bus-kv chaos`: faults in a private cluster under load, and whether it kept its promises."""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import shutil
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bus_kv.cli.command import Call, CommandFailed, command
from bus_kv.runtime.process import FAILED, OK, USAGE
from bus_kv.runtime.serve_options import knobs_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.cli.chaos_faults import Fault
    from bus_kv.cli.chaos_run import Plan

_VIOLATIONS_SHOWN_MAX = 5


def register(app: typer.Typer) -> None:
    command(app, "chaos")(chaos)


async def chaos(
    call: Call,
    fault: Annotated[list[str], typer.Option(help="only this fault; may be repeated")] = [],  # noqa: B006
    operations: Annotated[int, typer.Option(min=100, help="per fault, at least")] = 100_000,
    times: Annotated[int, typer.Option(min=1, help="how often each fault strikes")] = 3,
    keys: Annotated[int, typer.Option(min=1, max=999, help="hot keys")] = 64,
    shards: Annotated[int, typer.Option(min=1, max=999, help="that the keys lie in")] = 1,
    seed: Annotated[int | None, typer.Option(help="of the schedule; else a new one")] = None,
    report: Annotated[Path, typer.Option(help="the report is kept here, as JSON")] = Path(
        "chaos-report.json"
    ),
    data: Annotated[
        Path, typer.Option(help="where temporary data go: a disk, not memory")
    ] = Path(),
    knob: Annotated[
        list[str],
        typer.Option(metavar="NAME=VALUE", help="a setting of bus_kv/knobs.py for every process"),
    ] = [],  # noqa: B006
) -> int:
    """Do harm to a private cluster under load, and check that it kept its promises.

    For every fault it starts nats-server, three nodes and two coordinators, lets clients write (at
    QUORUM and ALL, with and without conditions), delete and read a few hot keys, strikes by a seeded
    schedule, and waits each time until all is whole again. Then it checks that every key's history
    is linearizable, that no acknowledged write is lost and that every request was applied once.
    "accepted" is the time from the strike until writes were accepted again in every shard,
    "standstill" the longest time without an accepted write. After a violation the exit code is 1 and
    the cluster's data are kept beside the history. The report of a run that is interrupted has what
    was measured until then, not judged.

    Faults: kill-primary, kill-backup, kill-coordinator, kill-primary-and-coordinator, kill-all,
    kill-in-turn (kill -9; the last: both backups, then the primary, which stays away longest) ·
    pause-primary, pause-backup (SIGSTOP) · cut-primary, cut-backup, mute-primary, deaf-primary
    (the link to the bus stands still, both ways or one) · restart-nats, lose-jetstream-leader (one
    of three servers) · wipe-disk (killed, and back without data) · slow-disk (every fsync takes
    100 ms more; needs strace).

    - `bus-kv chaos --fault kill-primary --times 50`
    - `bus-kv chaos --fault kill-primary --times 10 --shards 200 --keys 200`
    - `bus-kv chaos --operations 5000 --times 1 --knob heartbeat_interval_s=0.5`
    - `bus-kv chaos --seed 7 --report seven.json`
    """
    from bus_kv.cli.chaos_run import Plan
    from bus_kv.cli.local_cluster import ClusterError

    faults = _faults(fault)
    _stop_on_sigterm()
    plan = Plan(
        operations,
        times,
        keys,
        shards,
        secrets.randbelow(1 << 32) if seed is None else seed,
        _knobs(knob),
    )
    call.out.note(f"seed {plan.seed}; {len(faults)} fault(s), {times} strike(s) each")
    document: dict[str, Any] = {
        "seed": plan.seed, "operations": operations, "times": times, "keys": keys,
        "shards": shards, "knobs": dict(plan.knobs), "faults": [],
    }  # fmt: skip

    def keep(told: dict[str, Any]) -> None:
        document["faults"].append(told)
        _write(report, document)

    try:
        for chosen in faults:
            if not chosen.is_possible:
                call.out.warning(f"{chosen.name} is left out: it needs {chosen.program}")
                continue
            await _run(call, chosen, plan, data, keep)
    except ClusterError as error:
        raise CommandFailed("CLUSTER", str(error)) from None
    _tell(call, document, report)
    return FAILED if any(f["violations"] for f in document["faults"]) else OK


def _stop_on_sigterm() -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


def _faults(names: list[str]) -> list[Fault]:
    from bus_kv.cli.chaos_faults import FAULTS

    for name in names:
        if name not in FAULTS:
            known = ", ".join(FAULTS)
            raise CommandFailed("USAGE", f"there is no fault {name!r}; there are: {known}", USAGE)
    return [FAULTS[name] for name in names or FAULTS]


def _knobs(texts: list[str]) -> dict[str, float]:
    try:
        knobs = knobs_of(argparse.Namespace(knob=texts))
    except ValueError as error:
        raise CommandFailed("USAGE", str(error), USAGE) from None
    return {name: getattr(knobs, name) for name in (text.partition("=")[0] for text in texts)}


async def _run(
    call: Call, fault: Fault, plan: Plan, parent: Path, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Keep what became of it, also when it is interrupted, and after a violation the cluster's data."""
    from bus_kv.cli.chaos_run import Trial

    call.out.note(f"{fault.name}: at least {plan.operations:,} operations")
    folder = _folder(parent, fault.name)
    trial = Trial(folder, fault, plan, call.out.note)
    try:
        verdict = await trial.run()
        if verdict.is_good:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            call.out.note(f"  {fault.name}: {verdict.violations[0]}")
    except asyncio.CancelledError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        keep(trial.report.to_json() | {"data": str(folder) if folder.exists() else None})


def _folder(parent: Path, fault: str) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=f"bus_kv-chaos-{fault}-", dir=parent)).absolute()
    except OSError as error:
        reason = error.strerror or str(error)
        raise CommandFailed("FILE", f"--data {parent} cannot be written: {reason}") from None


def _write(path: Path, document: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(document, indent=1) + "\n")
    except OSError as error:
        reason = error.strerror or str(error)
        raise CommandFailed("FILE", f"--report {path} cannot be written: {reason}") from None


def _tell(call: Call, document: dict[str, Any], path: Path) -> None:
    if call.out.as_json:
        return call.out.document(document)
    names = ["fault", "operations", "acknowledged", "unmet", "refused", "indefinite"]
    times = ["accepted p50 s", "p99", "max", "standstill max s"]
    rows = [
        [*(f[n] for n in names), *f["accepted_s"].values(), f["standstill_s_max"], f["lost"],
         len(f["violations"])]
        for f in document["faults"]
    ]  # fmt: skip
    call.out.table([*names, *times, "lost", "violations"], rows)
    for fault in document["faults"]:
        for text in fault["violations"][:_VIOLATIONS_SHOWN_MAX]:
            call.out.line(f"{fault['fault']}: {text}")
        if fault["violations"]:
            call.out.line(f"{fault['fault']}: seed {document['seed']}, data in {fault['data']}")
    return call.out.line(f"The whole report: {path}")
