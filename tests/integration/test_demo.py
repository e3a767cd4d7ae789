"""The demo is the main job on real data, with a crash in it; it checks itself."""

from pathlib import Path

import pytest

from tests.support.command import run_module


@pytest.mark.usefixtures("nats_binary")
async def test_the_demo_proves_that_nothing_is_lost(tmp_path: Path):
    ran = await run_module("bus_kv.cli.demo", "--characters", "8000", env={"TMPDIR": str(tmp_path)})
    assert ran.code == 0, ran.err
    assert "Everything is as it must be" in ran.text
    assert "killed after" in ran.text
    assert "writes were accepted again" in ran.text
    assert "😀" in ran.text
    assert "largest categories" in ran.text
    assert "put at version" in ran.text
    assert [*tmp_path.iterdir()] == []
