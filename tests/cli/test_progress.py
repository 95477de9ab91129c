"""Progress: what is done, what is left, and lines that mean what they say."""

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from allmend.cli.progress import TELL_EVERY, WorkLeft, duration, resume_with, shown, size
from allmend.events import (
    ArmStarted,
    Event,
    PhaseDone,
    RoundDone,
    RunFinished,
    RunStarted,
    StepDone,
    Stopped,
    WorkDone,
    WorkPlanned,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def started(work: dict[str, float], *, resumed: bool = False, model: str = "m") -> RunStarted:
    return RunStarted(
        run="tiny", allmend="0", versions={}, machine="m", threads=1, model=model, clients={"a": 1234, "b": 1},
        held_out={"a": 5}, work=work, resumed=resumed,
    )  # fmt: skip


def phase(name: str) -> PhaseDone:
    return PhaseDone(phase=name, seconds=1.0, tokens=1)


def test_work_is_the_announced_cost_of_what_is_done() -> None:
    clock = Clock()
    work = WorkLeft(clock)
    assert work.seconds_left() is None
    assert work.done == work.total == 0
    clock.now += 50  # loading does not count
    work.see(started({"evaluate base": 100.0, "train fedavg": 300.0}))
    assert (work.total, work.done) == (400, 0)
    work.see(WorkDone(phase="evaluate base", share=0.5))
    assert work.done == 50
    clock.now += 10
    assert work.seconds_left() == pytest.approx(70)  # 350 at 5 a second
    work.see(phase("evaluate base"))
    assert work.done == 100
    work.see(WorkDone(phase="train fedavg", share=0.25))
    assert work.done == 175
    clock.now += 25
    assert work.seconds_left() == pytest.approx(225 * 35 / 175)
    work.see(phase("train fedavg"))
    assert work.done == work.total
    assert work.seconds_left() == 0


def test_nothing_is_promised_before_two_percent_and_unknown_phases_do_not_count() -> None:
    clock = Clock()
    work = WorkLeft(clock)
    work.see(started({"train a": 100.0}))
    clock.now += 5
    work.see(WorkDone(phase="train a", share=0.019))
    assert work.seconds_left() is None
    work.see(phase("audit other"))
    work.see(WorkDone(phase="audit other", share=0.9))
    assert work.done == 0
    work.see(WorkDone(phase="train a", share=0.02))
    assert work.seconds_left() == pytest.approx(5 * 98 / 2)


def test_a_session_counts_from_its_own_start() -> None:
    clock = Clock()
    work = WorkLeft(clock)
    work.see(started({"train a": 100.0}))
    work.see(phase("train a"))
    clock.now += 1000
    work.see(started({"train a": 50.0}, resumed=True))
    assert (work.total, work.done) == (50, 0)
    work.see(WorkDone(phase="train a", share=0.5))
    clock.now += 10
    assert work.seconds_left() == pytest.approx(10)


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=5), st.floats(0.01, 100))
def test_at_a_steady_rate_the_promise_is_kept_at_every_moment(costs: list[float], rate: float) -> None:
    clock = Clock()
    work = WorkLeft(clock)
    phases = {f"p{index}": cost for index, cost in enumerate(costs)}
    work.see(started(phases))
    end = clock.now + sum(costs) / rate
    for name, cost in phases.items():
        for quarter in (0.25, 0.5, 0.75, 1.0):
            clock.now += cost / rate / 4
            work.see(WorkDone(phase=name, share=quarter))
            if (left := work.seconds_left()) is not None:
                assert clock.now + left == pytest.approx(end, rel=1e-6)
        work.see(phase(name))
    assert work.done == pytest.approx(work.total)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (61, "1 min 1 s"), (3599.4, "59 min 59 s"),
        (3599.6, "1 h 0 min"), (7500, "2 h 5 min"),
    ],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (1_840_000, "1.8 MB"), (2_000_000_000, "2.0 GB")],
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


STORY: tuple[Event, ...] = (
    started({"evaluate base": 1.0, "train fedavg": 9.0}, model="/models/[bold]odd[/] :smile:"),
    phase("evaluate base"),
    ArmStarted(arm="fedavg", strategy="fedavg", round=1, rounds=2, trainable=4096),
    StepDone(arm="fedavg", client="a", round=1, step=1, loss=1.5, learning_rate=1, gradient_norm=1, tokens=9),
    RoundDone(
        arm="fedavg", round=1, clients=["a"], sent={"a": 1}, received={"a": 2_000_000}, loss=1.25, tokens=12_345,
        seconds=61, training_seconds=1,
    ),
)  # fmt: skip


def screen(*events: Event, terminal: bool, clock: Clock | None = None, pause: float = 0.0) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None)
    clock = clock or Clock()
    with shown(console, onward=resume_with(Path("runs/[x]")), run=Path("runs/[x]"), clock=clock) as listen:
        for event in events:
            listen(event)
            clock.now += pause
    return out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_is_told_in_lines(terminal: bool) -> None:
    text = screen(*STORY, RunFinished(seconds=125), terminal=terminal)
    for line in (
        "Starting tiny: /models/[bold]odd[/] :smile:, 2 clients, 1,235 training and 5 held-out records",
        "evaluate base: 1 s",
        "fedavg (fedavg): 2 rounds, 4,096 parameters learn",
        "round 1: training loss 1.250, 12,345 tokens in 1 min 1 s, 2.0 MB from each client",
        "Finished in 2 min 5 s.",
    ):
        assert line in text
    assert ("loss 1.50" in text) == terminal  # the bar moves on terminals only


def test_a_stop_says_how_to_go_on() -> None:
    text = screen(*STORY, Stopped(cause="interrupted"), terminal=True)
    assert "allmend tune --resume runs/[x]" in text
    assert "How far it got: runs/[x]/report.html" in text
    assert "--resume" not in screen(*STORY, Stopped(cause="diverged", resumable=False), terminal=True)


def test_where_there_is_no_bar_a_long_phase_is_told_from_time_to_time() -> None:
    plan = WorkPlanned(work={"audit base": 100.0, "audit fedavg": 100.0})
    asked = [WorkDone(phase="audit base", share=percent / 100) for percent in range(1, 101)]
    lines = screen(plan, *asked, terminal=False, pause=2.0).splitlines()
    assert lines[0] == "  audit base: 15%, about 6 min 10 s left in all"  # 30 s for 15 of 200
    assert len(lines) == 200 // TELL_EVERY
    assert not screen(*asked, terminal=False)


def test_an_audit_at_the_end_of_a_run_does_not_start_the_count_again() -> None:
    clock = Clock()
    work = WorkLeft(clock)
    work.see(started({"train a": 100.0, "audit base": 50.0}))
    clock.now += 10
    work.see(phase("train a"))
    work.see(WorkPlanned(work={"audit base": 50.0}))
    assert work.seconds_left() == pytest.approx(5)
    work.see(WorkPlanned(work={"ask base": 20.0}))
    assert (work.total, work.done) == (20, 0)


def test_a_resumption_says_what_is_left() -> None:
    again = (
        started({}, resumed=True),
        ArmStarted(arm="a", strategy="fedavg", round=2, rounds=3, trainable=1),
        ArmStarted(arm="b", strategy="local", round=4, rounds=3, trainable=1),
    )
    text = screen(*again, terminal=False)
    assert "Resuming tiny" in text
    assert "a (fedavg): rounds 2 to 3" in text
    assert "b (local): trained already" in text
