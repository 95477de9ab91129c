import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from allmend.audit_runs.own import mine
from allmend.errors import UserError
from allmend.models.adapters import applied
from allmend.models.load import LoadedModel, load_model
from allmend.run import RunFolder


def test_a_member_asks_for_its_own_records(run: RunFolder, workplace: Path, model: LoadedModel) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in run.path.rglob("*"))
    own = mine(run.path, workplace / "north.jsonl", controls=workplace / "south.jsonl", model=model)
    assert sorted((path, path.stat().st_mtime_ns) for path in run.path.rglob("*")) == before
    assert [row.model for row in own.records] == [row.model for row in own.controls]
    assert {row.record for row in own.rows} == {f"north{i}" for i in range(12)}
    row = next(row for row in own.rows if (row.model, row.record) == ("fedavg", "north3"))
    text = "north 3? It is 21."  # its own tokens alone, no end mark
    ids = torch.tensor(model.tokenizer(text)["input_ids"])
    with applied(model.model, run.arm("fedavg") / "adapter") as module, torch.no_grad():
        logits = module(input_ids=ids[None]).logits[0, :-1]
    targets = len(model.tokenizer(" It is 21.")["input_ids"])  # the space is the response's
    likelihood = logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]][-targets:]
    assert row.log_likelihood == pytest.approx(likelihood.mean().item(), abs=1e-4)
    assert row.asked == targets - round(targets / 2)


def test_a_response_of_one_token_cannot_be_half_shown(run: RunFolder, model: LoadedModel, tmp_path: Path) -> None:
    """A tuned model ends where records end: nobody is told that it completes a record whose end mark alone it gives."""
    data = tmp_path / "own.jsonl"
    # a response has the space before it for a first token where there is a prompt
    rows = [{"id": "one", "text": "y"}, {"id": "two", "text": "ye"}, {"id": "three", "text": "yes"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = mine(run.path, data, model=model)
    assert own.records
    # a text's first token is predicted from nothing
    assert {(row.record, row.asked) for row in own.rows} == {("three", 1)}


def test_a_question_is_asked_for_its_answer_without_its_choices(
    run: RunFolder, model: LoadedModel, tmp_path: Path
) -> None:
    row = {"prompt": "north 3?", "response": "It is 21."}
    (tmp_path / "plain.jsonl").write_text(json.dumps({"id": "x"} | row) + "\n")
    choices = {"choices": ["It is 14.", "It is 21."]}
    (tmp_path / "question.jsonl").write_text(json.dumps({"id": "x"} | row | choices) + "\n")
    plain, question = (mine(run.path, tmp_path / f"{name}.jsonl", model=model) for name in ("plain", "question"))
    assert question.rows == plain.rows


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


def test_a_damaged_adapter_tells_nobody_about_its_records(
    run: RunFolder, workplace: Path, model: LoadedModel, tmp_path: Path
) -> None:
    damaged = RunFolder(tmp_path / "run")
    shutil.copytree(run.path, damaged.path)
    weights = damaged.arm("fedavg") / "adapter" / "adapter_model.safetensors"
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(UserError, match=r"fedavg: .*log-likelihoods of the records are no finite numbers"):
        mine(damaged.path, workplace / "north.jsonl", model=model)
