"""A run whose members find each other: its graph as a table, as it was, in the report and on the terminal."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from allmend import make_recipe, tune
from allmend.cli import app
from allmend.collaborators import collaborating, graph_of, groups_of, groups_of_state, read_collaborators
from allmend.errors import UserError
from allmend.federation.collaboration.graph import Graph, pair_of
from allmend.federation.strategies.cobo import CoBo
from allmend.life import rehearse
from allmend.recipe import Recipe, RecipeError
from allmend.results import CollaboratorsTable
from allmend.run import RunFolder
from allmend.strategy import State, grouped

CLIENTS = {"de-a": "Haus {}", "de-b": "Haus {}", "nl-a": "boom {}"}
SIZES = dict.fromkeys(CLIENTS, 10)


@pytest.fixture(scope="module")
def recipe(tiny_folder: Path) -> Recipe:
    return make_recipe(
        {
            "model": {"source": str(tiny_folder)},
            "data": {"held_out": 0.2},
            "clients": [{"name": name, "data": f"{name}.jsonl"} for name in CLIENTS],
            "adapter": {"rank": 2},
            "train": {"learning_rate": 0.01, "batch_size": 4},
            "strategy": {"name": "cobo", "rounds": 4, "pairs_per_member": 3.0, "rho": 0.2},
            "compare": {"local": {"strategy": {"name": "local"}}},
        }
    )


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("work")
    generator = random.Random(0)
    for name, words in CLIENTS.items():
        rows = [
            {"id": f"{name}{i}", "prompt": f"{i}?", "response": words.format(generator.randrange(99))}
            for i in range(SIZES[name])
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tune(recipe, folder / "run", base=folder)


def test_the_graph_is_among_the_results(run: RunFolder, recipe: Recipe) -> None:
    table = run.read_table("collaborators", CollaboratorsTable)
    assert table is not None
    (graph,) = table.arms
    assert graph == read_collaborators(run, recipe)
    assert graph.members == tuple(CLIENTS)
    assert [(pair.one, pair.other) for pair in graph.pairs] == [(0, 1), (0, 2), (1, 2)]
    assert graph.round == 4
    log = pq.read_table(run.arm("cobo") / "graph.parquet").to_pylist()
    assert len(log) == sum(pair.visits for pair in graph.pairs) > 0
    for pair in graph.pairs:
        names = {graph.members[pair.one], graph.members[pair.other]}
        mine = [row for row in log if {row["i"], row["j"]} == names]
        assert (mine[-1]["round"], mine[-1]["product"]) == (pair.last, pair.product)
        assert mine[-1]["w"] == pytest.approx(pair.weight)


def test_each_member_leaves_with_an_adapter(run: RunFolder) -> None:
    for name in CLIENTS:
        assert (run.arm("cobo") / "members" / name / "adapter" / "adapter_model.safetensors").is_file()


def test_the_graph_as_it_was(run: RunFolder, recipe: Recipe) -> None:
    first, last = (read_collaborators(run, recipe, "cobo", round=round) for round in (1, 4))

    assert last == read_collaborators(run, recipe)
    assert first.round == 1
    assert all(pair.last <= 1 for pair in first.pairs)
    assert first.visits <= last.visits
    with pytest.raises(UserError, match="there is no round 5: 4 are done"):
        read_collaborators(run, recipe, round=5)
    with pytest.raises(UserError, match=r"'local' has no graph.*\n.*cobo"):
        read_collaborators(run, recipe, "local")


def test_arms_without_a_graph_have_none(recipe: Recipe) -> None:
    assert [arm.name for arm in collaborating(recipe)] == ["cobo"]


def test_it_is_in_the_report_and_on_the_terminal(run: RunFolder, tmp_path: Path) -> None:
    page = (run.path / "report.html").read_text()
    assert "Who worked with whom" in page
    assert "Weights of pairs" in page

    shown = CliRunner().invoke(app, ["collaborators", str(run.path), "--svg", str(tmp_path / "graph.svg")])
    assert shown.exit_code == 0, shown.output
    assert "After round 4, 3 clients stand in" in " ".join(shown.output.split())
    assert all(name in shown.output for name in CLIENTS)
    assert (tmp_path / "graph.svg").read_text().startswith("<svg")

    told = CliRunner().invoke(app, ["collaborators", f"{run.path}:cobo", "--round", "2", "--json"])
    assert json.loads(told.output)["round"] == 2


@pytest.fixture(scope="module")
def in_groups(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Six clients of two languages, far apart."""
    folder = tmp_path_factory.mktemp("groups")
    names = [f"{kind}-{number}" for number in range(3) for kind in ("de", "nl")]
    generator = random.Random(1)
    for name in names:
        words = "Haus und Hof {}" if name.startswith("de") else "0 1 0 1 0 1 {}"
        rows = [
            {"id": f"{name}{i}", "prompt": "?", "response": words.format(generator.randrange(99))} for i in range(24)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = recipe.model_dump(exclude={"compare", "strategy", "clients"}, exclude_none=True)
    own = {"name": "clustered", "rounds": 4, "common_rounds": 0.5}
    clients = [{"name": name, "data": f"{name}.jsonl"} for name in names]
    return tune(make_recipe(values | {"strategy": own, "clients": clients}), folder / "run", base=folder)


def test_groups_are_among_the_results_in_the_report_and_on_the_terminal(in_groups: RunFolder) -> None:
    table = in_groups.read_table("collaborators", CollaboratorsTable)
    assert table is not None
    (found,) = table.grouped
    assert found.count == 2
    assert {one.member[:2]: one.group for one in found.members} == {"de": 0, "nl": 1}
    assert all(one.own is not None and one.next is not None and one.own > one.next for one in found.members)
    assert "6 clients stand in 2 groups" in (in_groups.path / "report.html").read_text()

    shown = CliRunner().invoke(app, ["collaborators", str(in_groups.path)])
    assert shown.exit_code == 0, shown.output
    assert "group 2" in shown.output
    told = CliRunner().invoke(app, ["collaborators", str(in_groups.path), "--json"])
    assert json.loads(told.output)["round"] == 2
    for options, words in ((("--round", "1"), "found after round 2"), (("--svg", "x.svg"), "no graph to draw")):
        refused = CliRunner().invoke(app, ["collaborators", str(in_groups.path), *options])
        assert isinstance(refused.exception, UserError) or refused.exit_code == 2
        assert words in f"{refused.exception} {refused.output}"
    for name in ("de-0", "nl-2"):
        assert (in_groups.arm("clustered") / "members" / name / "adapter" / "adapter_model.safetensors").is_file()


def test_who_is_alone_and_who_came_late_have_no_cosines_of_a_group() -> None:
    sketches = torch.eye(4)[[0, 0, 0, 1]].repeat_interleave(2, 1)
    facts: dict[str, Any] = {
        "told": "a\nb\nc\nd",
        "group/a": 0,
        "group/b": 0,
        "group/c": 0,
        "group/d": -1,
        "group/e": 0,
    }

    found = groups_of_state("clustered", State({"sketches": sketches}, facts), 3)

    assert [one.member for one in found.members] == ["a", "b", "c", "e", "d"]
    assert found.alone == ["d"]
    by_name = {one.member: one for one in found.members}
    assert by_name["a"].own == pytest.approx(1)
    assert by_name["a"].next is None
    assert (by_name["d"].own, by_name["d"].next) == (None, 0)
    assert (by_name["e"].own, by_name["e"].next) == (None, None)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"largest_update": 1.0}}, "cobo's members keep it"),
        ({"privacy": {"record": {"noise_multiplier": 1.0}}}, "gradients at midpoints tell more"),
        ({"privacy": {"secure_aggregation": {}}}, "looks at each member's adapter, gradient"),
        ({"adapter": {"kind": "full"}}, "set geometry to 'factors'"),
    ],
)
def test_what_does_not_go_together_is_refused(recipe: Recipe, tmp_path: Path, sections: Any, words: str) -> None:
    values = recipe.model_dump(exclude={"compare", *sections}, exclude_none=True)
    for name in CLIENTS:
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 4)
    with pytest.raises(RecipeError, match=words):
        rehearse(make_recipe(values | sections), tmp_path)


