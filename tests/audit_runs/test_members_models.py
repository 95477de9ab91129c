"""The audit of members' own models: whose canaries each knows, where figures lie, and going on after a break."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from allmend import life
from allmend.audit.memorisation import tokens_to_read
from allmend.audit_runs import runs
from allmend.audit_runs.runs import UNFINISHED, audit_run, planned_work
from allmend.audit_runs.side_by_side import compare_runs
from allmend.audit_runs.subjects import Subject, records_of, subjects_of
from allmend.errors import UserError
from allmend.events import PhaseDone
from allmend.models.load import LoadedModel
from allmend.outcomes import outcome
from allmend.prepare import prepare
from allmend.probes import read_probes
from allmend.recipe import Recipe, RecipeError, make_recipe
from allmend.results import BASE, AuditTable, KeptByMembers, member_of
from allmend.run import RunFolder

NAMES = ("north", "south")
ARMS = ("local", "grouped", "comigs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("work")
    for client in NAMES:
        rows = [{"id": f"{client}{i}", "prompt": f"{client} {i}?", "response": f"It is {7 * i}."} for i in range(10)]
        (place / f"{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture(scope="module")
def recipe(tiny_folder: Path) -> Recipe:
    """Members that train alone until they know their canaries well, that share one model, and that mix experts."""
    return make_recipe(
        {
            "seed": 3,
            "model": {"source": str(tiny_folder)},
            "data": {"held_out": 0.4, "max_tokens": 400},
            "clients": [{"name": name, "data": f"{name}.jsonl"} for name in NAMES],
            "adapter": {"kind": "full"},
            "train": {"learning_rate": 0.01, "batch_size": 4, "local_steps": 110, "schedule": "constant"},
            "strategy": {"name": "local", "rounds": 1},
            "compare": {
                "grouped": {
                    "train": {"local_steps": 60},
                    "strategy": {"name": "grouped", "groups": "north south", "rounds": 3},
                },
                "comigs": {
                    "adapter": {"kind": "mixture", "rank": 2},
                    "train": {"local_steps": 12},
                    "strategy": {"name": "comigs", "rounds": 1, "validation": 0.3, "router_every": 4},
                },
            },
            "canaries": {"copies": [3], "count": 10, "kinds": ["credential"]},
            "audit": {"prefix_tokens": [20], "exposure": [], "membership_records": 3, "models": list(ARMS)},
        }
    )


@pytest.fixture(scope="module")
def own(recipe: Recipe, folder: Path, model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return life.tune(recipe, tmp_path_factory.mktemp("runs") / "own", base=folder, model=model)


@pytest.fixture(scope="module")
def table(own: RunFolder) -> AuditTable:
    found = own.read_table("audit", AuditTable)
    assert found is not None
    return found


@pytest.fixture
def copy(own: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(own.path, tmp_path / "own")
    return RunFolder(tmp_path / "own")


def test_own_canaries_are_found_in_own_models_and_those_of_others_where_models_were_shared(table: AuditTable) -> None:
    rows: dict[tuple[str, str], KeptByMembers] = {(row.arm, row.whose): row for row in table.members}
    assert set(rows) == {(arm, whose) for arm in ARMS for whose in ("own", "others")}
    gaps = {key: row.gap for key, row in rows.items()}
    alone = gaps["local", "others"]
    assert alone is not None
    by_chance = max(abs(alone.least), abs(alone.most))
    for key in (("local", "own"), ("grouped", "own"), ("grouped", "others")):
        gap, auc = gaps[key], rows[key].auc
        assert gap is not None
        assert gap.least > 3 * by_chance
        assert auc is not None
        assert auc.least > 0.9
    # said plainly of those that know what others planted, and of nobody else
    assert {test.model for test in table.above_chance("others")} == {"grouped/north", "grouped/south"}
    assert {test.model for test in table.above_chance("own")} >= {f"{a}/{n}" for a in ARMS[:2] for n in NAMES}


def test_one_model_for_all_shows_each_the_same(table: AuditTable) -> None:
    """What is own to one is the others' to the other, in one model."""
    gaps = {(gap.model, gap.whose): gap.gap for gap in table.gaps}
    assert gaps["grouped/north", "own"] == gaps["grouped/south", "others"]
    assert gaps["grouped/north", "others"] == gaps["grouped/south", "own"]
    assert gaps["local/north", "own"] != gaps["local/south", "others"]


