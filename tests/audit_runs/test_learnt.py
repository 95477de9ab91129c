from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from allmend import life
from allmend.audit_runs.learnt import never_learnt, read_learnt
from allmend.audit_runs.runs import audit_run
from allmend.data.canaries import canary_of, read_canaries
from allmend.data.chat import Encoder
from allmend.data.records import Record
from allmend.errors import UserError
from allmend.events import PhaseDone, RoundDone, Stopped
from allmend.models.adapters import applied
from allmend.models.load import LoadedModel
from allmend.prepare import prepare, read_frozen
from allmend.probes import read_probes
from allmend.recipe import Recipe
from allmend.results import AuditTable, UtilityTable
from allmend.run import RunFolder

MakeRecipe = Callable[..., Recipe]


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
    with pytest.raises(UserError, match=r"never learnt from in arm 'fedavg'.*took part in no round or training was"):
        life.tune(recipe, tmp_path / "run", base=workplace, model=model)
    history = RunFolder(tmp_path / "run").history()
    assert isinstance(history[-1], Stopped)
    assert not history[-1].resumable  # "in a new run", as the message says
    assert not any(isinstance(event, PhaseDone) and event.phase == "audit base" for event in history)
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


@pytest.mark.parametrize("cause", ["their client", "a layer"])
def test_poisson_sampling_excuses_only_what_it_could_have_drawn(
    cause: str, workplace: Path, make: MakeRecipe, model: LoadedModel, tmp_path: Path
) -> None:
    privacy: dict[str, object] = {"record": {"noise_multiplier": 1.0, "delta": 0.01}}
    if cause == "a layer":  # at so little similarity every canary is a near duplicate of the one before
        recipe = make(privacy=privacy | {"deduplicate": {"similarity": 0.05}})
    else:
        recipe = make(privacy=privacy, strategy={"name": "fedavg", "rounds": 1, "participation": 0.5})
    with pytest.raises(UserError, match=r"(\d+) of the planted canaries (?:was|were) never learnt from") as raised:
        life.tune(recipe, tmp_path / "run", base=workplace, model=model)
    if cause == "their client":
        run = RunFolder.open(tmp_path / "run")
        (done,) = (event for event in run.history() if isinstance(event, RoundDone))
        absent = [one for one in read_canaries(run.canaries) if one.inserted and one.client not in done.clients]
        assert str(raised.value).startswith(f"audit: {len(absent)} of the planted canaries")


def test_what_could_have_been_drawn_and_was_not_is_excused(run: RunFolder, workplace: Path, model: LoadedModel) -> None:
    prepared = prepare(read_frozen(run), workplace, model=model)
    canaries = read_canaries(run.canaries)
    inserted = [canary.id for canary in canaries if canary.inserted]
    counts = dict.fromkeys(inserted, (2, 40)) | {inserted[0]: (0, 0)}
    assert never_learnt(run, prepared, "private", canaries, counts) == {inserted[0]}
    with pytest.raises(UserError, match=f"1 of the planted canaries .*{inserted[0]}"):
        never_learnt(run, prepared, "fedavg", canaries, counts)
    assert never_learnt(run, prepared, "private", canaries, dict.fromkeys(inserted, (2, 40))) == set()
    # one that has nothing to learn is never drawn, by Poisson sampling or any other
    emptied = [
        replace(
            member,
            records=[
                replace(record, target=torch.zeros_like(record.target))
                if canary_of(record.id) == inserted[0]
                else record
                for record in member.records
            ],
        )
        for member in prepared.members
    ]
    with pytest.raises(UserError, match=f"1 of the planted canaries .*{inserted[0]}"):
        never_learnt(run, replace(prepared, members=emptied), "private", canaries, counts)
    # a pass over all records meets every one
    sections = prepared.recipe.model_dump()
    sections["compare"]["private"]["privacy"]["record"]["sampling"] = "shuffle"
    shuffled = replace(prepared, recipe=Recipe.model_validate(sections))
    with pytest.raises(UserError, match=f"1 of the planted canaries .*{inserted[0]}"):
        never_learnt(run, shuffled, "private", canaries, counts)
