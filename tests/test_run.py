"""Run folders: nothing is half-written, whatever the disk does, and one process writes at a time."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from allmend.errors import UserError
from allmend.events import Warned, read_events
from allmend.results import Estimate, Utility, UtilityTable
from allmend.run import FORMAT, EventLog, RunFolder, check_place, fault, folder_atomic, write_atomic

OLD, NEW = b"the old file", b"n" * 300_000


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def fails(number: int) -> Callable[..., Any]:
    def fail(*args: object, **kwargs: object) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


# --- whole or not at all


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace", "pathlib.Path.mkdir"])
def test_a_failed_write_leaves_the_old_file(
    number: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, OLD)
    monkeypatch.setattr(call, fails(number))
    with pytest.raises(UserError) as raised:
        write_atomic(path, NEW)
    monkeypatch.undo()
    assert str(path) in str(raised.value)
    assert files(tmp_path) == {"file": OLD}


def test_a_file_is_written_whole_with_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, OLD)
    write_atomic(path, NEW)
    assert files(tmp_path) == {"a/b/file": NEW}


def _fill(path: Path, content: bytes) -> None:
    with folder_atomic(path) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_bytes(content)


@pytest.mark.parametrize("cause", [OSError(errno.ENOSPC, "full"), ValueError("a bug"), KeyboardInterrupt()])
def test_a_failure_while_filling_leaves_the_old_folder(cause: BaseException, tmp_path: Path) -> None:
    _fill(tmp_path / "folder", OLD)

    def fill() -> None:
        with folder_atomic(tmp_path / "folder") as folder:
            (folder / "half").write_bytes(NEW)
            raise cause

    with pytest.raises(UserError if isinstance(cause, OSError) else type(cause)):
        fill()
    assert files(tmp_path) == {"folder/inner/file": OLD}


def test_a_failure_while_renaming_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fill(tmp_path / "folder", OLD)
    rename, calls = Path.rename, []

    def second_fails(self: Path, target: Path) -> Path:
        calls.append(self)
        return fails(errno.EIO)() if len(calls) == 2 else rename(self, target)  # type: ignore[no-any-return]

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(UserError):
        _fill(tmp_path / "folder", NEW)
    assert files(tmp_path) == {"folder/inner/file": OLD}


def test_a_new_folder_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "left over").touch()
    _fill(tmp_path / "folder", NEW)
    assert files(tmp_path) == {"folder/inner/file": NEW}


WRITE = """
import sys
from pathlib import Path
from allmend.errors import UserError
from allmend.events import Warned
from allmend.run import EventLog, folder_atomic, write_atomic
folder = Path(sys.argv[1])
def whole(): write_atomic(folder / "file", b"n" * 300_000)
def tree():
    with folder_atomic(folder / "tree") as beside:
        write_atomic(beside / "small", b"x")
        write_atomic(beside / "large", b"n" * 300_000)
def log():
    log = EventLog(folder / "events.jsonl")
    try:
        for _ in range(400):
            log.emit(Warned(message="m" * 1000))
    finally:
        log.close()
for write in (whole, tree, log):
    try:
        write()
    except UserError as error:
        assert "no space left" in str(error) and "Free some space" in str(error), error
    else:
        raise SystemExit("the disk was not full")
