"""Run folders: who may write in one, what lies where, and how it survives a kill at any moment.

```
RUN/
  recipe.toml                      the frozen recipe
  run.json                         format version, recipe digest, base model digest
  events.jsonl                     everything that happened, one line an event
  canaries.jsonl                   planted texts and their controls (never in a client's folder)
  arms/<arm>/round-000003/         the newest checkpoint: server.safetensors, members/<name>.safetensors
  arms/<arm>/adapter/              the outcome (PEFT folder), or model/ after full fine-tuning
  arms/<arm>/members/<name>/       personal outcomes, where the strategy makes them
  arms/<arm>/learnt.json           how much training looked at each canary, and what the layers of protection did
  arms/<arm>/views/round-000001/   what each party saw of a round, where the audit wants to know
  scores/<arm>.json                what each model made of every held-out record
  results/<table>.json             tables of `allmend.results`: utility, personalised, privacy, audit
  results/audit.parquet            one row a probe of the audit
  report.html
```

Files are written beside their place and renamed, folders likewise. Nothing here knows what a strategy or a stage is.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import psutil

from allmend.errors import UserError
from allmend.events import Event, dump_event, read_events
from allmend.results import Table

FORMAT = 1
"""Version of the run folder's layout; another one is refused."""

TableT = TypeVar("TableT", bound=Table)


