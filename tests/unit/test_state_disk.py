"""The state's file in trouble: killed processes, full disks, damaged and foreign files."""

import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, cast

import duckdb
import pytest

import nodes.state
from bus_kv.core.machine import Lookup, Mark
from nodes.log import DiskError, DiskFull
from nodes.state import set_aside
from nodes.state_file import explain
from nodes.state_undo import Undo, undo_unfinished
from tests.support.command import environment
from tests.support.state import (
    RandomWriter,
    State,
    Writer,
    folded_until,
    open_state,
    puts,
)

ROUNDS = 10
CHECKPOINT_WAL_BYTES = 60_000
CHILD_WITHIN_S = 60.0
FILE = "state.duckdb"
PAGE_BYTES, BLOCK_BYTES, HEADERS_BYTES = 4 << 10, 256 << 10, 12 << 10


def start_child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that can be killed, or have limits of its own. `code` finds the arguments in `args`."""
    prelude = "import sys\nargs = sys.argv[1:]\n"
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
    )  # fmt: skip


def run_child(code: str, *arguments: object) -> str:
    with start_child(code, *arguments) as child:
        output, _ = child.communicate(timeout=CHILD_WITHIN_S)
    assert child.returncode == 0, output
    return output


# ---- kill -9 ----

FOLD_FOR_EVER = """
from pathlib import Path
from tests.support.state import fold_for_ever
fold_for_ever(Path(args[0]), int(args[1]), int(args[2]))
"""


def test_a_killed_process_leaves_whole_folds(tmp_path: Path) -> None:
    randomness = random.Random(os.environ.get("SEED", "kill"))
    data, seed, last = tmp_path / "data", randomness.randrange(1000), 0
    data.mkdir()
    for round in range(ROUNDS):
        acknowledged = max(last, kill_while_it_folds(data, seed, randomness.randrange(25)))
        # A copy is looked at, so that the next process finds what the killed one left.
        copy = tmp_path / f"copy-{round}"
        shutil.copytree(data, copy)
        state = State(copy)
        mark = state.store.marks().get("s1", Mark())
        last = mark.last
        assert last >= acknowledged
        if last:
            assert state.contents("s1") == folded_until(seed, mark)
        state.store.close()
        shutil.rmtree(copy)
    assert last > ROUNDS


def test_a_killed_process_starts_from_the_last_checkpoint_where_the_log_goes_on(
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    acknowledged = kill_while_it_folds(data, 3, 30)
    assert (data / f"{FILE}.wal").stat().st_size > 0
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    told: list[dict[str, Mark]] = []

    def goes_on(marks: dict[str, Mark]) -> bool:
        told.append(marks)
        return True

    state = State(data, goes_on=goes_on)
    assert told == [state.store.marks()]
    mark = told[0]["s1"]
    assert 0 < mark.last < acknowledged
    assert state.contents("s1") == folded_until(3, mark)
    state.store.close()
    state = State(copy, goes_on=lambda _: False)
    assert state.store.marks()["s1"].last >= acknowledged
    state.store.close()


def test_a_checkpoint_is_told_with_what_it_has(tmp_path: Path) -> None:
    state, writer = State(tmp_path, checkpoint_wal_bytes=1), Writer()
    for key in (b"a", b"b"):
        state.do(writer.fold(puts([key])))
        state.wait_checkpointed("s1", writer.on_disk.mark.last)
    state.store.close()


def test_what_was_folded_is_checkpointed_once_nothing_more_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the checkpoints before took: until then a start has it all to replay."""
    monkeypatch.setattr(nodes.state, "CHECKPOINT_PAUSE", 1 << 60)
    monkeypatch.setattr(nodes.state, "IDLE_S", 0.01)
    monkeypatch.setattr(nodes.state, "CHECKPOINT_REST_S", 0.02)
    state, writer = State(tmp_path, checkpoint_wal_bytes=1 << 30), Writer()
    for round in range(2):
        state.do(writer.fold(puts([b"%d %d" % (round, i) for i in range(100)], bytes(1 << 15))))
        state.wait_checkpointed("s1", writer.on_disk.mark.last)
    state.store.close()