"""


def _child(code: str, *arguments: object, before: str = "") -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", before + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def _check_after_full_disk(folder: Path, done: "subprocess.CompletedProcess[str]") -> None:
    assert done.returncode == 0, done.stderr
    left = files(folder)
    log = left.pop("events.jsonl")
    assert left == {"file": OLD, "tree/small": b"old"}
    assert log.endswith(b"\n")
    assert 0 < len(list(read_events(folder / "events.jsonl"))) == log.count(b"\n") < 400


def test_a_file_size_limit_loses_nothing(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", OLD)
    write_atomic(tmp_path / "tree" / "small", b"old")
    limit = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
    _check_after_full_disk(tmp_path, _child(WRITE, tmp_path, before=limit))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a file system of 200 kB; `readonly` makes it so."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(*options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(("size=200k", *options)), "none", str(disk)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("cannot mount a file system here")
        return disk

    yield mount
    subprocess.run(["umount", str(disk)], capture_output=True, check=False)


def test_a_full_disk_loses_nothing(tiny_disk: Callable[..., Path]) -> None:
    disk = tiny_disk()
    write_atomic(disk / "file", OLD)
    write_atomic(disk / "tree" / "small", b"old")
    _check_after_full_disk(disk, _child(WRITE, disk))


def test_a_read_only_folder_is_told(tiny_disk: Callable[..., Path], tmp_path: Path) -> None:
    disk = tiny_disk("ro")
    for write in (
        lambda: write_atomic(disk / "file", NEW),
        lambda: _fill(disk / "folder", NEW),
        lambda: EventLog(disk / "events.jsonl"),
        lambda: RunFolder(disk / "run").lock().__enter__(),
    ):
        with pytest.raises(UserError, match="read-only"):
            write()
    assert files(disk) == {}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EIO])
def test_every_fault_names_the_path(number: int) -> None:
    error = fault(OSError(number, os.strerror(number)), Path("runs/a/file"))
    assert str(error).startswith("runs/a/file: ")


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        write_atomic(tmp_path / "run" / "file", NEW)


# --- the event log


def test_a_torn_tail_is_ignored_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    for message in ("äöü", "b"):
        log.emit(Warned(message=message))
    log.close()
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole)):  # killed after any byte of the second line
        path.write_bytes(whole[:length])
        found = [e.message for e in read_events(path) if isinstance(e, Warned)]
        # the line may be whole but for its newline
        assert found == ["äöü", "b"][: 2 if length == len(whole) - 1 else 1]
        again = EventLog(path)
        assert path.read_bytes() == whole[:first]
        again.close()
    path.write_bytes(whole[: first - 1])
    EventLog(path).close()
    assert path.read_bytes() == b""


def test_an_event_that_does_not_fit_leaves_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path, clock=lambda: 7.0)
    log.emit(Warned(message="before"))
    before = path.read_bytes()

    class Full:
        """Takes 10 bytes, then is full."""

        def __init__(self, file: Any) -> None:
            self.file, self.left = file, 10

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            if not self.left:
                raise OSError(errno.ENOSPC, "full")
            count = self.file.write(data[: self.left])
            self.left -= count
            return int(count)

    heard: list[object] = []
    log.listeners.append(heard.append)
    file, log._file = log._file, Full(log._file)  # type: ignore[assignment]
    with pytest.raises(UserError, match="no space left"):
        log.emit(Warned(message="too much"))
    assert path.read_bytes() == before
    assert heard == []
    log._file = file  # there is space again
    log.emit(Warned(message="after"))
    log.close()
    assert [e.message for e in read_events(path) if isinstance(e, Warned)] == ["before", "after"]
    assert [e.time for e in read_events(path)] == [7.0, 7.0]
    assert heard == list(read_events(path))[1:]


# --- run folders


def test_a_run_is_created_once(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", "seed = 1\n", {"recipe": "abc"})
    assert RunFolder.open(run.path).facts == {"format": FORMAT, "recipe": "abc"}
    with pytest.raises(UserError, match="there is a run here already"):
        RunFolder.create(run.path, "", {})
    assert run.recipe.read_text() == "seed = 1\n"


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="not empty"):
        RunFolder.create(tmp_path, "", {})
    assert files(tmp_path) == {"thesis.tex": b""}
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        RunFolder.create(tmp_path / "thesis.tex", "", {})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no run is here"),
        (f'{{"format": {FORMAT + 1}}}', f"format {FORMAT + 1}"),
        ("{}", "format None"),
        ("[1]", "not a JSON object"),
        ("{", "cannot be read"),
    ],
)
def test_what_is_no_run_is_refused(content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=words):
        RunFolder.open(tmp_path)


def test_tables_come_back_and_damaged_ones_are_told(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.read_table("utility", UtilityTable) is None
    row = Utility(model="base", held_out="pooled", accuracy=Estimate(value=0.1, low=0.0, high=0.3, n=7))
    table = UtilityTable(rows=(row,), seed=3)
    run.write_table("utility", table)
    assert run.read_table("utility", UtilityTable) == table
    path = tmp_path / "results" / "utility.json"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"utility\.json"):
        run.read_table("utility", UtilityTable)


HOLD = """
import sys, time
from pathlib import Path
from allmend.run import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_two_processes_cannot_hold_a_run(ending: signal.Signals, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {holder.pid}"), run.lock():
            pass
        run.check_free()  # a lock alone does not make a run
    finally:
        holder.send_signal(ending)
        holder.wait(10)
        holder.stdout.close()
    with run.lock():
        assert str(os.getpid()) in (run.path / "lock").read_text()


def test_the_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)

    def breaks() -> None:
        with run.lock():
            raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        breaks()
    with run.lock():
        pass


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "", {})
    kept = files(tmp_path)
    (tmp_path / "arms" / "a" / ".round-000001.99.partial" / "members").mkdir(parents=True)
    (tmp_path / "arms" / "a" / ".round-000001.99.partial" / "server").touch()
    (tmp_path / ".run.json.99.partial").touch()
    with run.lock():
        assert files(tmp_path).keys() - {"lock"} == kept.keys()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_place_that_cannot_be_written_is_told_and_none_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(OLD)
    check_place(tmp_path / "file")
    check_place(tmp_path / "new" / "deep" / "file")
    assert files(tmp_path) == {"file": OLD}
    assert not (tmp_path / "new").exists()
    for path, words in ((tmp_path, "a folder stands"), (tmp_path / "file" / "deep" / "file", "a file stands")):
        with pytest.raises(UserError, match=words):
            check_place(path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever is root may write everywhere
    with pytest.raises(UserError, match="permission denied"):
        check_place(tmp_path / "new" / "file")
