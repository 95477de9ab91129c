import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from allmend import life
from allmend.audit_runs.folders import audit_folder
from allmend.audit_runs.runs import audit_run
from allmend.data.canaries import plant, write_canaries
from allmend.errors import UserError
from allmend.models.load import LoadedModel
from allmend.recipe import Audit, Recipe
from allmend.results import BASE, AuditTable
from allmend.run import RunFolder

MakeRecipe = Callable[..., Recipe]

QUICK = Audit(prefix_tokens=[20], exposure=[])


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
    damaged = shutil.copytree(run.arm("fedavg") / "adapter", tmp_path / "adapter")
    config = json.loads((damaged / "adapter_config.json").read_text())
    (damaged / "adapter_config.json").write_text(json.dumps(config | {"r": config["r"] + 1}))
    table = (run.path / "results" / "audit.json").read_bytes()
    for words, options in (
        ("no adapter is here", {"adapter": tiny_folder}),
        ("cannot be applied to the model", {"adapter": damaged}),
        ("another tokenizer", {"reference": str(stranger)}),
        ("a run is here", {"out": run.path}),
    ):
        with pytest.raises(UserError, match=words):
            audit_folder(**{"model": str(tiny_folder), "canaries": run.canaries, "out": tmp_path / "out"} | options)
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