def test_a_checkpoint_that_was_cut_short_in_a_block_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DuckDB writes blocks again to which the last checkpoint still refers; a kill leaves one part new, part old."""
    data, before, after = (tmp_path / name for name in ("data", "before", "after"))
    state, writer = State(data), Writer()
    state.do(writer.fold(puts([b"%d" % i for i in range(1000)])))
    state.store.close()

    keep, forget = Undo.keep, Undo.forget

    def keep_and_copy(undo: Undo, db: Any) -> None:
        keep(undo, db)
        shutil.copytree(data, before)

    def copy_and_forget(undo: Undo) -> None:
        shutil.copytree(data, after)
        forget(undo)

    monkeypatch.setattr(Undo, "keep", keep_and_copy)
    monkeypatch.setattr(Undo, "forget", copy_and_forget)
    state = State(data)
    state.do(writer.fold(puts([b"%d" % i for i in range(500, 1500)])))
    state.store.close()
    monkeypatch.undo()
    assert [path.name for path in data.iterdir()] == [FILE]
    shutil.copytree(before, data, dirs_exist_ok=True)
    tear(data / FILE, (after / FILE).read_bytes())
    state = State(data)
    assert state.contents("s1") == writer.on_disk
    state.store.close()
    # What was undone was needed.
    (before / f"{FILE}.undo").unlink()
    tear(before / FILE, (after / FILE).read_bytes())
    assert "--rebuild" in refusal(before)


def test_what_a_checkpoint_overwrites_is_not_put_back_once_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Undo, "forget", lambda undo: None)
    state, writer = State(tmp_path), Writer()
    for key in (b"a", b"b"):
        state.do(writer.fold(puts([key])))
        state.store.close()
        assert (tmp_path / f"{FILE}.undo").exists()
        state = State(tmp_path)
        assert state.contents("s1") == writer.on_disk
    state.store.close()


def test_a_checkpoint_for_whose_undoing_there_is_no_space_is_put_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = Undo.keep

    def fail(undo: Undo, db: Any) -> None:
        monkeypatch.setattr(Undo, "keep", keep)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(nodes.state, "CHECKPOINT_RETRY_S", 0.0)
    monkeypatch.setattr(nodes.state, "IDLE_S", 0.01)
    state, writer = State(tmp_path, checkpoint_wal_bytes=1), Writer()
    state.do(writer.fold(puts([b"a"])))
    state.wait_checkpointed("s1", writer.on_disk.mark.last)
    monkeypatch.setattr(Undo, "keep", fail)
    state.do(writer.fold(puts([b"b"])))
    state.wait_checkpointed("s1", writer.on_disk.mark.last)
    state.store.close()
    assert state.failures.empty()


def test_a_disk_that_fails_before_a_checkpoint_ends_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(undo: Undo, db: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    state = State(tmp_path, checkpoint_wal_bytes=1)
    state.do(Writer().fold(puts([b"a"])))
    monkeypatch.setattr(Undo, "keep", fail)
    state.store.submit(Writer("s2").fold(puts([b"b"])))
    assert "Input/output error" in str(state.failures.get(timeout=CHILD_WITHIN_S))
    state.store.close()


def test_every_block_that_a_checkpoint_overwrites_is_kept(tmp_path: Path) -> None:
    path, blocks = tmp_path / FILE, [bytes([i]) * BLOCK_BYTES for i in range(4)]
    whole = bytes(HEADERS_BYTES) + b"".join(blocks)
    path.write_bytes(whole)
    undo = Undo(path)
    undo.keep(cast("Any", MetadataOf([1, 3, 9])))
    path.write_bytes(bytes(HEADERS_BYTES) + b"".join([blocks[0], bytes(9), blocks[2]]))
    undo_unfinished(path)
    undo.close()
    content = path.read_bytes()
    assert content[: HEADERS_BYTES + BLOCK_BYTES] == whole[: HEADERS_BYTES + BLOCK_BYTES]
    places = [HEADERS_BYTES + i * BLOCK_BYTES for i in (1, 3)]
    assert [content[at : at + BLOCK_BYTES] for at in places] == [blocks[1], blocks[3]]


class MetadataOf:
    """DuckDB, as far as it tells which blocks have metadata."""

    def __init__(self, block_ids: list[int]) -> None:
        self._rows = [(id,) for id in block_ids]

    def execute(self, _: str) -> Self:
        return self

    def fetchall(self) -> list[tuple[int]]:
        return self._rows


def test_without_space_no_half_of_a_copy_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / FILE).write_bytes(bytes(HEADERS_BYTES))
    undo = Undo(tmp_path / FILE)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        undo.keep(cast("Any", MetadataOf([])))
    undo.close()
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_checkpoint_is_made_by_the_store_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by DuckDB when it closes the file: nothing would be kept to undo it."""
    state, writer = State(tmp_path), Writer()
    state.do(writer.fold(puts([b"a"])))
    monkeypatch.setattr(state.store, "_checkpoint", lambda: None)
    state.do(writer.fold(puts([b"b"])))
    before = (tmp_path / FILE).read_bytes()
    state.store.close()
    assert (tmp_path / FILE).read_bytes() == before
    assert (tmp_path / f"{FILE}.wal").stat().st_size > 0
    state = State(tmp_path)
    assert state.contents("s1") == writer.on_disk
    state.store.close()