def test_every_row_says_whose_it_is_about(table: AuditTable, own: RunFolder) -> None:
    named = {f"{arm}/{name}" for arm in ARMS for name in NAMES}
    for rows in (table.extraction, table.gaps, table.discoverable, table.membership, table.epsilon):
        assert {row.model for row in rows} == {BASE, *named}
        assert all((row.whose is None) == (row.model == BASE) for row in rows)
    for row in table.membership:
        client = row.records.rpartition(" of ")[2]
        if row.whose is not None and row.records != "canaries":
            assert (row.whose == "own") == (client == member_of(row.model)[1])
    assert {probe.model for probe in read_probes(own.path / "results" / "audit.parquet")} == {BASE, *named}
    # of shared models nothing is there, and a table of them has none of these
    assert {gap.model for gap in table.of(None).gaps} == {BASE}
    assert {gap.model for gap in table.of("own", "local/north").gaps} == {BASE, "local/north"}


def test_records_that_routers_alone_learnt_from_are_a_group_of_their_own(
    table: AuditTable, recipe: Recipe, folder: Path, model: LoadedModel
) -> None:
    asked = {(row.model, row.records) for row in table.membership if row.records.startswith("validation")}
    groups = {f"validation records (comigs) of {name}" for name in NAMES}
    assert {records for _, records in asked} <= groups
    prepared = prepare(recipe, folder, model=model)
    subjects = subjects_of(prepared, [BASE, *ARMS], recipe.audit)
    found = records_of(prepared, recipe.audit, subjects)
    apart = {group.client: group for group in found[BASE] if group.label in groups}
    assert asked == {(name, apart[one].label) for one in apart for name in (BASE, f"comigs/{one}")}
    assert apart
    for client, group in apart.items():
        whole = next(one for one in prepared.members if one.name == client)
        assert {record.id for record in group.members} <= {record.id for record in whole.validation(0.3)}
        assert not {record.id for record in group.non_members} & {record.id for record in whole.records}
    # where routers learn from what experts do, nothing is set apart
    changed = recipe.model_dump(exclude_unset=True)
    changed["compare"]["comigs"]["strategy"]["router"] = "train"
    prepared = prepare(make_recipe(changed), folder, model=model)
    found = records_of(prepared, recipe.audit, subjects)
    assert not {group.label for some in found.values() for group in some} & groups


def test_a_mixture_is_read_as_it_was_measured(own: RunFolder, model: LoadedModel, table: AuditTable) -> None:
    """And the base in memory is as it was afterwards."""
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    with outcome(own, model, "comigs", "north") as module:
        assert len(module.state_dict()) > len(before)
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    assert all((after[name] == tensor).all() for name, tensor in before.items())
    gaps = {(gap.model, gap.whose): gap for gap in table.gaps}
    assert gaps["comigs/north", "own"].inserted != gaps["comigs/south", "others"].inserted
    with pytest.raises(UserError, match="has no tuned model yet"), outcome(own, model, "comigs", "west"):
        pass


