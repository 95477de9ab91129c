import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import allmend  # noqa: F401  # registers the paired classes
from allmend import subjects
from allmend.depth.interventions import intervene
from allmend.depth.plan import Plan, read_plan, stretch_plan, write_plan
from allmend.depth.recover import Training
from allmend.errors import UserError
from allmend.life import tune
from allmend.models.adapters import applied
from allmend.models.load import load_model
from allmend.pairing.applied import apply_folder
from allmend.pairing.folders import scan_folder, search_folder
from allmend.recipe import make_recipe
from allmend.results import DepthTable
from allmend.run import RunFolder
from allmend.subjects import load_subject


def test_scan_leaves_a_table_a_picture_and_a_page(
    deep_folder: Path, two_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    found = scan_folder(str(deep_folder), calibration=two_texts[1], longest=4, out=tmp_path / "out", device="cpu")

    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "scan.parquet",
        "scan.svg",
        "depth.html",
    }
    assert found.layers == 6
    assert {(cell.kind, cell.start, cell.end) for cell in found.cells if cell.depth == 4} == {
        *(("pairs", start, start + 4) for start in range(3)),
        *(("prune", start, start + 2) for start in range(5)),
    }
    page, picture = ((tmp_path / "out" / name).read_text() for name in ("depth.html", "scan.svg"))
    assert "Pairs side by side" in page
    assert picture.startswith("<svg xmlns")
    assert picture.count('class="chart"') == 2
    assert "say little" in found.notes[0]
    assert found.notes[0] in page


def test_search_apply_load(deep_folder: Path, two_texts: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "found"
    found = search_folder(
        str(deep_folder), kind="free", pairs=2, calibration=two_texts[0], report=two_texts[1], out=out, device="cpu"
    )

    assert {path.name for path in out.iterdir()} == {
        "plan.json",
        "search.parquet",
        "search.json",
        "loss_by_depth.svg",
        "depth.html",
    }
    assert [line.depth for line in found.frontier.lines] == [6, 5, 4]
    assert len(found.chosen) == 4
    assert read_plan(out / "plan.json").groups == found.chosen
    assert json.loads((out / "search.json").read_text())["frontier"]["lines"][2]["depth"] == 4

    made = apply_folder(str(deep_folder), out / "plan.json", tmp_path / "paired", device="cpu")

    assert (made.depth, made.layers) == (4, 6)
    assert made.parameters[0] == made.parameters[1] - 2 * 2 * 32
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "paired")
    ids = torch.arange(20)[None]
    expected = intervene(load_model(str(deep_folder), device="cpu").model, Plan(found.chosen))
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, expected(ids).logits, atol=1e-4)
    with pytest.raises(UserError, match="side by side already"):
        apply_folder(str(tmp_path / "paired"), out / "plan.json", tmp_path / "again", device="cpu")


def test_as_much_as_the_loss_allows(deep_folder: Path, two_texts: tuple[Path, Path], tmp_path: Path) -> None:
    some = search_folder(
        str(deep_folder),
        max_loss=1e9,
        calibration=two_texts[0],
        report=two_texts[1],
        questions=0,
        timed=False,
        device="cpu",
    )
    assert some.reached
    assert len(some.chosen) == 3

    none = search_folder(
        str(deep_folder),
        max_loss=-9.0,
        calibration=two_texts[0],
        report=two_texts[1],
        out=tmp_path / "out",
        questions=0,
        timed=False,
        device="cpu",
    )
    assert not none.reached
    assert len(none.chosen) == 5
    assert read_plan(tmp_path / "out" / "plan.json").groups == none.chosen


@pytest.mark.parametrize("ends", [{}, {"depth": 5, "max_loss": 0.1}, {"depth": 5, "pairs": 1}])
def test_a_search_needs_one_end(ends: dict[str, float]) -> None:
    with pytest.raises(UserError, match="needs one end"):
        search_folder("nowhere", **ends)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number(loss: float) -> None:
    with pytest.raises(UserError, match=f"{loss} is no loss"):
        search_folder("nowhere", max_loss=loss)


