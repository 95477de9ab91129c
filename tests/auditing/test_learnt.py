from collections.abc import Callable
from pathlib import Path

import pytest

from allmend import life
from allmend.auditing.learnt import read_learnt
from allmend.auditing.runs import audit_run
from allmend.data.canaries import read_canaries
from allmend.data.chat import Encoder
from allmend.data.records import Record
from allmend.errors import UserError
from allmend.models.adapters import applied
from allmend.models.load import LoadedModel
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
