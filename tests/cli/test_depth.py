"""`allmend depth`: what is printed, what is left, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from allmend.cli import app
from allmend.cli.depth_search import search
from allmend.depth.plan import read_plan, stretch_plan, write_plan
from allmend.errors import UserError

Invoke = Callable[..., Result]


@pytest.fixture
def invoke() -> Invoke:
    """Run the command line in this process."""

    def run(*words: object) -> Result:
        return CliRunner().invoke(app, ["depth", *map(str, words)])

    return run


def refused(result: Result) -> str:
    """The words of an error that a user can mend."""
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def test_scan_search_apply(invoke: Invoke, deep_folder: Path, two_texts: tuple[Path, Path], tmp_path: Path) -> None:
    scanned = invoke("scan", deep_folder, "--calibration", two_texts[1], "--longest", 2, "--out", tmp_path / "scanned")
    assert scanned.exit_code == 0, scanned.output
    assert "pairs: pairs side by side" in scanned.output
    assert str(tmp_path / "scanned" / "depth.html") in scanned.output.replace("\n", "")

    found = tmp_path / "found"
    ends = ("--calibration", two_texts[0], "--report", two_texts[1], "--out", found, "--untimed")
    searched = invoke("search", deep_folder, "--pairs", 2, "--free", *ends)
    assert searched.exit_code == 0, searched.output
    for depth in (6, 5, 4):
        assert f"{depth} steps: " in searched.output
    assert "say little" in searched.output

    made = invoke("apply", deep_folder, "--plan", found / "plan.json", "--out", tmp_path / "paired")
    assert made.exit_code == 0, made.output
    assert "4 steps instead of 6" in made.output
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "paired").model.layers) == 4


def test_for_programs(invoke: Invoke, deep_folder: Path, two_texts: tuple[Path, Path], tmp_path: Path) -> None:
    scanned = json.loads(invoke("scan", deep_folder, "--calibration", two_texts[1], "--longest", 1, "--json").stdout)
    assert scanned["layers"] == 6
    assert {cell["kind"] for cell in scanned["cells"]} == {"prune"}

    ends = ("--calibration", two_texts[0], "--report", two_texts[1], "--json")
    searched = json.loads(invoke("search", deep_folder, "--depth", 5, *ends).stdout)
    line = searched["frontier"]["lines"][1]
    assert line["depth"] == 5
    assert line["speed"]["n"] == 3
    assert line["speed"]["low"] <= line["speed"]["median"] <= line["speed"]["high"]

    write_plan(tmp_path / "plan.json", stretch_plan(6, 2, 4))
    made = json.loads(
        invoke("apply", deep_folder, "--plan", tmp_path / "plan.json", "--out", tmp_path / "out", "--json").stdout
    )
    assert made["depth"] == 5


def test_what_cannot_be_exported(invoke: Invoke, deep_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    assert "'int8' is none of" in refused(invoke("export", deep_folder, "--out", out, "--kind", "int8"))
    assert refused(invoke("export", tmp_path / "nowhere", "--out", out))
    assert not out.exists()


@pytest.mark.parametrize(("kind", "plan"), [("pairs", True), ("prune", False)])
def test_a_loss_that_no_depth_keeps(
    deep_folder: Path,
    two_texts: tuple[Path, Path],
    tmp_path: Path,
    kind: str,
    plan: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The cheapest plan is there all the same, and the command says that it is not what was asked for."""
    texts = {"calibration": two_texts[0], "report": two_texts[1]}

    with pytest.raises(UserError, match="no depth keeps within -9 nats a token: even 5 steps add"):
        search(str(deep_folder), kind=kind, max_loss=-9.0, out=tmp_path, untimed=True, **texts)  # type: ignore[arg-type]

    assert "5 steps: " in capsys.readouterr().out
    assert (tmp_path / "plan.json").exists() is plan  # leaving layers out is for comparison
    if plan:
        assert read_plan(tmp_path / "plan.json").depth == 5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("scan", "MODEL", "--kinds", "pairs,pruned"), "'pruned' is no kind of scan"),
        (("search", "MODEL"), "needs one end"),
        (("search", "MODEL", "--depth", 5, "--max-loss", 1), "needs one end"),
        (("search", "MODEL", "--depth", 2), "a depth of 2 cannot be reached"),
        (("search", "MODEL", "--pairs", 9), "a depth of -3 cannot be reached"),
        (("search", "MODEL", "--depth", 5, "--free", "--kind", "prune"), "pairs anywhere are pairs"),
        (("apply", "MODEL", "--plan", "none.json", "--out", "out"), "none.json"),
    ],
)
def test_what_is_refused(invoke: Invoke, deep_folder: Path, words: tuple[object, ...], said: str) -> None:
    assert said in refused(invoke(*(deep_folder if word == "MODEL" else word for word in words)))


def test_a_stopped_scan_of_another_model_is_refused(
    invoke: Invoke, deep_folder: Path, two_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    out = ("--longest", 1, "--out", tmp_path / "out")
    assert invoke("scan", deep_folder, "--calibration", two_texts[1], *out).exit_code == 0
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(deep_folder)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(other)
    for path in deep_folder.glob("tok*"):
        (other / path.name).write_bytes(path.read_bytes())

    assert "another model" in refused(invoke("scan", other, "--calibration", two_texts[1], *out))
    assert "another text" in refused(invoke("scan", deep_folder, "--calibration", two_texts[0], *out))
