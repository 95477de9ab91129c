"""How a run stands: from its log and its lock, whatever point it has come to."""

import os
import socket
import subprocess
import sys
from typing import Any

import pytest
from tests.status.conftest import OFFERED, arm, done, started

from allmend.events import Joined, PhaseDone, RunFinished, StepDone, Stopped, Waiting, Warned, WorkDone
from allmend.run import RunFolder
from allmend.status.standing import standing


def test_an_empty_log_is_a_run_that_nobody_works_on(begun: Any) -> None:
    found = standing(begun.folder)
    assert (found.run, found.state, found.arms, found.members) == ("run", "not running", (), ())


def test_the_state_follows_the_lock_and_the_last_end(begun: Any) -> None:
    begun.add(started("a"))
    assert standing(begun.folder).state == "not running"
    begun.work()
    assert standing(begun.folder).state == "running"
    begun.add(Stopped(cause="no space left"))  # its last words; the report is still written
    assert standing(begun.folder).state == "running"
    begun.add(started("a"), RunFinished(seconds=1.0))
    assert standing(begun.folder).state == "finished"


def test_a_stop_is_told_with_its_cause_until_work_begins_again(begun: Any) -> None:
    begun.add(started("a"), Stopped(cause="no space left"))
    found = standing(begun.folder)
    assert (found.state, found.cause) == ("stopped", "no space left")
    begun.add(started("a"))
    found = standing(begun.folder)
    assert (found.state, found.cause) == ("not running", "")


def test_how_to_go_on_is_said_of_runs_that_can(begun: Any) -> None:
    begun.add(started("a"))
    assert standing(begun.folder).onward == f"Go on with it: allmend tune --resume {begun.folder.path}"
    begun.add(Stopped(cause="diverged", resumable=False))
    assert "same end" in standing(begun.folder).onward
    begun.add(started("a"), OFFERED, Stopped(cause="no space left"))
    assert standing(begun.folder).onward == "The same command that started it goes on with it."
    begun.add(started("a"), RunFinished(seconds=1.0))
    assert standing(begun.folder).onward == ""


def test_a_process_that_was_killed_works_no_more(begun: Any) -> None:
    """The lock's words stay behind, and the process that they name is gone."""
    begun.add(started("a"))
    code = (
        "import sys, time; from pathlib import Path; from allmend.run import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).lock(): print('locked', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(begun.folder.path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
        assert standing(begun.folder).state == "running"
        process.kill()
        process.wait()
    assert (begun.folder.path / "lock").read_text()
    assert standing(begun.folder).state == "not running"


@pytest.mark.parametrize("words", ["", "process 1", "process x on here since 0", "process 1 on another since 0"])
def test_a_lock_that_says_nothing_of_this_machine_is_nobodys(begun: Any, words: str) -> None:
    (begun.folder.path / "lock").write_text(words)
    assert not begun.folder.worked_on


def test_a_process_with_the_number_of_one_that_died_is_another(begun: Any) -> None:
    (begun.folder.path / "lock").write_text(f"process {os.getpid()} on {socket.gethostname()} since 1.0")
    assert not begun.folder.worked_on


def test_watching_does_not_take_the_lock(begun: Any) -> None:
    begun.work()
    assert RunFolder(begun.folder.path).worked_on
    assert RunFolder(begun.folder.path).worked_on


def test_rounds_of_an_arm(begun: Any) -> None:
    begun.add(started("a", "b"), arm(rounds=10))
    (found,) = standing(begun.folder).arms
    assert (found.round, found.rounds, found.loss, found.seconds, found.seconds_left) == (0, 10, None, None, None)
    for round, seconds in enumerate((900.0, 900.0, 10.0, 10.0, 500.0, 10.0, 12.0), start=1):  # the first are forgotten
        begun.add(done(round, "a", "b", seconds=seconds, loss=3.0 - round / 10))
    (found,) = standing(begun.folder).arms
    assert (found.round, found.loss, found.seconds) == (7, pytest.approx(2.3), 10.0)
    assert found.seconds_left == 30.0
    assert found.epsilon == {"members": 3.5}


def test_rounds_that_a_restart_repeats_count_once(begun: Any) -> None:
    begun.add(started(), OFFERED, arm(), done(1, "a", "b"), done(2, "a", "b"))
    begun.add(started(), OFFERED, arm(round=2), done(2, "a"))
    found = standing(begun.folder)
    assert found.arms[0].round == 2
    assert {member.name: member.rounds for member in found.members} == {"a": 2, "b": 1, "c": 0}


def test_a_members_rounds_bytes_and_last_time(begun: Any) -> None:
    begun.add(started(), OFFERED, arm(), done(1, "a", "b"), done(2, "a"))
    a, b, c = standing(begun.folder).members
    assert (a.rounds, a.sent, a.received) == (2, 200, 80)
    assert (b.rounds, b.sent, b.received) == (1, 100, 40)
    assert a.last == 1005.0
    assert b.last == 1004.0
    assert (c.rounds, c.last) == (0, None)


def test_in_a_simulation_nobody_is_away(begun: Any) -> None:
    begun.add(started("a"), arm(), done(1, "a"))
    begun.work()
    (member,) = standing(begun.folder).members
    assert member.away is None
    assert not member.waited_for


def test_who_is_waited_for_and_who_is_away(begun: Any) -> None:
    begun.add(started(), OFFERED, Waiting(members=["a", "b"], away=["b"]))
    begun.work()

    def seen() -> dict[str, tuple[bool | None, bool]]:
        return {member.name: (member.away, member.waited_for) for member in standing(begun.folder).members}

    assert seen() == {"a": (False, True), "b": (True, True), "c": (False, False)}
    begun.add(Joined(members=["a", "c"]))  # it goes on without b, which is as far away as before
    assert seen() == {"a": (False, False), "b": (True, False), "c": (False, False)}
    begun.add(Waiting(members=["a"], away=[]))
    assert seen() == {"a": (False, True), "b": (False, False), "c": (False, False)}
    begun.add(arm(), done(1, "a", "c"))
    assert seen() == {"a": (False, False), "b": (False, False), "c": (False, False)}


def test_nobody_is_waited_for_where_nobody_works(begun: Any) -> None:
    begun.add(started(), OFFERED, Waiting(members=["a"], away=["a"]))
    assert not any(member.waited_for or member.away for member in standing(begun.folder).members)


def test_what_the_run_is_at(begun: Any) -> None:
    begun.work()
    step = StepDone(arm="fedavg", client="a", round=2, step=7, loss=1.0, learning_rate=0.1, gradient_norm=1.0, tokens=5)
    for event, words in (
        (started("a"), "starts"),
        (OFFERED, "members are asked to join"),
        (Joined(members=["a"]), "begins"),
        (WorkDone(phase="evaluate base", share=0.5), "evaluate base"),
        (PhaseDone(phase="evaluate base", seconds=1.0, tokens=1), "after evaluate base"),
        (arm(rounds=2), "fedavg: round 1 of 2"),
        (step.model_copy(update={"round": 1}), "fedavg: round 1, a trains"),
        (done(1, "a"), "fedavg: round 2 of 2"),
        (Warned(message="something"), "fedavg: round 2 of 2"),
        (done(2, "a"), "after fedavg"),
    ):
        begun.add(event)
        assert standing(begun.folder).phase == words


def test_a_warning_is_told_once(begun: Any) -> None:
    begun.add(started("a"), Warned(message="x"), Warned(message="y"), Warned(message="x"))
    assert standing(begun.folder).warnings == ("x", "y")