def test_a_plan_for_another_model(deep_folder: Path, tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", stretch_plan(8, 2, 6))

    with pytest.raises(UserError, match=r"plan\.json: group \[6\]: layer 6 is not one of the model's 6"):
        apply_folder(str(deep_folder), tmp_path / "plan.json", tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_recovery_is_told_beside_its_control(deep_folder: Path, two_texts: tuple[Path, Path], tmp_path: Path) -> None:
    """And what is written is the model that was trained."""
    long = tmp_path / "long.txt"
    long.write_text("".join(f"{place} is a number, and {place * place} its square. " for place in range(500)))
    write_plan(tmp_path / "plan.json", stretch_plan(6, 2, 6))
    told: list[str] = []

    made = apply_folder(
        str(deep_folder),
        tmp_path / "plan.json",
        tmp_path / "out",
        corrected=True,
        training=Training(steps=3),
        calibration=long,
        report=two_texts[1],
        device="cpu",
        listeners=[lambda event: told.append(event.type)],
    )

    assert made.correction is not None
    assert made.recovery is not None
    assert made.correction.gap_after.value <= made.correction.gap_before.value
    assert made.recovery.control.before.value != made.recovery.control.after.value
    assert told.count("work.planned") == told.count("phase") == 2
    assert told.count("progress") == 2 * 2 + 2 * 3  # fits of two pairs, steps of two models
    facts = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert facts["recovery"]["steps"] == 3
    plain = apply_folder(str(deep_folder), tmp_path / "plan.json", tmp_path / "plain", device="cpu")
    assert plain.recovery is None
    ids = torch.arange(20)[None]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "plain")]
    with torch.no_grad():
        assert not torch.allclose(models[0](ids).logits, models[1](ids).logits, atol=1e-3)


def test_a_text_that_the_search_has_used_up(deep_folder: Path, two_texts: tuple[Path, Path], tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", stretch_plan(6, 2, 6))

    with pytest.raises(UserError, match="tokens"):
        apply_folder(
            str(deep_folder),
            tmp_path / "plan.json",
            tmp_path / "out",
            training=Training(steps=1),
            calibration=two_texts[1],
            device="cpu",
        )
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_left_alone(deep_folder: Path, tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", stretch_plan(6, 2, 6))

    with pytest.raises(UserError, match="not empty"):
        apply_folder(str(deep_folder), tmp_path / "plan.json", tmp_path, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_the_model_of_a_run_is_searched_for_its_report(
    deep_folder: Path, two_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    """The arm's adapter merged, its results among those of the run, another arm's beside them."""
    rows = [{"id": str(place), "prompt": f"{place}?", "response": f"It is {7 * place}."} for place in range(8)]
    (tmp_path / "north.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = make_recipe(
        {
            "model": {"source": str(deep_folder)},
            "data": {"held_out": 0.25},
            "clients": [{"name": "north", "data": "north.jsonl"}],
            "adapter": {"rank": 2, "targets": ["q_proj", "down_proj"]},
            "train": {"learning_rate": 0.1, "batch_size": 2},
            "strategy": {"name": "fedavg", "rounds": 1},
            "compare": {"longer": {"strategy": {"rounds": 2}}},
        }
    )
    run = tune(recipe, tmp_path / "run", base=tmp_path)
    texts = {"calibration": two_texts[0], "report": two_texts[1], "questions": 0, "timed": False, "device": "cpu"}

    first = search_folder(str(run.path), kind="free", pairs=1, **texts)
    search_folder(f"{run.path}:longer", kind="free", pairs=1, **texts)
    again = search_folder(str(run.path), kind="free", pairs=2, **texts)

    assert first.arm == again.arm == "fedavg"
    assert {path.name for path in (run.path / "depth").iterdir()} == {"fedavg", "longer"}
    assert read_plan(run.path / "depth" / "fedavg" / "plan.json").groups == again.chosen
    table = run.read_table("depth", DepthTable)
    assert table is not None
    assert table.searches[1] == again
    assert [one.arm for one in table.searches] == ["longer", "fedavg"]
    assert "How deep it must be" in (run.path / "report.html").read_text()
    with pytest.raises(UserError, match=r"has no arm 'other'\n.*It has fedavg, longer"):
        search_folder(f"{run.path}:other", pairs=1, **texts)

    base, loaded = load_model(str(deep_folder), device="cpu"), load_subject(str(run.path), device="cpu")
    with applied(base.model, run.arm("fedavg") / "adapter") as tuned, torch.no_grad():
        ids = torch.arange(20)[None]
        assert torch.allclose(loaded.model(ids).logits, tuned(ids).logits, atol=1e-3)
    assert loaded.digest not in (base.digest, load_subject(f"{run.path}:longer", device="cpu").digest)


def test_a_run_without_a_model_is_told_before_any_work(
    deep_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = f'[model]\nsource = "{deep_folder}"\n[[clients]]\nname = "north"\ndata = "north.jsonl"\n'
    facts = {"recipe": hashlib.sha256(recipe.encode()).hexdigest(), "base": str(tmp_path)}
    RunFolder.create(tmp_path / "run", recipe, facts)
    monkeypatch.setattr(subjects, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))

    with pytest.raises(UserError, match="no tuned model is here yet"):
        search_folder(str(tmp_path / "run"), pairs=1)
