"""Finding nats-server, and its configuration per version."""

from pathlib import Path

import pytest

from bus_kv.runtime import nats_program
from bus_kv.runtime.nats_server import (
    NatsServerError,
    NatsServerMissing,
    find_nats_cli,
    find_nats_server,
    get_nats_server,
    next_free_port,
    server_version,
    write_config,
)


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without nats-server, Go and apt-get."""
    monkeypatch.delenv("NATS_SERVER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(nats_program, "_SBIN", (str(tmp_path / "sbin"),))
    monkeypatch.setattr(nats_program, "TOOLS", tmp_path / "tools")


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_the_places_are_searched_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_nats_server() is None
    for place in ("tools", "sbin", "bin"):
        expected = program(tmp_path / place / "nats-server", "")
        assert find_nats_server() == expected
    named = program(tmp_path / "elsewhere" / "my-nats", "")
    monkeypatch.setenv("NATS_SERVER", str(named))
    assert find_nats_server() == named


def test_the_cli_is_found_in_the_same_places(tmp_path: Path) -> None:
    assert find_nats_cli() is None
    assert program(tmp_path / "tools" / "nats", "") == find_nats_cli()


def test_a_wrong_nats_server_variable_is_told_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "bin" / "nats-server", "")
    monkeypatch.setenv("NATS_SERVER", str(tmp_path / "typo"))
    with pytest.raises(NatsServerError, match=r"NATS_SERVER names no program: .*typo"):
        find_nats_server()


def test_go_builds_what_is_missing(tmp_path: Path) -> None:
    said: list[str] = []
    program(
        tmp_path / "bin" / "go",
        'case $1 in env) echo go1.25.0;; install) /bin/mkdir -p "$GOBIN";'
        ' echo "#!/bin/sh" >"$GOBIN/nats-server"; /bin/chmod +x "$GOBIN/nats-server";; esac',
    )
    assert get_nats_server(said.append) == tmp_path / "tools" / "nats-server"
    assert find_nats_server() == tmp_path / "tools" / "nats-server"
    assert len(said) == 1


@pytest.mark.parametrize("version", ["go1.24.9", "nonsense"])
def test_an_old_go_is_not_asked(tmp_path: Path, version: str) -> None:
    said: list[str] = []
    program(tmp_path / "bin" / "go", f"echo {version}")
    with pytest.raises(NatsServerMissing):
        get_nats_server(said.append)
    assert not said


def test_a_failed_build_is_told_and_the_other_ways_are_named(tmp_path: Path) -> None:
    said: list[str] = []
    program(
        tmp_path / "bin" / "go",
        "case $1 in env) echo go1.26.1;; *) echo no network >&2; exit 1;; esac",
    )
    with pytest.raises(NatsServerMissing) as caught:
        get_nats_server(said.append)
    assert said[-1] == "Go could not build nats-server: no network"
    message = str(caught.value)
    assert "\n" not in message
    for way in (
        "PATH",
        "NATS_SERVER",
        "Go 1.25",
        "apt-get install",
        "--nats",
        "NATS_URL",
        "docker",
    ):
        assert way in message


@pytest.mark.parametrize(
    ("printed", "version"),
    [("nats-server: v2.9.10", (2, 9, 10)), ("nats-server: v2.14.0-RC.1", (2, 14, 0))],
)
def test_server_version(tmp_path: Path, printed: str, version: tuple[int, int, int]) -> None:
    assert server_version(program(tmp_path / "nats-server", f"echo {printed}")) == version


@pytest.mark.parametrize("script", ["echo hello", "exit 3"])
def test_server_version_of_another_program(tmp_path: Path, script: str) -> None:
    path = program(tmp_path / "nats-server", script)
    with pytest.raises(NatsServerError, match=str(path)):
        server_version(path)


@pytest.mark.parametrize(
    ("version", "always"), [((2, 9, 10), False), ((2, 10, 0), True), ((2, 12, 15), True)]
)
def test_every_write_of_jetstream_goes_to_disk_where_the_server_can(
    version: tuple[int, int, int], always: bool
) -> None:
    config = write_config(version, port=4222, store_dir=Path("/data"))
    assert ("sync_interval: always" in config) == always
    usual = write_config(version, port=4222, store_dir=Path("/data"), sync_always=False)
    assert "sync_interval" not in usual


def test_config_holds_what_was_asked_for() -> None:
    config = write_config(
        (2, 12, 0), port=-1, store_dir=Path('/a "b"'), host="::1", extra="server_name: n1"
    )
    for line in ('host: "::1"', "port: -1", r'store_dir: "/a \"b\""', "server_name: n1"):
        assert line in config


def test_a_port_out_of_range_is_refused() -> None:
    with pytest.raises(NatsServerError, match="65536"):
        next_free_port(65536)
