import json
from itertools import chain
from pathlib import Path

import pytest

from allmend.depth.plan import (
    Drop,
    Plan,
    Prune,
    Shuffle,
    Step,
    Stretch,
    pairs_plan,
    read_plan,
    stretch_plan,
    write_plan,
)
from allmend.errors import UserError


def test_a_stretch_covers_every_layer_once() -> None:
    for layers in range(1, 9):
        for start in range(layers + 1):
            for end in range(start, layers + 1):
                for size in (1, 2, 3):
                    plan = stretch_plan(layers, start, end, size)
                    plan.check(layers)
                    assert list(chain(*plan.groups)) == list(range(layers))
                    assert len(plan.together) == ((end - start) // size if size > 1 else 0)
                    assert plan.depth == layers - (size - 1) * ((end - start) // size)


def test_a_remainder_stays_sequential() -> None:
    assert stretch_plan(7, 1, 6, 2).groups == ((0,), (1, 2), (3, 4), (5,), (6,))
    assert stretch_plan(7, 1, 6, 3).groups == ((0,), (1, 2, 3), (4,), (5,), (6,))


@pytest.mark.parametrize(("start", "end", "size"), [(-1, 2, 2), (2, 1, 2), (0, 5, 2), (0, 2, 0)])
def test_what_is_no_stretch(start: int, end: int, size: int) -> None:
    with pytest.raises(ValueError, match=r"stretch|group"):
        stretch_plan(4, start, end, size)


def test_pairs_anywhere() -> None:
    assert pairs_plan(7, [4, 1]).groups == ((0,), (1, 2), (3,), (4, 5), (6,))
    assert pairs_plan(3, []).groups == ((0,), (1,), (2,))
    for firsts in ([1, 2], [6], [3, 3]):
        with pytest.raises(ValueError, match="no pair of their own"):
            pairs_plan(7, firsts)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        (((0,), (1, 5)), r"\[1, 5\]: layer 5 is not one of the model's 4"),
        (((0,), (1, 2), (2, 3)), r"\[2, 3\]: layer 2 is in the plan twice"),
        (((0,), (1, 3), (2,)), r"\[1, 3\]: its layers are not neighbours"),
        (((0,), (2, 1), (3,)), r"\[2, 1\]: its layers are not neighbours"),
        (((0,), (), (1,)), "empty"),
        (((0,), (1,)), "layer 2 is in no group.*1 others"),
        (((2, 3), (0, 1)), "not in the order"),
    ],
)
def test_plans_that_cannot_be_folded(groups: tuple[tuple[int, ...], ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Plan(groups).check(4)


def test_interventions_on_nothing_or_one_layer_change_nothing() -> None:
    plain = tuple(Step((layer,)) for layer in range(5))
    for change in (Shuffle(2, 2), Shuffle(2, 3), Prune(3, 3), Drop(frozenset()), stretch_plan(5, 2, 3)):
        assert change.steps(5) == plain
    for together in ("parallel", "parallel_sum", "merge"):
        assert Stretch(2, 2, together).steps(5) == plain  # type: ignore[arg-type]
        assert [step.layers for step in Stretch(2, 3, together).steps(5)] == [step.layers for step in plain]  # type: ignore[arg-type]


def test_a_shuffle_is_a_permutation_that_its_seed_decides() -> None:
    orders = {tuple(step.layers[0] for step in Shuffle(2, 9, seed).steps(10)) for seed in range(20)}

    assert len(orders) > 10
    assert all(sorted(order) == list(range(10)) and order[:2] == (0, 1) and order[9] == 9 for order in orders)
    assert Shuffle(2, 9, 3).steps(10) == Shuffle(2, 9, 3).steps(10)


def test_what_is_left_out() -> None:
    assert [step.layers[0] for step in Prune(1, 3).steps(5)] == [0, 3, 4]
    assert [step.layers[0] for step in Drop(frozenset({0, 3})).steps(5)] == [1, 2, 4]


def test_layers_that_are_not_there_or_run_twice() -> None:
    with pytest.raises(UserError, match="layer 9"):
        Plan(((9,),)).steps(3)
    with pytest.raises(UserError, match="runs twice"):
        Plan(((1,), (1,))).steps(3)


def test_a_plan_is_written_and_read(tmp_path: Path) -> None:
    plan = stretch_plan(6, 1, 5)
    write_plan(tmp_path / "plan.json", plan, {"model": "some"})

    assert read_plan(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())["model"] == "some"


@pytest.mark.parametrize("body", ["", "[1]", "{}", '{"groups": 3}', '{"groups": [[0], "12"]}', '{"groups": [[true]]}'])
def test_what_is_no_plan(tmp_path: Path, body: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(body)

    with pytest.raises(UserError, match=r"plan\.json"):
        read_plan(path)
    with pytest.raises(UserError, match="No such file"):
        read_plan(tmp_path / "none.json")
