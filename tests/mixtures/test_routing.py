"""Who answers in a run's mixtures: as a table of the run, measured anew, and refused where there is nothing."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tests.mixtures.conftest import NAMES, made, write_records

from allmend import load_model, tune
from allmend.data.chat import Encoder
from allmend.data.files import load_client
from allmend.errors import UserError
from allmend.events import PhaseDone, RunStarted, Warned
from allmend.learn.routing import token_gates
from allmend.mixtures.collapse import collapsed
from allmend.mixtures.routing import read_routing
from allmend.models.mixture import mixed
from allmend.models.mixture_layers import MixtureMLP
from allmend.prepare import prepare, read_frozen
from allmend.recipe import Fields
from allmend.results import Estimate, MemberRouting, RoutingTable
from allmend.run import RunFolder
from allmend.workload import work_ahead


def test_the_table_has_each_members_gates_on_its_held_out_records(run: RunFolder, tiny_folder: Path) -> None:
    table = run.read_table("routing", RoutingTable)
    assert table is not None
    (arm,) = table.arms
    assert (arm.arm, arm.layers) == ("comigs", (0, 1))
    assert [(one.member, one.shared, one.own, one.target) for one in arm.members] == [
        ("east", 1, 2, False),
        ("north", 1, 1, False),
        ("south", 1, 0, False),
    ]
    base = load_model(str(tiny_folder), device="cpu")
    encoder = Encoder(base.tokenizer, "plain", 512)
    for one in arm.members:
        data = load_client(one.member, f"{one.member}.jsonl", fields=Fields(), held_out=0.3, base=run.path.parent)
        with mixed(base, run.arm("comigs") / "members" / one.member / "mixture") as mixture:
            gates = torch.cat(
                [token_gates(mixture, encoder.for_training(record).ids) for record in data.held_out], dim=1
            )
        assert one.records == len(data.held_out)
        assert one.overall.n == gates.shape[1]
        there = [gate for gate in range(3) if gates[:, :, gate].any()]
        assert len(there) == one.shared + one.own
        assert torch.allclose(torch.tensor(one.gates), gates.mean(1)[:, there], atol=1e-6)
        assert [mass.value for mass in one.mass] == pytest.approx(gates[:, :, 0].mean(1).tolist(), abs=1e-6)
        assert one.overall.value == pytest.approx(float(gates[:, :, 0].mean()), abs=1e-6)
        assert all(0 <= mass.value <= 1 for mass in one.mass)
        assert one.routed == all(mass.low is not None and mass.low < mass.value < mass.high for mass in one.mass)
    assert not any(isinstance(module, MixtureMLP) for module in base.model.modules()), "the base is bare again"


def test_it_is_read_from_the_table_and_measured_where_there_is_none(run: RunFolder, tmp_path: Path) -> None:
    known = read_routing(run.path)
    assert known == read_routing(run.path, "comigs")
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    (copy / "results" / "routing.json").unlink()
    assert read_routing(copy) == known
    assert not (copy / "results" / "routing.json").exists(), "a command that shows writes nothing into a run"


def test_other_records_than_the_run_s_are_refused(run: RunFolder, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(run.path, folder / "run")
    (folder / "run" / "results" / "routing.json").unlink()
    write_records(folder)
    (folder / "north.jsonl").write_text((folder / "north.jsonl").read_text().replace("north 3?", "north three?"))
    facts = json.loads((folder / "run" / "run.json").read_text()) | {"base": str(folder)}
    (folder / "run" / "run.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="the clients' data differs"):
        read_routing(folder / "run")


def test_what_is_not_there_is_told(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'alone' has no mixtures.*\n.*comigs"):
        read_routing(run.path, "alone")
    with pytest.raises(UserError, match="'west' has no mixtures"):
        read_routing(run.path, "west")
    with pytest.raises(UserError, match="no run is here"):
        read_routing(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    shutil.rmtree(copy / "arms" / "comigs" / "members")
    with pytest.raises(UserError, match=r"no mixture of arm 'comigs' is here.*\n.*stay with the members"):
        read_routing(copy)


def test_without_held_out_records_the_target_is_read(tiny_folder: Path, tmp_path: Path) -> None:
    write_records(tmp_path)
    (tmp_path / "aim.jsonl").write_text("".join(json.dumps({"text": f"aim {i}"}) + "\n" for i in range(4)))
    clients = [{"name": name, "data": f"{name}.jsonl"} for name in NAMES]
    clients[1]["target"] = "aim.jsonl"
    run = tune(made(tiny_folder, clients=clients, data={"held_out": 0.0}), tmp_path / "run", base=tmp_path)

    (member,) = read_routing(run.path).members
    assert (member.member, member.records, member.target) == ("north", 4, True)
    assert "records of the targets" in (run.path / "report.html").read_text()


def test_a_collapse_is_told_once_by_the_run_and_in_its_report(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starving(arm: str, member: MemberRouting, layers: Sequence[int]) -> list[str]:
        mass = tuple(Estimate(value=0.001, n=1) for _ in layers)
        return collapsed(arm, member.model_copy(update={"mass": mass}), layers)

    monkeypatch.setattr("allmend.mixtures.routing.collapsed", starving)
    write_records(tmp_path)
    told: list[str] = []
    run = tune(
        made(tiny_folder),
        tmp_path / "run",
        base=tmp_path,
        listeners=[lambda event: told.append(event.message) if isinstance(event, Warned) else None],
    )

    about = [words for words in told if "generalists less than 1%" in words]
    assert [words.split(":")[0] for words in about] == [f"arm 'comigs', client '{name}'" for name in ("east", "north")]
    assert list(read_routing(run.path).warnings) == about
    assert "generalists less than 1%" in (run.path / "report.html").read_text()


def test_a_run_without_mixtures_has_no_table(tiny_folder: Path, tmp_path: Path) -> None:
    write_records(tmp_path)
    plain = made(
        tiny_folder,
        adapter={"rank": 2},
        clients=[{"name": name, "data": f"{name}.jsonl"} for name in NAMES],
        strategy={"name": "local", "rounds": 1},
    )
    run = tune(plain, tmp_path / "run", base=tmp_path)
    assert not (run.path / "results" / "routing.json").exists()
    assert "Who answers" not in (run.path / "report.html").read_text()
    with pytest.raises(UserError, match="no arm has mixtures"):
        read_routing(run.path)


def test_it_is_a_phase_of_the_run_as_long_as_was_foreseen(run: RunFolder) -> None:
    prepared = prepare(read_frozen(run), run.path.parent)
    (started,) = (event for event in run.history() if isinstance(event, RunStarted))
    (done,) = (event for event in run.history() if isinstance(event, PhaseDone) and event.phase == "routing comigs")
    assert started.work["routing comigs"] == done.tokens == work_ahead(prepared)["routing comigs"]
    assert done.tokens == sum(one.overall.n for one in read_routing(run.path).members)
    assert "routing comigs" not in work_ahead(prepared, run)