def test_nobody_else_can_open_the_file_of_a_running_node(tmp_path: Path) -> None:
    """Also after checkpoints, before which the node reads it by itself."""
    code = "import duckdb; duckdb.connect(args[0])"
    state, writer = State(tmp_path, checkpoint_wal_bytes=1), Writer()
    for key in (b"a", b"b"):
        state.do(writer.fold(puts([key])))
        state.wait_checkpointed("s1", writer.on_disk.mark.last)
        with start_child(code, tmp_path / FILE) as child:
            output, _ = child.communicate(timeout=CHILD_WITHIN_S)
        assert "Could not set lock" in output
    state.store.close()
    assert run_child(code, tmp_path / FILE) == ""


def tear(path: Path, after: bytes) -> None:
    """As if the process had been killed when the first page of each block was written."""
    content = bytearray(path.read_bytes())
    for at in range(HEADERS_BYTES, len(content), BLOCK_BYTES):
        content[at : at + PAGE_BYTES] = after[at : at + PAGE_BYTES]
    path.write_bytes(content)


def kill_while_it_folds(data: Path, seed: int, folds: int) -> int:
    """Last acknowledged seq of a process that was killed after so many more folds, or while it began."""
    with start_child(FOLD_FOR_EVER, data, seed, CHECKPOINT_WAL_BYTES) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(folds)]
        child.kill()
        lines += child.stdout.readlines()
    complete = [line for line in lines if line.endswith("\n")]
    assert all(line.strip().isdigit() for line in complete), complete
    return int(complete[-1]) if complete else 0


# ---- a full disk ----

LIMITED = """
import logging, resource
from pathlib import Path
from bus_kv.core.machine import Answered, FoldStalled, RangeCount
from tests.support.state import State, Writer, puts
import nodes.state

logging.disable()
nodes.state.CHECKPOINT_RETRY_S = 0.0
state = State(Path(args[0]), checkpoint_wal_bytes=int(args[1]))
writer = Writer()
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, unlimited[1]))
done = writer.on_disk
for n in range(1000):
    done = len(writer.on_disk.kv)
    state.store.submit(writer.fold(puts([b"%d-%d" % (n, i) for i in range(100)], b"v" * 500)))
    event = state.next_event()
    if isinstance(event, FoldStalled):
        break
assert "no space left" in event.reason, event
assert state.store.marks()["s1"].keys == done
"""

GOES_ON = """
state.store.submit(RangeCount(1, "s1", b"", None))
assert state.next_event().rows == [done]
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
assert state.next_event() == FoldStalled("")
assert isinstance(state.next_event(), Answered)
state.do(writer.fold(puts([b"last"])))
assert state.contents("s1") == writer.on_disk
assert state.failures.empty()
state.store.close()
state = State(Path(args[0]))
assert state.contents("s1") == writer.on_disk
state.store.close()
"""


@pytest.mark.parametrize(
    "checkpoint_wal_bytes",
    [pytest.param(1 << 30, id="in the log"), pytest.param(1 << 19, id="in the checkpoint")],
)
def test_a_fold_waits_for_space(tmp_path: Path, checkpoint_wal_bytes: int) -> None:
    run_child(LIMITED + GOES_ON, tmp_path, checkpoint_wal_bytes)


