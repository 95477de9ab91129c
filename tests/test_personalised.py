"""Did working together pay: the arms of a run on members' own records, as a table, in words, and in the report."""

import json
import math
import random
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from allmend import make_recipe, tune
from allmend.cli import app
from allmend.errors import UserError
from allmend.events import RoundDone, StepDone
from allmend.learn.compare import ModelScores
from allmend.learn.evaluate import Score
from allmend.learn.schedule import batches
from allmend.learn.scores import write_scores
from allmend.personalised import compare_arms
from allmend.recipe import Recipe
from allmend.report.sections.personalised import in_words, notes_of, paid_in_words
from allmend.results import PersonalisedTable, UtilityTable
from allmend.run import RunFolder

CLIENTS = {"de-a": "Haus {}", "de-b": "Haus {}", "nl-a": "boom {}"}


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("paid")
    generator = random.Random(0)
    for name, words in CLIENTS.items():
        rows = [
            {"id": f"{name}{i}", "prompt": f"{i}?", "response": words.format(generator.randrange(99))}
            for i in range(20)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = make_recipe(
        {
            "model": {"source": str(tiny_folder)},
            "data": {"held_out": 0.4},
            "clients": [{"name": name, "data": f"{name}.jsonl"} for name in CLIENTS],
            "adapter": {"rank": 2},
            "train": {"learning_rate": 0.01, "batch_size": 4, "local_steps": 2},
            "strategy": {"name": "fedavg", "rounds": 2},
            "compare": {"local": {"strategy": {"name": "local"}}},
        }
    )
    return tune(recipe, folder / "run", base=folder)


def test_a_finished_run_has_the_table(run: RunFolder) -> None:
    assert run.read_table("personalised", PersonalisedTable) == compare_arms(run)
    table = compare_arms(run)
    assert table.against == "local"
    assert [arm.arm for arm in table.arms] == ["fedavg", "local"]
    assert [(arm.alone, arm.difference is None) for arm in table.arms] == [(False, False), (True, True)]
    assert {row.member for row in table.members} == set(CLIENTS)


def test_losses_and_differences_are_those_of_the_table_of_utility(run: RunFolder) -> None:
    """Which comes to them by other ways."""
    table, utility = compare_arms(run), run.read_table("utility", UtilityTable)
    assert utility is not None
    for row in table.members:
        for arm, loss in row.losses.items():
            (known,) = (
                one.perplexity
                for one in utility.rows
                if (one.model, one.held_out) == (arm, row.member) and one.member in (None, row.member)
            )
            assert known is not None
            assert math.exp(loss.value) == pytest.approx(known.value)
        (known,) = (
            one.log_perplexity
            for one in utility.differences
            if (one.model, one.other, one.held_out) == ("fedavg", "local", row.member)
        )
        assert row.difference is not None
        assert row.difference == known
        assert (row.together, row.best) == ("fedavg", min(row.losses, key=lambda name: row.losses[name].value))
    fedavg, local = table.arms
    assert fedavg.difference is not None
    each = [row.losses["fedavg"].value - row.losses["local"].value for row in table.members]
    assert fedavg.difference.value == pytest.approx(sum(each) / 3)
    assert fedavg.loss.value - local.loss.value == pytest.approx(fedavg.difference.value)
    assert fedavg.regret == pytest.approx(max(0.0, *each))
    assert local.regret == pytest.approx(max(0.0, *(-one for one in each)))


def test_bytes_and_steps_are_those_of_the_log(run: RunFolder) -> None:
    fedavg, local = compare_arms(run).arms
    rounds = [event for event in run.history() if isinstance(event, RoundDone) and event.arm == "fedavg"]
    assert fedavg.sent == sum(event.sent["de-a"] for event in rounds) > 0
    assert fedavg.received == sum(event.received["nl-a"] for event in rounds) > 0
    assert (local.sent, local.received) == (0, 0)
    steps = [event.step for event in run.history() if isinstance(event, StepDone) and event.client == "de-b"]
    assert fedavg.steps == local.steps == dict.fromkeys(CLIENTS, max(steps))
    sizes = next(event for event in run.history() if event.type == "run.started").clients
    for name, size in sizes.items():
        seen = sum(map(len, islice(batches(size, 4, seed=0, first=0), 4)))  # of four steps
        assert fedavg.passes[name] == local.passes[name] == pytest.approx(seen / size)


def test_it_is_in_the_report_and_on_the_terminal(run: RunFolder) -> None:
    page = (run.path / "report.html").read_text()
    assert page.count("Did working together pay?") >= 2  # the card and the section
    table = compare_arms(run)
    for row in table.members:
        assert paid_in_words(row, table) in page
    shown = CliRunner().invoke(app, ["personalise", "compare", str(run.path)], env={"COLUMNS": "100"})
    assert shown.exit_code == 0, shown.output
    assert max(map(len, shown.output.splitlines())) <= 100
    flat = " ".join(shown.output.split())
    assert in_words(table) in flat
    assert all(name in flat for name in CLIENTS)
    told = CliRunner().invoke(app, ["personalise", "compare", str(run.path), "--against", "fedavg", "--json"])
    assert json.loads(told.output)["against"] == "fedavg"
    assert run.read_table("personalised", PersonalisedTable) == compare_arms(run, "fedavg")


def test_what_cannot_be_compared(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no arm 'ditto'.*\n.*fedavg, local"):
        compare_arms(run, "ditto")
    with pytest.raises(UserError, match="no run is here"):
        CliRunner().invoke(app, ["personalise", "compare", str(tmp_path)], catch_exceptions=False)


# --- scores that are made up

Losses = Mapping[str, Mapping[str, list[float]]]
"""By arm and client, of its records."""


def folder(path: Path, arms: Mapping[str, str], losses: Losses, *, shared: tuple[str, ...] = ("fedavg",)) -> RunFolder:
    """A run whose arms have these strategies, and those with losses their scores, of ten tokens a record."""
    names = list(next(iter(losses.values()), {"a": []}))
    first, *others = arms
    recipe: Recipe = make_recipe(
        {
            "clients": [{"name": name, "data": f"{name}.jsonl"} for name in names],
            "strategy": {"name": arms[first]},
            "compare": {name: {"strategy": {"name": arms[name]}} for name in others},
        }
    )
    made = RunFolder.create(path, recipe.to_toml(), {"recipe": recipe.digest()})
    made.events.touch()
    for arm, by_client in losses.items():
        scores = {
            name: [Score(f"{name}-{i}", "", 10 * loss, 10) for i, loss in enumerate(by_client[name])] for name in names
        }
        models = [None] if arm in shared else names
        write_scores(made.scores(arm), [ModelScores(arm, model, scores) for model in models])
    return made


FAR = {
    "local": {"a": [3.0, 3.1, 2.9, 3.0], "b": [2.0, 2.1, 1.9, 2.0], "c": [2.0, 2.5, 1.5, 2.0]},
    "fedavg": {"a": [2.5, 2.61, 2.41, 2.5], "b": [2.3, 2.42, 2.2, 2.31], "c": [2.4, 2.0, 2.0, 1.5]},
}
ARMS = {"fedavg": "fedavg", "local": "local"}


def test_yes_no_and_cannot_be_told(tmp_path: Path) -> None:
    table = compare_arms(folder(tmp_path / "run", ARMS, FAR))
    words = {row.member: paid_in_words(row, table) for row in table.members}
    assert [row.paid for row in table.members] == [True, False, None]
    assert words["a"].startswith("yes, by 0.495 (0.4")
    assert words["a"].endswith("with fedavg")
    assert words["b"].startswith("no: local is better by 0.30")
    assert words["c"].startswith("cannot be told: fedavg minus local is −0.025 (−")
    assert in_words(table).endswith("better than local for 1 of 3 clients, and worse for 1; for 1 it cannot be told.")
    assert [row.best for row in table.members] == ["fedavg", "local", "fedavg"]
    fedavg, local = table.arms
    assert (fedavg.regretting, local.regretting) == ("b", "a")
    assert local.regret == pytest.approx(0.495)


def test_the_choice_among_arms_widens_the_interval_and_the_value_is_the_lowest(tmp_path: Path) -> None:
    worse = {name: [loss + 1.0 for loss in losses] for name, losses in FAR["fedavg"].items()}
    few = compare_arms(folder(tmp_path / "few", ARMS, FAR))
    many = compare_arms(
        folder(tmp_path / "many", ARMS | {"prox": "fedprox"}, FAR | {"prox": worse}, shared=("fedavg", "prox"))
    )
    for one, other in zip(few.members, many.members, strict=True):
        assert one.difference is not None
        assert other.difference is not None
        assert other.difference.value == one.difference.value
        assert other.difference.high - other.difference.low > one.difference.high - one.difference.low  # type: ignore[operator]
    assert "lowest of 2 arms" in " ".join(notes_of(many))
    assert "lowest of" not in " ".join(notes_of(few))
    # the arms' own differences are what they were
    assert many.arms[0].difference == few.arms[0].difference


def test_without_an_arm_that_trains_alone_one_must_be_named(tmp_path: Path) -> None:
    made = folder(
        tmp_path / "run",
        {"fedavg": "fedavg", "own": "ditto"},
        {"fedavg": FAR["fedavg"], "own": FAR["local"]},
    )
    table = compare_arms(made)
    assert table.against is None
    assert all(arm.difference is None for arm in table.arms)
    assert all(row.difference is None and row.paid is None for row in table.members)
    assert "No finished arm trains alone" in notes_of(table)[0]
    assert compare_arms(made, "own").members[0].paid is True
    shown = CliRunner().invoke(app, ["personalise", "compare", str(made.path)], env={"COLUMNS": "100"})
    assert shown.exit_code == 0, shown.output


def test_an_arm_that_trains_alone_and_is_lower_still_is_named(tmp_path: Path) -> None:
    lower = {name: [loss - 1.0 for loss in losses] for name, losses in FAR["fedavg"].items()}
    table = compare_arms(folder(tmp_path / "run", ARMS | {"wide": "local"}, FAR | {"wide": lower}))
    assert table.against == "local"
    assert "but wide, in which clients train alone, is lower still" in paid_in_words(table.members[0], table)


def test_who_has_no_held_out_records_is_left_out_and_what_is_not_finished_is_named(tmp_path: Path) -> None:
    losses = {arm: by_client | {"c": []} for arm, by_client in FAR.items()}
    table = compare_arms(folder(tmp_path / "run", ARMS | {"ditto": "ditto"}, losses))
    assert [row.member for row in table.members] == ["a", "b"]
    assert (table.left_out, table.unfinished) == (("c",), ("ditto",))
    notes = " ".join(notes_of(table))
    assert "without a model in every arm: c" in notes
    assert "Not finished yet: ditto" in notes


def test_a_run_without_scores_says_what_to_do(tmp_path: Path) -> None:
    made = folder(tmp_path / "run", ARMS, {})
    with pytest.raises(UserError, match=r"no arm is finished yet.*\n.*--resume"):
        compare_arms(made)
    half = folder(tmp_path / "half", ARMS, {"fedavg": FAR["fedavg"]})
    with pytest.raises(UserError, match="arm 'local' is not finished yet"):
        compare_arms(half, "local")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": {"a": 9}}, "Not at equal steps: clients’ models take 4 steps in local, and others in fedavg (9)"),
        ({"trainable": 100}, "100 in fedavg; 50 in local"),
        ({"simulated": True}, "fedavg: one party with all records"),
    ],
)
def test_arms_that_are_not_alike_are_told_apart(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    table = compare_arms(folder(tmp_path / "run", ARMS, FAR))
    like = [arm.model_copy(update={"steps": {"a": 4}, "trainable": 50}) for arm in table.arms]
    alike = table.model_copy(update={"arms": tuple(like)})
    assert words not in " ".join(notes_of(alike))
    other = table.model_copy(update={"arms": (like[0].model_copy(update=changes), like[1])})
    assert words in " ".join(notes_of(other))