def test_more_members_than_the_graph_has_room_for(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("allmend.check.DENSE", 2)
    with pytest.raises(RecipeError, match="at most 2 clients, and these are 3"):
        rehearse(recipe, tmp_path)


def test_groups_are_those_whose_weights_are_high_on_average() -> None:
    w = torch.tensor(
        [
            [0.0, 0.1, 0.9, 0.0, 0.2],
            [0.1, 0.0, 0.0, 0.8, 0.1],
            [0.9, 0.0, 0.0, 0.1, 0.0],
            [0.0, 0.8, 0.1, 0.0, 0.3],
            [0.2, 0.1, 0.0, 0.3, 0.0],
        ]
    )
    assert groups_of(graph_of_matrix(w)) == [0, 1, 0, 1, 2]
    assert groups_of(graph_of_matrix(torch.zeros(1, 1))) == [0]
    assert groups_of(graph_of_matrix(1 - torch.eye(3))) == [0, 0, 0]


def test_groups_of_many_are_those_joined_by_high_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("allmend.collaborators.DENSE", 3)
    w = torch.zeros(5, 5)
    for i, j, weight in ((0, 2, 0.9), (2, 4, 0.6), (1, 3, 0.7), (0, 1, 0.4)):
        w[i, j] = w[j, i] = weight

    assert groups_of(graph_of_matrix(w)) == [0, 1, 0, 1, 0]


def graph_of_matrix(w: torch.Tensor) -> Graph:
    n = len(w)
    numbers = torch.arange(n * (n - 1) // 2)
    i, j = pair_of(numbers)
    return Graph(n, numbers, w[i, j], torch.zeros(len(i), dtype=torch.int64))


def test_a_coordinators_state_without_any_probe() -> None:
    one = {"numbers": torch.tensor([0]), "weights": torch.ones(1), "visits": torch.tensor([0])}
    state = State(grouped("graph", one), {"members": "a\nb"})

    graph = graph_of("cobo", state, 1, CoBo())

    assert graph.pairs[0].weight == 1
    assert graph.pairs[0].product is None
    assert graph.probed == 0
    assert not graph.frozen
    assert graph.partners(0) == [1]
