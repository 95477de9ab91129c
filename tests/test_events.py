"""The event log: what is written comes back, and what a resumption made void does not."""

from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from allmend.events import (
    ArmStarted,
    Event,
    PhaseDone,
    RoundDone,
    RunFinished,
    RunStarted,
    StepDone,
    Stopped,
    UpdateSeen,
    Warned,
    WorkDone,
    dump_event,
    read_events,
)
from allmend.run import EventLog

KINDS: tuple[type[BaseModel], ...] = get_args(get_args(Event)[0])

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
finite = st.floats(allow_nan=False, allow_infinity=False)


integers = st.integers(-(2**53), 2**53)
VALUES: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: integers,
    float: finite,
    str: text,
    float | None: st.none() | finite,
    list[str]: st.lists(text, max_size=3),
    dict[str, str]: st.dictionaries(text, text, max_size=3),
    dict[str, int]: st.dictionaries(text, integers, max_size=3),
    dict[str, float]: st.dictionaries(text, finite, max_size=3),
    UpdateSeen | None: st.none()
    | st.builds(UpdateSeen, length=finite, angle=st.none() | finite, farthest=text, far=integers, matrices=integers),
    dict[str, dict[str, int]]: st.dictionaries(text, st.dictionaries(text, integers, max_size=2), max_size=2),
}


def events() -> st.SearchStrategy[Event]:
    def values(kind: type[BaseModel]) -> dict[str, st.SearchStrategy[Any]]:
        return {name: VALUES[field.annotation] for name, field in kind.model_fields.items() if name not in "v type"}

    return st.one_of([st.builds(kind, **values(kind)) for kind in KINDS])


@given(st.lists(events().filter(lambda event: not isinstance(event, ArmStarted)), max_size=5))
def test_every_event_comes_back(tmp_path_factory: pytest.TempPathFactory, written: list[Event]) -> None:
    path = tmp_path_factory.mktemp("log") / "events.jsonl"
    path.write_bytes(b"".join(map(dump_event, written)))
    assert list(read_events(path)) == written


def test_every_kind_has_a_name_of_its_own() -> None:
    names = [kind.model_fields["type"].default for kind in KINDS]
    assert len(set(names)) == len(names) == 13


def step(arm: str, round: int, number: int, loss: float = 1.0) -> StepDone:
    return StepDone(
        arm=arm, client="a", round=round, step=number, loss=loss, learning_rate=0.1, gradient_norm=1.0, tokens=5
    )


def done(arm: str, round: int) -> RoundDone:
    return RoundDone(
        arm=arm, round=round, clients=["a"], sent={"a": 1}, received={"a": 1}, loss=None, tokens=0, seconds=1.0,
        training_seconds=0.5,
    )  # fmt: skip


def arm(name: str, round: int) -> ArmStarted:
    return ArmStarted(arm=name, strategy="fedavg", round=round, rounds=9, trainable=1)


def write(path: Path, *written: Event) -> None:
    log = EventLog(path, clock=lambda: 0.0)
    for event in written:
        log.emit(event)
    log.close()


def test_a_restart_makes_later_steps_and_rounds_of_its_arm_void(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    first = [arm("x", 1), step("x", 1, 1), done("x", 1), step("x", 2, 2), done("x", 2), step("x", 3, 3)]
    other = [arm("y", 1), step("y", 1, 1), step("y", 2, 2), done("y", 2)]
    stopped: list[Event] = [Warned(message="w"), Stopped(cause="killed")]
    again = [arm("x", 2), step("x", 2, 2, loss=2.0), done("x", 2)]
    write(path, *first, *other, *stopped, *again)
    assert list(read_events(path)) == [*first[:3], *other, *stopped, *again]


def test_every_restart_counts_and_the_last_word_stays(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, arm("x", 1), step("x", 1, 1), step("x", 2, 2, 1.0), arm("x", 2), step("x", 2, 2, 2.0), arm("x", 2))
    assert [e.loss for e in read_events(path) if isinstance(e, StepDone)] == [1.0]
    write(path, step("x", 2, 2, 3.0), arm("x", 10))  # trained already: nothing is void
    assert [e.loss for e in read_events(path) if isinstance(e, StepDone)] == [1.0, 3.0]
    write(path, arm("x", 1))
    assert not [e for e in read_events(path) if isinstance(e, StepDone)]


@pytest.mark.parametrize(
    "line",
    [
        b'{"v": 1, "type": "surprise"}',
        b'{"v": 1, "type": "warning", "message": "m", "colour": "red"}',
        b'{"v": 1, "type": "warning"}',
        b"not JSON",
        b"\xff\xfe",
    ],
)
def test_a_strange_line_is_told_with_its_place(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    good = dump_event(Warned(message="m"))
    path.write_bytes(good + line + b"\n" + good)
    with pytest.raises(ValueError, match=f"^{path}:2: "):
        list(read_events(path))
    path.write_bytes(good + line + b"\n")  # whole, with its newline: not torn
    with pytest.raises(ValueError, match=f"^{path}:2: "):
        list(read_events(path))
    path.write_bytes(good + line)  # torn
    assert len(list(read_events(path))) == 1


def test_no_log_is_an_empty_one(tmp_path: Path) -> None:
    assert list(read_events(tmp_path / "events.jsonl")) == []


def test_a_value_that_json_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        dump_event(WorkDone(phase="p", share=float("nan")))


def test_line_breaks_stay_inside_a_line() -> None:
    for event in (Warned(message="a\nb\r\u2028"), PhaseDone(phase="\n", seconds=1, tokens=1), RunFinished(seconds=0)):
        assert dump_event(event).count(b"\n") == 1
    assert RunStarted.model_fields["resumed"].default is False