def test_an_audit_that_was_broken_off_goes_on_with_the_next_member(
    copy: RunFolder,
    own: RunFolder,
    recipe: Recipe,
    folder: Path,
    model: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, names = runs.audit_model, list[str]()

    def until(stop: str | None) -> Callable[..., object]:
        def ask(name: str, *arguments: object, **more: object) -> object:
            if name == stop:
                raise KeyboardInterrupt
            names.append(name)
            return real(name, *arguments, **more)  # type: ignore[arg-type]

        return ask

    monkeypatch.setattr(runs, "audit_model", until("grouped/south"))
    with pytest.raises(KeyboardInterrupt):
        audit_run(copy.path, model=model)
    assert names == [BASE, "local/north", "local/south", "grouped/north"]
    left = planned_work(prepare(recipe, folder, model=model), [BASE, *ARMS], recipe.audit, copy)
    assert set(left) == {"audit grouped", "audit comigs"}
    names.clear()
    monkeypatch.setattr(runs, "audit_model", until(None))
    audit_run(copy.path, model=model)
    assert names == ["grouped/south", "comigs/north", "comigs/south"]
    tables = [one.path / "results" / "audit.json" for one in (copy, own)]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    probes = [read_probes(one.path / "results" / "audit.parquet") for one in (copy, own)]
    assert probes[0] == probes[1]
    assert not (copy.path / "results" / UNFINISHED).exists()


def test_the_time_that_is_foretold_counts_every_member(
    own: RunFolder, recipe: Recipe, folder: Path, model: LoadedModel
) -> None:
    prepared = prepare(recipe, folder, model=model)
    work = planned_work(prepared, [BASE, *ARMS], recipe.audit)
    assert list(work) == ["audit base", "audit local", "audit grouped", "audit comigs"]
    subjects = subjects_of(prepared, [BASE, *ARMS], recipe.audit)
    groups = records_of(prepared, recipe.audit, subjects)
    one = tokens_to_read(prepared.canaries, prepared.encoder, recipe.audit, groups["local/north"])
    assert work["audit local"] == work["audit grouped"] == 2 * one
    done = [event.phase for event in own.history() if isinstance(event, PhaseDone) and event.phase.startswith("audit")]
    assert done == list(work)
    assert [subject.name for subject in subjects[:3]] == [BASE, "local/north", "local/south"]
    single = recipe.audit.model_copy(update={"models": ["grouped/south"]})
    assert subjects_of(prepared, [BASE, "grouped"], single) == [Subject(BASE), Subject("grouped", "south")]


def test_each_card_has_its_own_model_s_figures_and_names_nobody(own: RunFolder, table: AuditTable) -> None:
    for arm, kind in (("local", "model"), ("grouped", "model"), ("comigs", "mixture")):
        for name in NAMES:
            card = (own.arm(arm) / "members" / name / kind / "README.md").read_text()
            mine, of_others = card.split("### The other members' canaries")
            for words, whose in ((mine, "own"), (of_others, "others")):
                (row,) = [one for one in table.extraction if (one.model, one.whose) == (f"{arm}/{name}", whose)][:1]
                assert f"| 3 | {round(row.exact.value * row.exact.n)} of {row.exact.n} " in words
                told = any(test.model == f"{arm}/{name}" for test in table.above_chance(whose))  # type: ignore[arg-type]
                assert ("are told from controls above chance" in words) == told
            assert not any(f"{other}" in card for other in NAMES)


def test_one_member_s_model_by_itself(copy: RunFolder, model: LoadedModel) -> None:
    found = audit_run(copy.path, changes={"models": ["local/south"]}, model=model)
    assert {gap.model for gap in found.gaps} == {BASE, "local/south"}
    assert found.design_changed  # what is audited was chosen when the outcome could be known
    assert {row.arm for row in found.members} == {"local"}
    assert all(row.gap and row.gap.mean.n == 1 and row.gap.mean.low is None for row in found.members)
    with pytest.raises(UserError, match="has no audited arm"):
        compare_runs([copy.path, f"{copy.path}:local"])


def test_a_member_whose_model_is_not_here_is_left_out(copy: RunFolder, model: LoadedModel) -> None:
    shutil.rmtree(copy.arm("local") / "members" / "south")
    found = audit_run(copy.path, changes={"models": ["local"]}, model=model)
    assert {gap.model for gap in found.gaps} == {BASE, "local/north"}
    assert any(reason.startswith("local/south: the member took part in no round") for reason in found.refused)


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (["local/west"], "'local/west' is no model: the clients are north, south"),
        (["elsewhere"], "no arm of this recipe is called 'elsewhere'"),
        (["local/west", "elsewhere/north"], "'local/west' is no model.*; no arm of this recipe is called 'elsewhere'"),
        (["local", "local/north"], "named twice"),
    ],
)
def test_names_of_no_model_are_refused_in_one_message(
    models: list[str], words: str, copy: RunFolder, model: LoadedModel
) -> None:
    before = (copy.path / "results" / "audit.json").read_bytes()
    with pytest.raises(UserError, match=words):
        audit_run(copy.path, changes={"models": models}, model=model)
    assert (copy.path / "results" / "audit.json").read_bytes() == before


def test_without_names_they_stay_out(recipe: Recipe, folder: Path, model: LoadedModel, tmp_path: Path) -> None:
    sections = recipe.model_dump(exclude_unset=True)
    del sections["audit"]["models"], sections["compare"]["grouped"], sections["compare"]["comigs"]
    sections["train"]["local_steps"] = 4
    with pytest.raises(RecipeError, match="no model to audit"):
        prepare(make_recipe(sections), folder, model=model)
    sections["compare"]["fedavg"] = {"strategy": {"name": "fedavg", "rounds": 2}}
    run = life.tune(make_recipe(sections), tmp_path / "run", base=folder, model=model)
    found = run.read_table("audit", AuditTable)
    assert found is not None
    assert {gap.model for gap in found.gaps} == {BASE, "fedavg"}
    assert (found.ranks, found.members) == ((), ())
    assert not (run.arm("local") / "members" / "north" / "model" / "README.md").exists()
