"""A process's work on a run, as its log tells it: on what machine it began, and why it stopped if it did."""

import contextlib
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from allmend.errors import UserError
from allmend.events import RunFinished, RunStarted, Stopped
from allmend.report.page import write_report
from allmend.run import EventLog, RunFolder


def machine(device: torch.device) -> str:
    """The machine in a few words."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {device}"


@contextlib.contextmanager
def reported(
    run: RunFolder, log: EventLog, *, resumable: Callable[[BaseException], bool] = lambda error: True
) -> Iterator[None]:
    """Work whose end is on the run's report, also where it stops with an error, which goes on to the caller.

    Args:
        run: the run.
        log: its events.
        resumable: whether going on can meet another end.
    """
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(UserError):  # the disk may be the cause, and then takes no event either
            log.emit(Stopped(cause=_cause(error), resumable=resumable(error)))
            write_report(run.path)
        raise
    write_report(run.path)


def _cause(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__


@dataclass(frozen=True)
class Session:
    """One process's work on a run: torch's threads, and seconds from its start to its last event."""

    threads: int
    seconds: float


def sessions(run: RunFolder) -> list[Session]:
    """What each process has worked on a run so far, in order."""
    sessions: list[Session] = []
    began, ended = 0.0, False
    for event in run.history():
        if isinstance(event, RunStarted):
            began = event.time
            sessions.append(Session(event.threads, 0.0))
            ended = False
        elif sessions and not ended:  # an audit of a finished run is no part of its session
            ended = isinstance(event, Stopped | RunFinished)
            sessions[-1] = Session(sessions[-1].threads, max(0.0, event.time - began))
    return sessions
