"""What `bus-kv chaos` does with a verdict, and its link that can be cut."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bus_kv.cli import chaos_run
from bus_kv.cli.app import app
from bus_kv.cli.chaos_checker import Verdict
from bus_kv.cli.chaos_faults import FAULTS
from bus_kv.cli.chaos_history import Call, Kind, Outcome
from bus_kv.cli.chaos_link import Link
from bus_kv.cli.chaos_run import Injection, Report, percentile


@pytest.fixture
def bad_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that found a lost write, without a cluster."""

    async def run(trial: Any) -> Verdict:
        calls = [Call("c", Kind.PUT, b"k", 0, value=b"v", outcome=Outcome.DONE, version=(1, 2))]
        lasting, short = Injection(["n1"], 5, False), Injection(["n1"], 5, True)
        lasting.accepted_s, short.accepted_s = 1.5, 0.001
        verdict = Verdict(1, ["lost: that"])
        trial.report = Report(trial.report.fault, calls, [lasting, short], verdict)
        return verdict

    monkeypatch.setattr(chaos_run.Trial, "run", run)


@pytest.mark.usefixtures("bad_trial")
def test_a_violation_fails_and_keeps_data_and_seed(tmp_path: Path):
    report = tmp_path / "report.json"
    ran = CliRunner().invoke(
        app,
        ["chaos", "--fault", "kill-all", "--seed", "5", "--data", str(tmp_path), "--report", str(report)],
    )  # fmt: skip
    assert ran.exit_code == 1, ran.output
    document = json.loads(report.read_text())
    (fault,) = document["faults"]
    assert document["seed"] == 5
    assert (fault["lost"], fault["violations"]) == (1, ["lost: that"])
    assert Path(fault["data"]).is_dir()
    assert "kill-all: lost: that" in ran.output
    assert f"seed 5, data in {fault['data']}" in ran.output


@pytest.mark.usefixtures("bad_trial")
def test_times_are_of_the_strikes_that_lasted(tmp_path: Path):
    arguments = ["--fault", "pause-primary", "--data", str(tmp_path), "--json"]
    ran = CliRunner().invoke(
        app, ["chaos", *arguments, "--report", str(tmp_path / "r.json")], catch_exceptions=False
    )
    (fault,) = json.loads(ran.stdout)["faults"]
    assert fault["accepted_s"] == {"p50": 1.5, "p99": 1.5, "max": 1.5}


def test_percentiles_are_by_nearest_rank():
    values = [float(n) for n in range(1, 51)]
    assert [percentile(values, p) for p in (50, 99, 100)] == [25.0, 50.0, 50.0]
    assert percentile([], 50) is None


def test_the_help_names_every_fault():
    text = CliRunner().invoke(app, ["chaos", "--help"], env={"COLUMNS": "200"}).output
    assert [name for name in FAULTS if name not in text] == []


# ---- the link ----


class Echo:
    """A server that sends back what it gets and remembers it."""

    def __init__(self) -> None:
        self.got = b""
        self.more = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            self.got += data
            self.more.set()
            writer.write(data)
        writer.close()


@pytest.fixture
async def echo():
    echo = Echo()
    server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
    link = Link(*server.sockets[0].getsockname())
    await link.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(link.url.rpartition(":")[2]))
    yield echo, link, reader, writer
    writer.close()
    await link.stop()
    server.close()


async def test_a_link_forwards_and_closes(echo: Any):
    _, _, reader, writer = echo
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    writer.write_eof()
    assert await reader.read() == b""


async def test_what_a_cut_link_held_back_arrives_when_it_is_mended(echo: Any):
    server, link, reader, writer = echo
    link.cut(from_bus=False)
    writer.write(b"late")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(server.more.wait(), 0.1)
    link.mend()
    assert await reader.readexactly(4) == b"late"


async def test_one_direction_is_cut_alone(echo: Any):
    server, link, reader, writer = echo
    link.cut(to_bus=False)
    writer.write(b"heard")
    await asyncio.wait_for(server.more.wait(), 5)
    assert server.got == b"heard"
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(5), 0.1)
    link.mend()
