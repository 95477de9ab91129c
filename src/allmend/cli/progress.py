"""The terminal's view of a run: a reader of its events, with the time left."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from allmend.events import (
    ArmStarted,
    Event,
    Joined,
    Offered,
    PhaseDone,
    RoundDone,
    RunFinished,
    RunStarted,
    StepDone,
    Stopped,
    Waiting,
    Warned,
    WorkDone,
    WorkPlanned,
)

TELL_EVERY = 30.0
"""Seconds without a line after which a phase's progress is told where there is no bar."""


class WorkLeft:
    """How much of a run's work is done, and how long the rest will take.

    The plan's phases are weighted by their announced cost; what a phase really took corrects the rate.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._work: dict[str, float] = {}
        self._done: set[str] = set()
        self._phase = ""
        self._share = 0.0
        self._began = clock()

    def see(self, event: Event) -> None:
        """Take note of an event."""
        match event:
            case WorkPlanned() if event.work.keys() <= self._work.keys():
                pass  # a part of the run that is under way
            case RunStarted() | WorkPlanned():
                self._work, self._done, self._began = dict(event.work), set(), self._clock()
            case WorkDone():
                self._phase, self._share = event.phase, event.share
            case PhaseDone():
                self._done.add(event.phase)
                self._phase, self._share = "", 0.0

    @property
    def total(self) -> float:
        return sum(self._work.values())

    @property
    def done(self) -> float:
        """Work done, in the same unit as `total`."""
        finished = sum(cost for phase, cost in self._work.items() if phase in self._done)
        return finished + self._share * self._work.get(self._phase, 0.0)

    def seconds_left(self) -> float | None:
        """Seconds to the end at the rate so far; None until 2 % are done."""
        if not self.total or self.done < 0.02 * self.total:
            return None
        return (self.total - self.done) * (self._clock() - self._began) / self.done


class _TimeLeft(ProgressColumn):
    def __init__(self, work: WorkLeft) -> None:
        super().__init__()
        self._work = work

    def render(self, task: Task) -> Text:
        left = self._work.seconds_left()
        return Text("" if left is None or task.finished else f"about {duration(left)} left", style="cyan")


@contextmanager
def shown(
    console: Console, *, onward: str = "", run: Path | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[Event], None]]:
    """A listener that shows work on the terminal: a bar where there is a terminal, lines everywhere.

    `onward` says how to go on with a run that was stopped; `run` is its folder, where its report says how far it got.
    """
    work = WorkLeft(clock)
    told = clock()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        _TimeLeft(work),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task("loading", total=None)

    def listen(event: Event) -> None:
        nonlocal told
        work.see(event)
        line = _line(event)
        if not line and not console.is_terminal and clock() - told >= TELL_EVERY:
            line = _progress(event, work)
        if line:
            told = clock()
            console.print(line, highlight=False, emoji=False, soft_wrap=True)
        match event:
            case Stopped():
                bar.stop()
                how = f"; {onward}" if onward and event.resumable else "."
                console.print(
                    f"[bold]Stopped.[/bold] What was complete is kept{how}",
                    highlight=False,
                    emoji=False,
                    soft_wrap=True,
                )
                if run is not None:
                    console.print(
                        f"How far it got: {run / 'report.html'}", highlight=False, markup=False, soft_wrap=True
                    )
            case RunStarted():
                bar.update(task, total=work.total, description="starting")
            case WorkPlanned():
                bar.update(task, total=work.total)
            case StepDone():
                bar.update(task, description=f"{event.arm}: round {event.round}, {event.client}, loss {event.loss:.2f}")
            case WorkDone() if not event.phase.startswith("train "):
                bar.update(task, description=event.phase)
        bar.update(task, completed=work.done)

    with bar:
        yield listen


def resume_with(run: Path) -> str:
    """How to go on with a simulation that was stopped."""
    return f"go on with: allmend tune --resume {escape(str(run))}"


def _progress(event: Event, work: WorkLeft) -> str:
    """How far a phase is, for who sees no bar."""
    if not isinstance(event, WorkDone):
        return ""
    left = work.seconds_left()
    return f"  {event.phase}: {event.share:.0%}" + (f", about {duration(left)} left in all" if left is not None else "")


def _line(event: Event) -> str:
    """What stays on the screen of an event; empty for most."""
    match event:
        case RunStarted():
            records, held_out = sum(event.clients.values()), sum(event.held_out.values())
            verb = "Resuming" if event.resumed else "Starting"
            if not event.clients:  # among organisations, which keep their numbers to themselves
                return f"{verb} [bold]{event.run}[/bold]: {escape(event.model)}"
            return (
                f"{verb} [bold]{event.run}[/bold]: {escape(event.model)}, {counted(len(event.clients), 'client')}, "
                f"{records:,} training and {held_out:,} held-out records"
            )
        case Offered():
            return (
                f"Offer   {event.digest}\n        to {', '.join(event.members)}; a member that is not asked: --accept"
            )
        case Joined():
            return f"Joined  {', '.join(event.members)}"
        case Waiting():
            gone = f" (away: {', '.join(event.away)})" if event.away else ""
            return f"[dim]  waiting for {', '.join(event.members)}{gone}[/dim]"
        case ArmStarted():
            rounds = f"rounds {event.round} to {event.rounds}" if event.round > 1 else counted(event.rounds, "round")
            if event.round > event.rounds:
                rounds = "trained already"
            return f"[bold]{event.arm}[/bold] ({event.strategy}): {rounds}, {event.trainable:,} parameters learn"
        case RoundDone():
            loss = f"training loss {event.loss:.3f}, " if event.loss is not None else ""
            spent = f", ε {max(event.epsilon.values()):.2f} so far" if event.epsilon else ""
            largest = max(event.received.values(), default=0)
            exchanged = f"{size(largest)} from each client" if largest else "nothing exchanged"
            tokens = f"{event.tokens:,} tokens in " if event.tokens else ""  # members elsewhere do not tell
            return f"  round {event.round}: {loss}{tokens}{duration(event.seconds)}, {exchanged}{spent}"
        case PhaseDone() if not event.phase.startswith("train "):
            return f"  {event.phase}: {duration(event.seconds)}"
        case Warned():
            return f"[yellow]Warning[/yellow] {escape(event.message)}"
        case RunFinished():
            return f"Finished in {duration(event.seconds)}."
    return ""


def counted(count: int, thing: str, things: str = "") -> str:
    """`1 round`, `3 rounds`; `things` where it is no matter of an s."""
    return f"{count:,} {thing if count == 1 else things or f'{thing}s'}"


def duration(seconds: float) -> str:
    """`4 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: int) -> str:
    """Bytes as `1.8 MB`."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