def test_a_node_can_stop_while_the_disk_is_full(tmp_path: Path) -> None:
    run_child(LIMITED + "state.store.close()", tmp_path, 1 << 30)
    state = State(tmp_path)
    assert state.failures.empty()
    assert state.records([b"0-0"])
    state.store.close()


def test_a_process_ends_without_a_word(tmp_path: Path) -> None:
    code = """
from pathlib import Path
from tests.support.state import State, Writer, puts
state = State(Path(args[0]))
state.do(Writer().fold(puts([b"k"])))
state.store.close()
"""
    assert run_child(code, tmp_path) == ""


# ---- an attachment that DuckDB has given up ----


def test_after_a_failed_checkpoint_the_file_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, writer = State(tmp_path, checkpoint_wal_bytes=1), Writer()
    state.do(writer.fold(puts([b"a"])))
    file = state.store._file

    def fail() -> None:
        raise duckdb.IOException("Checkpoint failed, the database has been invalidated")

    monkeypatch.setattr(file, "checkpoint", fail)
    state.do(writer.fold(puts([b"b"])))
    monkeypatch.undo()
    state.do(writer.fold(puts([b"c"])))
    assert state.contents("s1") == writer.on_disk
    state.store.close()
    assert state.failures.empty()


def test_a_checkpoint_that_failed_in_a_block_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, writer = State(tmp_path / "data", checkpoint_wal_bytes=1), Writer()
    state.do(writer.fold(puts([b"a"])))
    state.wait_checkpointed("s1", writer.on_disk.mark.last)
    file, path = state.store._file, tmp_path / "data" / FILE

    def fail() -> None:
        monkeypatch.undo()
        file._undo.keep(file._instance)
        metadata = "SELECT block_id FROM pragma_metadata_info('state')"
        ids = [id for (id,) in file._instance.execute(metadata).fetchall()]
        file._instance.execute("DETACH state")
        with path.open("r+b") as torn:
            for id in ids:
                torn.seek(HEADERS_BYTES + id * BLOCK_BYTES)
                torn.write(bytes(PAGE_BYTES))
        raise duckdb.IOException("Checkpoint failed, the database has been invalidated")

    monkeypatch.setattr(file, "checkpoint", fail)
    state.do(writer.fold(puts([b"b"])))
    state.do(writer.fold(puts([b"c"])))
    assert state.contents("s1") == writer.on_disk
    state.store.close()
    assert state.failures.empty()


def test_a_fold_that_was_durable_though_it_failed_is_not_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, writer = State(tmp_path), Writer()
    state.do(writer.fold(puts([b"a"])))
    write = state.store._writer.write

    def write_and_fail(*arguments: Any) -> None:
        monkeypatch.undo()
        write(*arguments)
        raise duckdb.FatalException("database has been invalidated")

    monkeypatch.setattr(state.store._writer, "write", write_and_fail)
    state.do(writer.fold(puts([b"b"], client="c", numbers=range(1))))
    assert state.contents("s1") == writer.on_disk
    state.store.close()
    assert state.failures.empty()


