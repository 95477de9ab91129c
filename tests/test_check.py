"""All that is wrong with a recipe in the light of its strategies, files and model."""

from pathlib import Path

import pytest
from tests.test_prepare import recipe, write

from allmend.check import check
from allmend.recipe import RecipeError


def test_everything_wrong_is_told_at_once_and_inherited_mistakes_once(tiny_folder: Path, tmp_path: Path) -> None:
    write(tmp_path, "north")
    spoilt = recipe(
        tiny_folder,
        adapter={"rank": 99, "targets": ["q_proj", "nothing"]},
        strategy={"name": "fedavg", "participation": 3.0},
        compare={
            "half": {"train": {"batch_size": 1}},
            "odd": {"strategy": {"name": "odd"}, "adapter": {"targets": ["other"], "rank": 1}},
        },
    )
    with pytest.raises(RecipeError) as raised:
        check(spoilt, tmp_path)
    found = [(".".join(map(str, p.key)), p.what) for p in raised.value.problems]
    assert [key for key, _ in found] == [
        "strategy",
        "compare.odd.strategy",
        "clients.1.data",
        "adapter",
        "adapter",
        "compare.odd.adapter",
    ]
    for (_, what), word in zip(found, ("3.0", "'odd'", "south.jsonl", "'nothing'", "99", "'other'"), strict=True):
        assert word in what


def test_a_budget_that_cannot_be_kept_stands_at_its_key(tiny_folder: Path, tmp_path: Path) -> None:
    for client in ("north", "south"):
        write(tmp_path, client)
    beyond = {"member": {"epsilon": 1e-6, "delta": 1e-9}}
    for sections, key in (
        ({"privacy": beyond}, ("privacy", "member", "epsilon")),
        ({"compare": {"x": {"privacy": beyond}}}, ("compare", "x", "privacy", "member", "epsilon")),
    ):
        with pytest.raises(RecipeError, match="the smallest ε that can be reached is") as raised:
            check(recipe(tiny_folder, **sections), tmp_path)
        assert [problem.key for problem in raised.value.problems] == [key]
        assert "allow a larger ε or δ" in str(raised.value)


@pytest.mark.parametrize(
    ("clients", "options", "least"),
    [(2, {}, 2), (4, {"participation": 0.5}, 2), (3, {}, None), (6, {"participation": 0.5}, None)],
)
def test_a_sum_over_too_few_clients_is_found_before_anything_runs(
    clients: int, options: dict[str, float], least: int | None, tiny_folder: Path, tmp_path: Path
) -> None:
    names = [f"c{number}" for number in range(clients)]
    for name in names:
        write(tmp_path, name)
    made = recipe(
        tiny_folder,
        *names,
        strategy={"name": "fedavg", "rounds": 3, **options},
        privacy={"secure_aggregation": {}},
        compare={"plain": {"privacy": {}}},
    )
    if least is None:
        check(made, tmp_path)
        return
    with pytest.raises(RecipeError) as raised:
        check(made, tmp_path)
    (problem,) = raised.value.problems  # the arm without the layer has none
    assert problem.key == ("privacy", "secure_aggregation")
    assert f"has {least} of {clients}" in problem.what


def test_members_draws_by_coins_are_looked_at_round_by_round(tiny_folder: Path, tmp_path: Path) -> None:
    """Eight members at one half: some round of forty draws fewer than three."""
    names = [f"c{number}" for number in range(8)]
    for name in names:
        write(tmp_path, name)
    member = {"clip": 1.0, "noise_multiplier": 1.0}
    sections = {"strategy": {"name": "fedavg", "rounds": 40, "participation": 0.5}}
    check(recipe(tiny_folder, *names, privacy={"member": member}, **sections), tmp_path)
    layers = {"member": member, "secure_aggregation": {}}
    for _ in range(20):  # what nobody can know beforehand does not refuse today what was accepted yesterday
        check(recipe(tiny_folder, *names, privacy=layers | {"randomness": "secure"}, **sections), tmp_path)
    with pytest.raises(RecipeError, match=r"round \d+ of arm 'fedavg' has [012] of 8"):
        check(recipe(tiny_folder, *names, privacy=layers, **sections), tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "groups names nobody"),
        ({"groups": "c0 c1, c2 c9"}, "groups names c9, and there are the clients c0, c1, c2, c3"),
        ({"groups": "c0 c1, c2"}, "c3: in no group"),
        ({"groups": "c0 c1, c2 c3 c0"}, "groups names c0 twice"),
        ({"groups": "c0 c1, c2", "others": "alone"}, None),
        ({"groups": "c0 c1,c2  c3"}, None),
    ],
)
def test_groups_that_are_told_are_of_the_clients(
    options: dict[str, str], words: str | None, tiny_folder: Path, tmp_path: Path
) -> None:
    names = [f"c{number}" for number in range(4)]
    for name in names:
        write(tmp_path, name)
    made = recipe(tiny_folder, *names, compare={"groups": {"strategy": {"name": "grouped", **options}}})
    if words is None:
        check(made, tmp_path)
        return
    with pytest.raises(RecipeError) as raised:
        check(made, tmp_path)
    assert [(problem.key, words in problem.what) for problem in raised.value.problems] == [
        (("compare", "groups", "strategy"), True)
    ]


@pytest.mark.parametrize(("groups", "least"), [("c0 c1 c2, c3 c4 c5", None), ("c0 c1 c2 c3, c4 c5", 2)])
def test_behind_masks_each_group_needs_as_many_as_any_sum(
    groups: str, least: int | None, tiny_folder: Path, tmp_path: Path
) -> None:
    names = [f"c{number}" for number in range(6)]
    for name in names:
        write(tmp_path, name)
    strategy = {"name": "grouped", "groups": groups}
    made = recipe(tiny_folder, *names, strategy=strategy, privacy={"secure_aggregation": {}})
    if least is None:
        check(made, tmp_path)
        return
    with pytest.raises(RecipeError, match=f"has a group with {least} in a round") as raised:
        check(made, tmp_path)
    assert [problem.key for problem in raised.value.problems] == [("privacy", "secure_aggregation")]


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ({"name": "ditto"}, "two models train with the same records"),
        ({"name": "clustered"}, "where a member's gradient points"),
        ({"name": "ifca"}, "a member's loss decides"),
        ({"name": "local", "validation": 0.2}, "fewer records are trained on than are counted"),
        ({"name": "local"}, None),
        ({"name": "finetuned"}, None),
        ({"name": "grouped", "groups": "north, south"}, None),
    ],
)
def test_a_guarantee_for_records_is_for_one_training_a_round(
    strategy: dict[str, object], words: str | None, tiny_folder: Path, tmp_path: Path
) -> None:
    for name in ("north", "south"):
        write(tmp_path, name)
    record = {"noise_multiplier": 1.0, "delta": 1e-3}
    made = recipe(tiny_folder, strategy=strategy, privacy={"record": record}, train={"largest_update": 1.0})
    if words is None:
        check(made, tmp_path)
        return
    with pytest.raises(RecipeError, match=words):
        check(made, tmp_path)
