"""A plain adapter for a mixture: what it is, what it loses, on which records, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.mixtures.conftest import NAMES, made, write_records

from allmend import load_model, tune
from allmend.errors import UserError
from allmend.federation.arm import at_member
from allmend.learn.evaluate import Score
from allmend.learn.routing import usage
from allmend.mixtures.export import CARD, compare, export
from allmend.models.adapters import applied
from allmend.models.mixture import mixed
from allmend.models.mixture_export import export_mixture
from allmend.models.tensors import read_tensors
from allmend.prepare import Prepared, prepare, read_frozen
from allmend.run import RunFolder


@pytest.fixture(scope="module")
def prepared(run: RunFolder) -> Prepared:
    return prepare(read_frozen(run), run.path.parent)


def mixture_folder(run: RunFolder, name: str) -> Path:
    return run.arm("comigs") / "members" / name / "mixture"


def test_mean_gates_are_those_of_the_validation_records_and_of_no_other(
    run: RunFolder, prepared: Prepared, tmp_path: Path
) -> None:
    found = export(run.path, tmp_path / "north", member="north", how="mean-gates")

    member, _ = at_member(
        next(one for one in prepared.members if one.name == "north"), prepared.recipe.arms()["comigs"]
    )
    validation = member.validation(0.1)
    assert 0 < len(validation) < len(member.records)
    with mixed(prepared.model, mixture_folder(run, "north")) as mixture:
        expected = {}
        for what, records in (("validation", validation), ("held out", member.held_out)):
            used = usage(mixture, records)
            assert used is not None
            folder = tmp_path / what
            export_mixture(mixture, folder, mixture.state(), how="mean-gates", base="b", gates=used.mean)
            expected[what] = read_tensors(folder / "adapter_model.safetensors")[0]
    tensors, _ = read_tensors(tmp_path / "north" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, expected["validation"][name]) for name, tensor in tensors.items())
    assert not all(torch.equal(tensor, expected["held out"][name]) for name, tensor in tensors.items())
    assert found.rank == 4


def test_losses_are_those_of_the_mixture_and_of_the_folder(run: RunFolder, prepared: Prepared, tmp_path: Path) -> None:
    found = export(run.path, tmp_path / "out", member="east", how="generalist")

    validation, held_out = found.compared
    assert (validation.records, held_out.records) == ("validation", "held-out")
    records = prepared.held_out_encoded["east"]
    assert held_out.count == len(records)

    def loss(model: torch.nn.Module) -> float:
        total = count = 0.0
        for record in records:
            with torch.no_grad():
                logits = model(input_ids=record.ids[None]).logits[0, :-1].double().log_softmax(-1)
            taken = logits[torch.arange(len(record) - 1), record.ids[1:]][record.target[1:]]
            total, count = total - float(taken.sum()), count + len(taken)
        return total / count

    with mixed(prepared.model, mixture_folder(run, "east")) as mixture:
        assert held_out.mixture.value == pytest.approx(loss(mixture.model), abs=1e-5)
    with applied(prepared.model.model, tmp_path / "out") as adapter:
        assert held_out.export.value == pytest.approx(loss(adapter), abs=1e-5)
    assert held_out.added.value == pytest.approx(held_out.export.value - held_out.mixture.value)
    assert held_out.added.low is not None
    assert found.rank == 2


def test_one_expert_alone_loses_nothing(run: RunFolder, tmp_path: Path) -> None:
    for how in ("generalist", "mean-gates"):
        found = export(run.path, tmp_path / how, member="south", how=how)  # type: ignore[arg-type]
        (held_out,) = found.compared  # no record was set apart for a router
        assert held_out.added.value == pytest.approx(0, abs=1e-6)
        assert found.rank == 2


def test_the_card_tells_what_it_costs_and_names_nobody(run: RunFolder, tmp_path: Path) -> None:
    found = export(run.path, tmp_path / "out", member="east", how="mean-gates")
    card = (tmp_path / "out" / CARD).read_text()
    for one in found.compared:
        assert f"| {one.count} {one.records} | {one.mixture.value:.3f}" in card
    assert "rank 6" in card
    assert "east" not in card
    assert str(tmp_path) not in card


def test_a_pair_is_a_record_and_those_without_a_token_are_left_out() -> None:
    mixture = [Score("a", "", 2.0, 2), Score("b", "", 9.0, 3), Score("c", "", 0.0, 0)]
    adapter = [Score("a", "", 3.0, 2), Score("b", "", 9.5, 3), Score("c", "", 0.0, 0)]
    found = compare("held-out", mixture, adapter)
    assert found is not None
    assert found.count == 2
    assert (found.mixture.value, found.export.value) == (pytest.approx(11 / 5), pytest.approx(12.5 / 5))
    assert found.added.value == pytest.approx(1.5 / 5)
    assert compare("held-out", mixture[2:], adapter[2:]) is None


def test_an_adapter_is_replaced_and_nothing_else(run: RunFolder, tmp_path: Path) -> None:
    export(run.path, tmp_path / "out", member="east", how="generalist")
    export(run.path, tmp_path / "out", member="north", how="mean-gates")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="not empty and holds no adapter"):
        export(run.path, other, member="north", how="generalist")
    assert [path.name for path in other.iterdir()] == ["letter.txt"]


def test_what_cannot_be_exported_is_told_and_nothing_is_written(
    run: RunFolder, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"no client 'west' has a mixture here.*\n.*east, north, south"):
        export(run.path, tmp_path / "out", member="west", how="generalist")
    with pytest.raises(UserError, match="'alone' has no mixtures"):
        export(run.path, tmp_path / "out", member="east", how="generalist", arm="alone")
    write_records(tmp_path)
    own = tune(
        made(
            tiny_folder,
            adapter={"kind": "mixture", "rank": 2, "generalists": 0, "specialists": 2},
            clients=[{"name": name, "data": f"{name}.jsonl"} for name in NAMES],
        ),
        tmp_path / "run",
        base=tmp_path,
    )
    with pytest.raises(UserError, match=r"no generalist.*\n.*mean-gates"):
        export(own.path, tmp_path / "out", member="east", how="generalist")
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    (copy / "arms/comigs/members/east/mixture/mixture.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError):
        export(copy, tmp_path / "out", member="east", how="mean-gates")
    assert not [path for path in tmp_path.iterdir() if path.name.removeprefix(".").startswith("out")]
    assert export(own.path, tmp_path / "out", member="east", how="mean-gates").rank == 4


def test_the_base_in_memory_is_left_as_it_was(run: RunFolder, tiny_folder: Path, tmp_path: Path) -> None:
    base = load_model(str(tiny_folder), device="cpu")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = base.model(ids).logits
        export(run.path, tmp_path / "out", member="east", how="mean-gates", model=base)
        assert torch.equal(base.model(ids).logits, before)