# ---- files that are not what they should be ----


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The directory of a node that was stopped, with some keys."""
    state, writer = State(tmp_path), RandomWriter(seed=5)
    for _ in range(5):
        state.do(writer.next_fold())
    state.store.close()
    return tmp_path


def refusal(directory: Path, **options: Any) -> str:
    with pytest.raises(DiskError) as refused:
        open_state(directory, **options)
    assert str(directory / FILE) in str(refused.value)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def change_meta(directory: Path, name: str, value: str) -> None:
    with duckdb.connect(directory / FILE) as db:
        db.execute("UPDATE meta SET value = ? WHERE name = ?", [value, name])


def as_garbage(path: Path) -> None:
    path.write_bytes(b"garbage " * 100_000)


def test_a_file_that_was_cut_off_ends_the_node(tmp_path: Path) -> None:
    state, writer = State(tmp_path), Writer()
    batch = puts([b"%d" % i for i in range(20_000)])
    batch.values = [random.Random(i).randbytes(100) for i in range(20_000)]
    state.do(writer.fold(batch))
    state.store.close()
    os.truncate(tmp_path / FILE, 3 * BLOCK_BYTES)
    (complaint,) = complaints_of(tmp_path, batch.keys)[:1]
    assert "--rebuild" in complaint


def as_empty(path: Path) -> None:
    path.write_bytes(b"")


def without_tables(path: Path) -> None:
    path.unlink()
    duckdb.connect(path).close()


@pytest.mark.parametrize("spoil", [as_garbage, as_empty, without_tables])
def test_a_damaged_file_is_refused(stopped: Path, spoil: Callable[[Path], None]) -> None:
    spoil(stopped / FILE)
    message = refusal(stopped)
    assert "damaged" in message
    assert "--rebuild" in message


def test_a_log_without_its_file_is_refused(stopped: Path) -> None:
    (stopped / FILE).rename(stopped / f"{FILE}.wal")
    assert "--rebuild" in refusal(stopped)


@pytest.mark.parametrize(
    "error",
    [
        duckdb.OutOfMemoryException("could not allocate block"),
        duckdb.TransactionException(
            "TransactionContext Error: Failed to commit: failed to pin block of size 256.0 KiB"
        ),
    ],
)
def test_too_little_memory_is_no_damage(tmp_path: Path, error: duckdb.Error) -> None:
    problem = explain(tmp_path / FILE, error)
    assert isinstance(problem, DiskFull)
    assert "not enough memory" in str(problem)


@pytest.mark.parametrize(("version", "says"), [("99", "newer"), ("1", "older")])
def test_another_format_is_refused(stopped: Path, version: str, says: str) -> None:
    change_meta(stopped, "format_version", version)
    message = refusal(stopped)
    assert f"format {version}, {says} than" in message
    assert "--rebuild" in message


def test_the_state_of_another_log_is_refused(stopped: Path) -> None:
    message = refusal(stopped, incarnation="another")
    assert "belongs to another log" in message
    assert "--rebuild" in message


def test_what_a_killed_process_left_unfinished_is_taken_away(stopped: Path) -> None:
    (stopped / f"{FILE}.new").write_bytes(b"half")
    (stopped / "state.tmp").mkdir()
    open_state(stopped).close()
    assert [path.name for path in stopped.iterdir()] == [FILE]


def test_a_damaged_file_is_set_aside_and_made_anew(stopped: Path) -> None:
    as_garbage(stopped / FILE)
    for suffix in ("wal", "undo"):
        (stopped / f"{FILE}.{suffix}").write_bytes(b"more")
    assert set_aside(stopped) == stopped / f"{FILE}.1.damaged"
    names = {path.name for path in stopped.iterdir()}
    aside = f"{FILE}.1.damaged"
    assert names == {aside, f"{aside}.wal", f"{aside}.undo"}
    state = State(stopped)
    assert state.store.marks() == {}
    state.do(Writer().fold(puts([b"k"])))
    state.store.close()
    assert set_aside(stopped) == stopped / f"{FILE}.2.damaged"
    assert set_aside(stopped) is None


def test_bytes_that_went_bad_end_the_node(tmp_path: Path) -> None:
    """Wherever they are, and at the latest when they are read."""
    data, values, writer = tmp_path / "data", random.Random(1), Writer()
    state = State(data)
    for n in range(3):
        batch = puts([b"%d-%d" % (n, i) for i in range(3000)])
        batch.values = [values.randbytes(100) for _ in batch.keys]
        state.do(writer.fold(batch))
    state.store.close()
    complaints = []
    for at in range(HEADERS_BYTES, (data / FILE).stat().st_size, BLOCK_BYTES):
        copy = tmp_path / f"copy-{at}"
        shutil.copytree(data, copy)
        turn_byte(copy / FILE, at + BLOCK_BYTES // 4)
        complaints += complaints_of(copy, [*writer.on_disk.kv])
    assert len(complaints) > 2
    assert all("--rebuild" in complaint for complaint in complaints)


def turn_byte(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def complaints_of(directory: Path, keys: list[bytes]) -> list[str]:
    """Why a node does not start there, or ends when it reads all keys."""
    try:
        state = State(directory)
    except DiskError as error:
        return [str(error)]
    answer = state.do(Lookup(1, "s1", [], keys, 1 << 40))
    assert answer.failure or len(answer.rows) == 1 + len(keys)
    state.store.close()
    return [str(error) for error in state.failures.queue]
