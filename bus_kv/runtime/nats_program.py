"""Where the program nats-server is, and getting it when it is nowhere.

Imports nothing but the standard library, so that set-up can run this file on its own:
`python bus_kv/runtime/nats_program.py --get` prints the server it found or fetched.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Version = tuple[int, int, int]

TOOLS = Path(__file__).resolve().parents[2] / ".tools" / "bin"
"""Where a checkout keeps the programs that set-up fetched."""
_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")
"""Where Debian puts servers; a user's PATH does not name these folders."""

_SERVER_MODULE = "github.com/nats-io/nats-server/v2@v2.12.15"
_CLI_MODULE = "github.com/nats-io/natscli/nats@v0.4.0"
_GO_VERSION_MIN = (1, 25)

_QUERY_TIMEOUT_S = 20.0
_FETCH_TIMEOUT_S = 300.0
_BUILD_TIMEOUT_S = 1200.0


class NatsServerError(Exception):
    """nats-server cannot be used; the message is one line saying why or what to do."""


class NatsServerMissing(NatsServerError):
    """No nats-server here, and none to be had."""

    def __init__(self) -> None:
        go_version = ".".join(map(str, _GO_VERSION_MIN))
        super().__init__(
            "nats-server is missing: put it on PATH or name it in NATS_SERVER, or install Go "
            f"{go_version} or later and run make setup again, or run apt-get install nats-server, "
            "or use a running server (bus-kv: --nats URL, tests: NATS_URL), for instance Docker's: "
            "docker run -p 4222:4222 nats:2.12-alpine -js"
        )


def find_nats_server() -> Path | None:
    """The program: $NATS_SERVER, on PATH, in a folder for servers, or fetched by set-up.

    Raises NatsServerError if $NATS_SERVER does not name a program.
    """
    named = os.environ.get("NATS_SERVER")
    if not named:
        return _find("nats-server")
    found = shutil.which(named)
    if found is None:
        raise NatsServerError(f"NATS_SERVER names no program: {named}: correct it or unset it")
    return Path(found)


def find_nats_cli() -> Path | None:
    """The `nats` command, which is useful and never needed."""
    return _find("nats")


def get_nats_server(log: Callable[[str], None]) -> Path:
    """The program, fetched into `TOOLS` if there is none: built by Go, else Debian's.

    May take minutes; `log` is told what is being done. Raises NatsServerMissing.
    """
    found = find_nats_server() or _go_install(_SERVER_MODULE, log) or _apt_download(log)
    if found is None:
        raise NatsServerMissing
    return found


def get_nats_cli(log: Callable[[str], None]) -> Path | None:
    """The `nats` command, built by Go if there is none; None if that fails."""
    return find_nats_cli() or _go_install(_CLI_MODULE, log)


def server_version(path: Path) -> Version:
    """What `nats-server --version` says, such as (2, 12, 15). Raises NatsServerError."""
    try:
        text = _run([path, "--version"], timeout_s=_QUERY_TIMEOUT_S)
    except _CommandFailed as failed:
        raise NatsServerError(f"{path} does not run: {failed}") from failed
    match = re.search(r"\bv?(\d+)\.(\d+)\.(\d+)", text)
    if match is None:
        raise NatsServerError(f"{path} is no nats-server: its --version says {text[:80]!r}")
    major, minor, patch = map(int, match.groups())
    return major, minor, patch


def docker_answers() -> bool:
    """Whether the `docker` command is here and reaches its daemon."""
    try:
        _run(["docker", "info"], timeout_s=_QUERY_TIMEOUT_S)
    except _CommandFailed:
        return False
    return True


class _CommandFailed(Exception):
    pass


def _run(
    argv: Sequence[str | Path],
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> str:
    """What the command wrote to stdout. Raises _CommandFailed with its last line of complaint."""
    try:
        done = subprocess.run(
            argv,
            env=env,
            cwd=folder,
            timeout=timeout_s,
            capture_output=True,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _CommandFailed(f"no end after {timeout_s:.0f} s") from None
    except OSError as error:
        raise _CommandFailed(error.strerror or str(error)) from error
    if done.returncode != 0:
        complaint = (done.stderr or done.stdout).strip().splitlines()
        raise _CommandFailed(complaint[-1] if complaint else f"exit code {done.returncode}")
    return done.stdout


def _find(program: str) -> Path | None:
    places = os.pathsep.join((os.environ.get("PATH", os.defpath), *_SBIN, str(TOOLS)))
    found = shutil.which(program, path=places)
    return None if found is None else Path(found)


def _go_install(module: str, log: Callable[[str], None]) -> Path | None:
    go = shutil.which("go")
    if go is None or _go_version(go) < _GO_VERSION_MIN:
        return None
    program = TOOLS / module.partition("@")[0].removesuffix("/v2").rpartition("/")[2]
    log(f"building {module} with Go (takes minutes, once)")
    # Without cgo no C compiler is needed.
    env = os.environ | {"GOBIN": str(TOOLS), "CGO_ENABLED": "0"}
    try:
        _run([go, "install", module], timeout_s=_BUILD_TIMEOUT_S, env=env)
    except _CommandFailed as failed:
        log(f"Go could not build {program.name}: {failed}")
        return None
    return program


def _go_version(go: str) -> tuple[int, ...]:
    try:
        text = _run([go, "env", "GOVERSION"], timeout_s=_QUERY_TIMEOUT_S)
    except _CommandFailed:
        return ()
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def _apt_download(log: Callable[[str], None]) -> Path | None:
    """Debian's package, unpacked and not installed: that needs no rights and starts no service."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return None
    log("fetching Debian's nats-server with apt-get")
    program = TOOLS / "nats-server"
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            _download_package("nats-server", folder)
            (package,) = folder.glob("*.deb")
            _run(["dpkg-deb", "-x", package, folder], timeout_s=_FETCH_TIMEOUT_S)
            TOOLS.mkdir(parents=True, exist_ok=True)
            shutil.move(folder / "usr" / "sbin" / "nats-server", program)
    except (_CommandFailed, OSError) as failed:
        log(f"apt-get could not fetch nats-server: {failed}")
        return None
    return program


def _download_package(package: str, folder: Path) -> None:
    download = ["apt-get", "--quiet", "download", package]
    try:
        _run(download, timeout_s=_FETCH_TIMEOUT_S, folder=folder)
    except _CommandFailed:
        # A fresh machine has no package lists yet; only root may fetch them.
        as_root = [] if os.geteuid() == 0 else ["sudo", "--non-interactive"]
        _run([*as_root, "apt-get", "--quiet", "update"], timeout_s=_FETCH_TIMEOUT_S)
        _run(download, timeout_s=_FETCH_TIMEOUT_S, folder=folder)


def main() -> int:
    """`--get`: find or fetch the server and the `nats` command, and print where they are."""
    parser = argparse.ArgumentParser(prog="python bus_kv/runtime/nats_program.py")
    parser.add_argument("--get", action="store_true", required=True, help=main.__doc__)
    parser.parse_args()
    try:
        server = get_nats_server(_tell)
        version = ".".join(map(str, server_version(server)))
    except NatsServerMissing as missing:
        _tell(str(missing))
        # The tests can do without: with a running server, or with one in a container.
        return 0 if os.environ.get("NATS_URL") or docker_answers() else 1
    except NatsServerError as error:
        _tell(str(error))
        return 1
    cli = get_nats_cli(_tell)
    _tell(f"nats-server {version} is {server}" + (f", nats is {cli}" if cli else ""))
    return 0


def _tell(line: str) -> None:
    print(f"make setup: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