def fault(error: OSError, path: Path) -> UserError:
    """The user's message for an error of the operating system while writing `path`."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return UserError(
                "no space left for this file; nothing that was complete is lost",
                where=path,
                hint="Free some space, then run the command again (`allmend tune` with `--resume RUN`).",
            )
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return UserError(
                "cannot be written: permission denied or read-only",
                where=path,
                hint="Choose another folder, or make this one writable.",
            )
        case errno.ENOTDIR | errno.EEXIST:
            return UserError("a file stands where a folder is needed", where=path, hint="Choose another folder.")
    return UserError(f"cannot be written: {error.strerror or error}", where=path)


def check_place(path: Path) -> None:
    """See that a file could be written, before the work whose outcome it is to hold.

    Args:
        path: of the file; folders above it may be missing. Nothing is made.

    Raises:
        UserError: a file stands where a folder is needed or the other way round, or writing there is not permitted.
    """
    try:
        if path.is_dir():
            raise UserError("a folder stands where a file is needed", where=path, hint="Name a file in it.")
        above = next(one for one in path.absolute().parents if one.exists())
    except OSError as error:
        raise fault(error, path) from error
    if not above.is_dir():
        raise fault(NotADirectoryError(errno.ENOTDIR, ""), path)
    if not os.access(above, os.W_OK | os.X_OK):
        raise fault(PermissionError(errno.EACCES, ""), path)


def write_atomic(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write a whole file or nothing: beside its place, flushed to disk, then renamed.

    Args:
        path: of the file; folders above it are made.
        data: all of it.
        mode: who may read and write it, less what the umask forbids.

    Raises:
        UserError: the operating system refused (no space, no permission); the old file is untouched.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        _flush(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise fault(error, path) from error


@contextlib.contextmanager
def folder_atomic(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` at the end as a whole, replacing what was there.

    Raises:
        UserError: the operating system refused; the old folder is untouched.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        yield beside
        for file in (*beside.rglob("*"), beside):
            _flush(file)
        if path.exists():
            old = path.with_name(f".{path.name}.{os.getpid()}.old.partial")
            path.rename(old)
            try:
                beside.rename(path)
            except OSError:
                old.rename(path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            beside.rename(path)
        _flush(path.parent)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise fault(error, path) from error
    except UserError as error:
        shutil.rmtree(beside, ignore_errors=True)
        if error.where and Path(error.where).is_relative_to(beside):  # by the name that it was to have
            error = type(error)(error.what, where=path / Path(error.where).relative_to(beside), hint=error.hint)
        raise error from None
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _flush(path: Path) -> None:
    """Have the system put a file or folder on the disk, so that a power cut finds it whole."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class EventLog:
    """The writer of `events.jsonl`, which also tells listeners in this process (progress bars).

    Args:
        path: the log; a torn last line, left by a kill, is cut off.
        clock: seconds since the epoch.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self.listeners: list[Callable[[Event], None]] = []
        self._clock = clock
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # unbuffered: what a full disk refuses must not come out later, behind another event
            self._file = path.open("ab", buffering=0)
            _cut_torn_line(path)
        except OSError as error:
            raise fault(error, path) from error

    def emit(self, event: Event) -> None:
        """Append one event, stamped with the time.

        Raises:
            UserError: the operating system refused; no half line is left.
        """
        event = event.model_copy(update={"time": self._clock()})
        line = memoryview(dump_event(event))
        end = self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, end)
            raise fault(error, self.path) from error
        for listener in self.listeners:
            listener(event)

    def close(self) -> None:
        """Close the file; further events are an error."""
        self._file.close()


def _cut_torn_line(path: Path) -> None:
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


class RunFolder:
    """A run on disk. Use `create` or `open`; `lock` before writing.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def check_free(self) -> None:
        """Raise unless a new run can be made here: the folder is absent, or holds no more than a start that was killed.

        Raises:
            UserError: the folder holds a run already, or something else.
        """
        if self.marker.exists():
            raise UserError(
                "there is a run here already",
                where=self.path,
                hint=f"Continue it with `allmend tune --resume {self.path}`, or choose another folder with `--out`.",
            )
        try:
            left = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
            # a recipe without a lock beside it is not ours
            begun = {"lock", self.recipe.name} if "lock" in left else set()
            if any(name not in begun and not name.endswith(".partial") for name in left):
                raise UserError(
                    "this folder is not empty and is not a run",
                    where=self.path,
                    hint="Choose another folder with `--out`.",
                )
        except OSError as error:
            raise fault(error, self.path) from error

    @classmethod
    def create(cls, path: Path, recipe_toml: str, facts: Mapping[str, object]) -> "RunFolder":
        """A new run with its frozen recipe and `run.json`.

        Raises:
            UserError: the folder holds a run already, is not empty, or cannot be written.
        """
        run = cls(path)
        run.check_free()
        write_atomic(run.recipe, recipe_toml.encode())
        write_atomic(run.marker, json.dumps({"format": FORMAT, **facts}, indent=2).encode())
        return run

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """An existing run.

        Raises:
            UserError: no run is here, or one of a newer format.
        """
        run = cls(path)
        if not run.marker.is_file():
            raise UserError(
                "no run is here (there is no run.json)",
                where=path,
                hint="Check the path; `allmend tune RECIPE.toml --out FOLDER` starts a run.",
            )
        version = run.facts.get("format")
        if version != FORMAT:
            raise UserError(
                f"the run has format {version}, this version of allmend reads {FORMAT}",
                where=path,
                hint="Use the version of allmend that made it.",
            )
        return run

    @property
    def marker(self) -> Path:
        return self.path / "run.json"

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.toml"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def canaries(self) -> Path:
        return self.path / "canaries.jsonl"

    def arm(self, name: str) -> Path:
        """Where an arm keeps its checkpoint and outcome."""
        return self.path / "arms" / name

    def scores(self, name: str) -> Path:
        """Where an arm's scores on held-out records are kept."""
        return self.path / "scores" / f"{name}.json"

    @property
    def facts(self) -> dict[str, object]:
        """`run.json`.

        Raises:
            UserError: it is not what a run writes.
        """
        try:
            facts = json.loads(self.marker.read_bytes())
        except (ValueError, OSError) as error:
            raise UserError(f"cannot be read as a run's facts: {error}", where=self.marker) from error
        if not isinstance(facts, dict):
            raise UserError("is not a run's facts: not a JSON object", where=self.marker)
        return facts

    def history(self) -> list[Event]:
        """The events of the run so far, as `read_events` gives them.

        Raises:
            UserError: a line is not an event of this version.
        """
        try:
            return list(read_events(self.events))
        except (ValueError, OSError) as error:
            raise UserError(
                f"the event log cannot be read: {error}",
                where=self.events,
                hint="It was changed or comes from another version of allmend: start a new run in another folder.",
            ) from error

    def write_table(self, name: str, table: Table) -> None:
        """Write `results/<name>.json` as a whole."""
        write_atomic(self.path / "results" / f"{name}.json", table.model_dump_json(indent=1).encode())

    def read_table(self, name: str, kind: type[TableT]) -> TableT | None:
        """`results/<name>.json`, or None when the stage has not run.

        Raises:
            UserError: the file is there and is not such a table.
        """
        path = self.path / "results" / f"{name}.json"
        if not path.exists():
            return None
        try:
            return kind.model_validate_json(path.read_bytes())
        except (ValueError, OSError) as error:
            raise UserError(
                f"is not a table of this version: {error}", where=path, hint="Delete it and run the stage again."
            ) from error

    @property
    def worked_on(self) -> bool:
        """Whether a process of this machine holds the run's lock, as far as one can tell without trying to take it."""
        try:
            words = (self.path / "lock").read_text().split()
            if len(words) != 6 or words[3] != socket.gethostname():
                return False
            # another process may have the number of one that died
            return bool(abs(psutil.Process(int(words[1])).create_time() - float(words[5])) < 1)
        except (OSError, ValueError, psutil.Error):
            return False

    @contextlib.contextmanager
    def log(self, listeners: Sequence[Callable[[Event], None]] = ()) -> Iterator[EventLog]:
        """The run's event log, open for writing; `listeners` are told every event."""
        log = EventLog(self.events)
        log.listeners += listeners
        try:
            yield log
        finally:
            log.close()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing in this run; released by the system when the process dies.

        What a process that died here left half-written is removed.

        Raises:
            UserError: another process holds it, or the folder is read-only.
        """
        path = self.path / "lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            raise fault(error, path) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                holder = file.read().partition(" since")[0].strip() or "another process"
                raise UserError(
                    f"the run is in use by {holder}",
                    where=self.path,
                    hint="Wait for it, stop it, or use another run folder.",
                ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {psutil.Process().create_time():.2f}")
            file.flush()
            for left in [*self.path.rglob(".*.partial")]:
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)
            try:
                yield
            finally:
                file.truncate(0)  # nobody works here any more, as `worked_on` can tell


def run_and_arm(name: str) -> tuple[RunFolder, str]:
    """The run in `RUN` or `RUN:ARM`, which may not be there, and the arm, which is empty where none is named."""
    folder, _, arm = name.rpartition(":") if ":" in name and not Path(name).is_dir() else (name, "", "")
    return RunFolder(Path(folder)), arm
