"""A choice is tried at equal steps against chance and everything; a good one is told from a bad one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.attribution.conftest import ADAPTER, rows, write

from allmend.attribution.retraining import Retraining
from allmend.attribution.selection import Selected
from allmend.attribution.trial import CHOSEN, EVERYTHING, RANDOM, Trial, try_selection
from allmend.errors import UserError

QUICK = Retraining(learning_rate=3e-2, epochs=6, batch_size=4)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, adapt: Callable[..., None]) -> Path:
    """Half of the training records answer as the unseen ones do, the others answer with something else."""
    folder = tmp_path_factory.mktemp("trial")
    mixed = [*rows("like", 12, "It is so."), *rows("unlike", 12, "zzzz qqqq")]
    write(folder / "north.jsonl", mixed)
    write(folder / "unseen.jsonl", rows("new", 8, "It is so."))
    adapt(folder, "north", rate=1e-2, rounds=1)
    return folder


def choice(place: Path, kind: str) -> list[Selected]:
    made = rows(kind, 12, "It is so." if kind == "like" else "zzzz qqqq")
    path = write(place / f"{kind}.jsonl", made)
    return [Selected("north", 12, 24, path, path)]


def tried(place: Path, tiny_folder: Path, kind: str, **more: Any) -> Trial:
    given: dict[str, Any] = {"train": [place / "north.jsonl"], "unseen": place / "unseen.jsonl", "retraining": QUICK}
    return try_selection(str(tiny_folder), place / ADAPTER, choice(place, kind), **(given | more))


def test_a_good_choice_is_better_than_chance_and_a_bad_one_worse(place: Path, tiny_folder: Path) -> None:
    good, bad = (tried(place, tiny_folder, kind, seeds=2) for kind in ("like", "unlike"))
    assert good.against_random.high is not None
    assert good.against_random.high < 0
    assert bad.against_random.low is not None
    assert bad.against_random.low > 0
    assert good.verdict == "The choice is better than chance."
    assert bad.verdict.startswith("The choice is worse than chance")
    assert good.losses[EVERYTHING] == bad.losses[EVERYTHING]  # the same training
    assert good.losses[RANDOM] == bad.losses[RANDOM]
    assert good.losses[CHOSEN].value < good.losses[EVERYTHING].value < bad.losses[CHOSEN].value
    assert (good.chosen, good.records, good.unseen, good.losses[CHOSEN].n) == (12, 24, 8, 2)
    # differences are those of the means
    gap = good.losses[CHOSEN].value - good.losses[RANDOM].value
    assert good.against_random.value == pytest.approx(gap, rel=1e-9)


def test_all_take_as_many_steps(place: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from allmend.attribution import trial

    seen: list[tuple[int, int]] = []
    train = trial.retrain

    def counted(trainable: Any, records: Any, *args: Any, steps: int, **more: Any) -> Any:
        taken: list[Any] = []
        on_step = more.pop("on_step")

        def both(step: Any) -> None:
            taken.append(step)
            on_step(step)

        found = train(trainable, records, *args, steps=steps, on_step=both, **more)
        seen.append((len(records), len(taken)))
        return found

    monkeypatch.setattr(trial, "retrain", counted)
    found = tried(place, tiny_folder, "like", seeds=1)
    assert [count for count, _ in seen] == [24, 12, 12]
    assert {steps for _, steps in seen} == {found.steps} == {36}
    assert found.losses[CHOSEN].low is None  # one seed has no spread


def test_what_was_trained_on_is_not_unseen(place: Path, tiny_folder: Path) -> None:
    with pytest.raises(UserError, match="training records too"):
        tried(place, tiny_folder, "like", unseen=place / "like.jsonl")
    with pytest.raises(UserError, match="must be 1 or more, got 0"):
        tried(place, tiny_folder, "like", seeds=0)
