"""Audits from end to end, on a tiny federation: counts, designs, foreign models, own records, comparison."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from allmend import life
from allmend.auditing import VIEWS, audit_folder, audit_run, compare_runs, mine, read_learnt
from allmend.data.canaries import plant, read_canaries, write_canaries
from allmend.data.chat import Encoder
from allmend.data.records import Record
from allmend.errors import UserError
from allmend.events import RoundDone, Warned
from allmend.models.adapters import applied
from allmend.models.load import LoadedModel, load_model
from allmend.probes import read_probes
from allmend.recipe import Audit, Recipe, make_recipe
from allmend.results import BASE, AuditTable, PrivacyTable, UtilityTable
from allmend.run import RunFolder

MakeRecipe = Callable[..., Recipe]

QUICK = Audit(prefix_tokens=[20], exposure=[])


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> LoadedModel:
    return load_model(str(tiny_folder))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    for client in ("north", "south"):
        rows = [{"id": f"{client}{i}", "prompt": f"{client} {i}?", "response": f"It is {7 * i}."} for i in range(12)]
        (folder / f"{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def make(tiny_folder: Path) -> MakeRecipe:
    def build(**sections: object) -> Recipe:
        return make_recipe(
            {
                "seed": 3,
                "model": {"source": str(tiny_folder)},
                "data": {"held_out": 0.3, "max_tokens": 300},
                "clients": [{"name": name, "data": f"{name}.jsonl"} for name in ("north", "south")],
                "adapter": {"rank": 2},
                "train": {"learning_rate": 0.01, "batch_size": 4},
                "strategy": {"name": "fedavg", "rounds": 2},
                "canaries": {"copies": [1, 3], "count": 3},
                "audit": {"prefix_tokens": [20], "exposure": ["ward"], "membership_records": 2},
            }
            | sections
        )

    return build


@pytest.fixture(scope="module")
def run(workplace: Path, make: MakeRecipe, model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """With every layer in an arm of its own, and what each party sees."""
    recipe = make(
        compare={
            "goldfish": {"privacy": {"goldfish": {}}},
            "once": {"privacy": {"deduplicate": {}}},
            "private": {"privacy": {"record": {"epsilon": 8.0, "delta": 0.01}}},
        },
        audit={"prefix_tokens": [20], "exposure": ["ward"], "membership_records": 2, "views": True},
    )
    return life.tune(recipe, tmp_path_factory.mktemp("runs") / "run", base=workplace, model=model)


def test_every_planted_canary_was_learnt_from_as_often_as_it_stands_there(run: RunFolder, model: LoadedModel) -> None:
    encoder = Encoder(model.tokenizer, "plain", 300)
    once = read_learnt(run, "once")
    for canary in read_canaries(run.canaries):
        plain, masked = (read_learnt(run, arm).get(canary.id) for arm in ("fedavg", "goldfish"))
        assert (plain is not None) is canary.inserted
        if plain is None or masked is None:
            continue
        targets = len(encoder.for_training(Record(canary.id, text=canary.text))) - 1
        passes = 2 * canary.copies  # rounds of one epoch each
        assert plain == (passes, passes * targets)
        assert masked[0] == passes
        assert 0.6 * plain[1] < masked[1] < 0.9 * plain[1]
        assert once[canary.id] == (2, 2 * targets)


def test_the_table_says_how_much_was_learnt_from(run: RunFolder) -> None:
    audit = run.read_table("audit", AuditTable)
    assert audit is not None
    canaries = [canary for canary in read_canaries(run.canaries) if canary.inserted]
    for row in audit.learnt:
        counts = [read_learnt(run, row.model)[canary.id] for canary in canaries if canary.copies == row.copies]
        assert row.canaries == len(counts)
        assert row.steps == pytest.approx(sum(steps for steps, _ in counts) / len(counts))
        assert row.tokens == pytest.approx(sum(tokens for _, tokens in counts) / len(counts))
        assert row.least_tokens == min(tokens for _, tokens in counts)
    plain = {row.copies: row.steps for row in audit.learnt if row.model == "fedavg"}
    assert plain == {1: 2, 3: 6}


def test_the_private_arm_has_a_guarantee_and_tells_no_loss(run: RunFolder) -> None:
    table = run.read_table("privacy", PrivacyTable)
    assert table is not None
    assert set(table.budgets) == {"private"}
    rounds = [event for event in run.history() if isinstance(event, RoundDone) and event.arm == "private"]
    assert [event.loss for event in rounds] == [None, None]
    for budget in table.budgets["private"]:
        assert budget.simulated
        assert budget.epsilon is not None
        assert budget.epsilon <= 8.0
        assert list(budget.by_round) == [event.epsilon[str(budget.client)] for event in rounds]
        assert budget.by_round[-1] == pytest.approx(budget.epsilon)


def test_what_poisson_sampling_never_drew_is_left_out_and_keeps_its_coin(run: RunFolder) -> None:
    audit = run.read_table("audit", AuditTable)
    assert audit is not None
    counts = read_learnt(run, "private")
    unseen = {name for name, (steps, _) in counts.items() if not steps}
    asked = {probe.canary for probe in read_probes(run.path / "results" / "audit.parquet") if probe.model == "private"}
    everybody = {canary.id for canary in read_canaries(run.canaries)}
    assert asked == everybody - unseen
    assert any(reason.startswith("private:") for reason in audit.refused) is bool(unseen)
    (whole,) = (row for row in audit.epsilon if (row.model, row.copies) == ("private", None))
    assert whole.canaries == len(everybody)


def test_a_canary_that_was_never_learnt_from_fails_the_audit_and_keeps_the_model(
    workplace: Path, make: MakeRecipe, model: LoadedModel, tmp_path: Path
) -> None:
    recipe = make(strategy={"name": "fedavg", "rounds": 1, "participation": 0.5})
    with pytest.raises(UserError, match=r"never learnt from in arm 'fedavg'.*took part in no round"):
        life.tune(recipe, tmp_path / "run", base=workplace, model=model)
    assert (tmp_path / "run" / "arms" / "fedavg" / "adapter" / "adapter_config.json").is_file()
    assert not (tmp_path / "run" / "results" / "audit.json").exists()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"learning_rate": 0.01, "batch_size": 4, "local_steps": 1}}, ("training was too short",)),
        # at so little similarity every canary is a near duplicate of the one before
        ({"privacy": {"deduplicate": {"similarity": 0.05}}}, ("privacy.deduplicate left out",)),
    ],
)
def test_whatever_keeps_a_canary_from_being_learnt_fails_the_audit(
    sections: dict[str, object],
    words: tuple[str, ...],
    workplace: Path,
    make: MakeRecipe,
    model: LoadedModel,
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match="never learnt from in arm 'fedavg'") as raised:
        life.tune(make(**sections), tmp_path / "run", base=workplace, model=model)
    for word in (*words, "The tuned models are kept"):
        assert word in str(raised.value)
    run = RunFolder.open(tmp_path / "run")
    assert run.read_table("utility", UtilityTable) is not None
    with applied(model.model, run.arm("fedavg") / "adapter"):
        pass  # it loads
    # an audit of its own meets the same end
    with pytest.raises(UserError, match="never learnt from in arm 'fedavg'"):
        audit_run(run.path, model=model)
    assert not (run.path / "results" / "audit.json").exists()


def test_guarantees_are_paid_for_the_records_that_the_layers_leave(
    workplace: Path, make: MakeRecipe, model: LoadedModel, tmp_path: Path
) -> None:
    """What the table says afterwards is what each round said, whichever layers came before the noise."""
    record = {"noise_multiplier": 1.0, "delta": 0.01}
    recipe = make(
        canaries=None,
        compare={
            "both": {"privacy": {"record": record, "deduplicate": {"similarity": 0.3}, "goldfish": {"k": 2}}},
            "open": {"privacy": {"record": {"noise_multiplier": 0, "clip": math.inf}}},
            "clipped": {"privacy": {"record": {"noise_multiplier": 0}}},
            "faint": {"privacy": {"record": {"noise_multiplier": 0.005}}},
            "everybody": {"privacy": {"member": {"noise_multiplier": 0, "clip": math.inf}}},
        },
    )
    run = life.tune(recipe, tmp_path / "run", base=workplace, model=model)
    table = run.read_table("privacy", PrivacyTable)
    assert table is not None
    rounds = [event for event in run.history() if isinstance(event, RoundDone) and event.arm == "both"]
    for budget in table.budgets["both"]:
        assert budget.by_round[-1] == budget.epsilon == rounds[-1].epsilon[str(budget.client)]
        assert budget.stopped is None
    assert [words.split(" ")[0] for words in table.layers["both"]] == ["deduplication", "Goldfish"]
    assert " 0 similar" not in table.layers["both"][0]  # something was left out, or nothing would be shown
    # what guarantees nothing is not given an ε, and what does nothing is not there
    assert set(table.budgets) == {"both", "clipped", "faint"}
    assert {budget.epsilon for arm in ("clipped", "faint") for budget in table.budgets[arm]} == {None}


def test_a_budget_ends_training_before_it_is_exceeded(
    workplace: Path, make: MakeRecipe, model: LoadedModel, tmp_path: Path
) -> None:
    privacy = {"member": {"noise_multiplier": 1.0, "epsilon": 7.0, "delta": 1e-5}}
    recipe = make(privacy=privacy, strategy={"name": "fedavg", "rounds": 9})
    told: list[object] = []
    run = life.tune(recipe, tmp_path / "run", base=workplace, model=model, listeners=[told.append])
    rounds = [event for event in run.history() if isinstance(event, RoundDone)]
    assert 0 < len(rounds) < 9
    assert any(isinstance(event, Warned) and "budget ends the training" in event.message for event in told)
    table = run.read_table("privacy", PrivacyTable)
    assert table is not None
    (budget,) = table.budgets["fedavg"]
    assert (budget.unit, budget.stopped) == ("member", len(rounds))
    assert budget.epsilon is not None
    assert budget.epsilon <= 7.0
    longer = make(privacy={"member": {"noise_multiplier": 1.0, "epsilon": 0.5}})
    with pytest.raises(UserError, match=r"one round costs ε = [\d.]+, more than the budget of 0.5"):
        life.tune(longer, tmp_path / "dear", base=workplace, model=model)
    assert not (tmp_path / "dear").exists()


def test_the_last_broadcast_shows_what_the_final_model_does(run: RunFolder) -> None:
    audit = run.read_table("audit", AuditTable)
    assert audit is not None
    for arm in ("fedavg", "goldfish"):
        views = [view for view in audit.views if view.model == arm]
        assert {(view.round, view.party, view.of) for view in views} >= {(1, "members", None), (2, "members", None)}
        for gap in (gap for gap in audit.gaps if gap.model == arm):
            (last,) = (v for v in views if (v.round, v.party, v.copies) == (2, "members", gap.copies))
            assert last.gap.value == pytest.approx(gap.gap.value, abs=1e-4)
        # with each member's update, its own canaries
        seen = {(view.round, view.of) for view in views if view.party == "coordinator"}
        assert seen <= {(round, name) for round in (1, 2) for name in ("north", "south")}
        assert len(seen) >= 2
    assert {path.name for path in (run.arm("fedavg") / VIEWS / "round-000001").iterdir()} == {
        "broadcast.safetensors",
        "update-north.safetensors",
        "update-south.safetensors",
    }


def test_an_adapter_made_elsewhere_is_audited_alike(run: RunFolder, tiny_folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(run.arm("fedavg") / "adapter", adapter)
    table = audit_folder(str(tiny_folder), run.canaries, adapter=adapter, out=tmp_path / "out", settings=QUICK)
    own = run.read_table("audit", AuditTable)
    assert own is not None
    gaps = {(gap.model, gap.copies): gap.gap.value for gap in own.gaps}
    for gap in table.gaps:
        name = BASE if gap.model == BASE else "fedavg"
        assert gap.gap.value == pytest.approx(gaps[name, gap.copies], abs=1e-5)
    assert table.design_changed is None
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results", "report.html"}


def test_a_tuned_model_is_audited_with_and_without_its_reference(
    workplace: Path, make: MakeRecipe, model: LoadedModel, tiny_folder: Path, tmp_path: Path
) -> None:
    recipe = make(adapter={"kind": "full"}, train={"learning_rate": 1e-3, "batch_size": 4})
    run = life.tune(recipe, tmp_path / "run", base=workplace, model=model)
    card = run.arm("fedavg") / "model" / "README.md"
    assert card.read_text().count("## Memorisation") == 1
    tuned = tmp_path / "tuned"
    shutil.copytree(run.arm("fedavg") / "model", tuned)
    beside = audit_folder(str(tuned), run.canaries, out=tmp_path / "one", reference=str(tiny_folder), settings=QUICK)
    alone = audit_folder(str(tuned), run.canaries, out=tmp_path / "two", settings=QUICK)
    own = run.read_table("audit", AuditTable)
    assert own is not None
    for table in (beside, alone):
        found = {gap.copies: gap.gap.value for gap in table.gaps if gap.model == "model"}
        assert found == pytest.approx(
            {gap.copies: gap.gap.value for gap in own.gaps if gap.model == "fedavg"}, abs=1e-5
        )
    assert {bound.score for bound in beside.epsilon if bound.model == "model"} == {"ratio"}
    assert {bound.score for bound in alone.epsilon} == {"loss"}
    assert {gap.model for gap in alone.gaps} == {"model"}
    assert "ratio" not in {row.score for row in alone.membership}


def test_what_is_no_model_adapter_or_place_is_told_before_anything_is_written(
    run: RunFolder,
    tiny_folder: Path,
    make_tiny_model: Callable[..., torch.nn.Module],
    make_tiny_tokenizer: Callable[..., Any],
    tmp_path: Path,
) -> None:
    stranger = tmp_path / "stranger"
    make_tiny_model(vocab_size=301).save_pretrained(stranger)  # type: ignore[operator]
    make_tiny_tokenizer(special=("<eos>", "<other>")).save_pretrained(stranger)
    table = (run.path / "results" / "audit.json").read_bytes()
    for words, options in (
        ("cannot be applied to the model", {"adapter": tiny_folder}),
        ("another tokenizer", {"reference": str(stranger)}),
        ("a run is here", {"out": run.path}),
    ):
        with pytest.raises(UserError, match=words):
            audit_folder(str(tiny_folder), run.canaries, **{"out": tmp_path / "out"} | options)
    assert not (tmp_path / "out").exists()
    assert (run.path / "results" / "audit.json").read_bytes() == table


def test_canaries_of_another_run_are_refused(run: RunFolder, tiny_folder: Path, tmp_path: Path) -> None:
    others = tmp_path / "others.jsonl"
    write_canaries(others, plant(clients=["north"], copies=[1], per_cell=4, seed=99))
    with pytest.raises(UserError, match="not the canaries of the run"):
        audit_run(run.path, canaries=others)
    with pytest.raises(UserError, match="not the canaries of the run"):
        audit_folder(str(tiny_folder), others, adapter=run.arm("fedavg") / "adapter", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_member_asks_for_its_own_records(run: RunFolder, workplace: Path, model: LoadedModel) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in run.path.rglob("*"))
    own = mine(run.path, workplace / "north.jsonl", controls=workplace / "south.jsonl", model=model)
    assert sorted((path, path.stat().st_mtime_ns) for path in run.path.rglob("*")) == before
    assert [row.model for row in own.records] == [row.model for row in own.controls]
    assert {row.record for row in own.rows} == {f"north{i}" for i in range(12)}
    row = next(row for row in own.rows if (row.model, row.record) == ("fedavg", "north3"))
    text = "north 3? It is 21.<eos>"
    ids = torch.tensor(model.tokenizer(text)["input_ids"])
    with applied(model.model, run.arm("fedavg") / "adapter") as module, torch.no_grad():
        logits = module(input_ids=ids[None]).logits[0, :-1]
    targets = len(model.tokenizer(" It is 21.<eos>")["input_ids"])  # the space is the response's
    likelihood = logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]][-targets:]
    assert row.log_likelihood == pytest.approx(likelihood.mean().item(), abs=1e-4)
    assert row.asked == targets - round(targets / 2)


def test_a_run_whose_base_model_has_changed_tells_nobody_about_its_records(
    run: RunFolder, workplace: Path, make_tiny_model: Callable[..., Any], tiny_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "model"
    shutil.copytree(tiny_folder, other)
    make_tiny_model(seed=1).save_pretrained(other)
    changed = replace(load_model(str(other)), source=str(tiny_folder))
    with pytest.raises(UserError, match="the base model differs"):
        mine(run.path, workplace / "north.jsonl", model=changed)
    with pytest.raises(UserError, match="no run is here"):
        mine(workplace, workplace / "north.jsonl")
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        mine(run.path, workplace / "nowhere.jsonl")


def test_runs_with_other_secrets_are_not_paired_and_keep_apart_names(
    run: RunFolder, workplace: Path, make: MakeRecipe, model: LoadedModel, tmp_path: Path
) -> None:
    """Of another seed: the same ids, other texts. Both folders are called `run`."""
    other = life.tune(make(seed=5), tmp_path / "run", base=workplace, model=model)
    ids = {canary.id for canary in read_canaries(run.canaries)}
    assert {canary.id for canary in read_canaries(other.canaries)} == ids
    found = compare_runs([f"{run.path}:fedavg", other.path])
    assert [one.label for one in found.models] == [f"{run.path}/fedavg", f"{other.path}/fedavg"]
    (pair,) = found.pairs
    assert (pair.paired, pair.gap) == (False, None)
    (unaudited := tmp_path / "unaudited").mkdir()
    shutil.copytree(run.path, unaudited / "run")
    (unaudited / "run" / "results" / "audit.json").unlink()
    with pytest.raises(UserError, match="not been audited yet"):
        compare_runs([run.path, unaudited / "run"])


def test_runs_are_compared_canary_by_canary(run: RunFolder) -> None:
    found = compare_runs([f"{run.path}:fedavg", f"{run.path}:goldfish", f"{run.path}:once"])
    assert [model.label for model in found.models] == ["run/fedavg", "run/goldfish", "run/once"]
    probes = {
        (probe.model, probe.canary): probe
        for probe in read_probes(run.path / "results" / "audit.parquet")
        if probe.copies == 3
    }
    for pair, arm in zip(found.pairs, ("goldfish", "once"), strict=True):
        assert pair.paired
        moved = {True: [], False: []}
        for (model, canary), probe in probes.items():
            if model == arm:
                moved[probe.inserted].append(probe.log_likelihood - probes["fedavg", canary].log_likelihood)
        expected = sum(moved[True]) / len(moved[True]) - sum(moved[False]) / len(moved[False])
        assert pair.gap is not None
        assert pair.gap.value == pytest.approx(expected)
        if "reduces" in pair.words:
            assert pair.same_utility
    with pytest.raises(UserError, match="only one audited model"):
        compare_runs([f"{run.path}:fedavg"])
    with pytest.raises(UserError, match="no audited arm 'absent'"):
        compare_runs([f"{run.path}:absent"])
