"""`allmend optim`: what is compared and what a run's steps looked like, in words and for programs."""

import gzip
import json
from pathlib import Path

import pytest
from tests.cli.conftest import Allmend

WORDS = "the quick brown fox jumps over the lazy dog and then it sleeps until the sun is up again"


@pytest.fixture
def text(workplace: Path) -> Path:
    paragraphs = [" ".join(WORDS.split()[i % 7 :]) * (3 + i % 3) for i in range(400)]
    Path("notes.txt").write_text("\n\n".join(paragraphs))
    Path("notes.txt.gz").write_bytes(gzip.compress(Path("notes.txt").read_bytes()))
    return Path("notes.txt")


def test_optimisers_are_compared_with_and_without_warmup(allmend: Allmend, text: Path) -> None:
    shown = allmend(
        "optim", "compare", "--text", "notes.txt", "--methods", "adamw, liona", "--warmup", "0,0.3", "--seeds", "1",
        "--steps", "10", "--lr", "liona=1e-3", "--out", "found.json",
    )  # fmt: skip
    assert (shown.code, shown.err) == (0, "")
    for words in ("4 trainings of 10 steps", "held-out loss", "0.001", "warmup: without one"):
        assert words in " ".join(shown.out.split())
    found = json.loads(Path("found.json").read_text())
    assert [(row["method"], row["warmup"]) for row in found["rows"]] == [
        (name, share) for name in ("adamw", "liona") for share in (0.0, 0.3)
    ]
    assert len(found["trials"]) == 4
    assert len(found["verdicts"]) == 2


def test_for_programs_there_is_json_and_nothing_else(allmend: Allmend, text: Path) -> None:
    shown = allmend(
        "optim", "compare", "--text", "notes.txt.gz", "--methods", "sgd", "--warmup", "0", "--seeds", "1", "--steps",
        "10", "--json",
    )  # fmt: skip
    assert json.loads(shown.out)["rows"][0]["method"] == "sgd"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--methods", "adamm"), "did you mean"),
        (("--methods", ","), "no optimiser is named"),
        (("--warmup", "0,x"), "'0,x' is not a list of numbers"),
        (("--warmup", "nan"), "out of range"),
        (("--lr", "radam=1"), "'radam=1' is not OPTIMISER=RATE"),
        (("--lr", "adamw"), "is not OPTIMISER=RATE"),
        (("--warmup", "0.8"), "have no room for a warmup of"),
        (("--text", "nothing.txt"), "cannot be read as text"),
        (("--text", "short.txt"), "1 documents are too few"),
    ],
)
def test_what_cannot_be_compared_is_told(words: tuple[str, ...], told: str, allmend: Allmend, text: Path) -> None:
    Path("short.txt").write_text("a")
    given = () if "--text" in words else ("--text", "notes.txt")
    shown = allmend("optim", "compare", "--methods", "adamw", "--seeds", "1", "--steps", "10", *given, *words)
    assert shown.code == 2
    assert told in shown.err
    assert "Traceback" not in shown.err


def test_a_run_s_steps_are_inspected(allmend: Allmend, workplace: Path) -> None:
    with Path("recipe.toml").open("a") as file:
        file.write("[compare.ours]\ntrain.optimizer = 'liona'\ntrain.optimizer_state = 'ramp'\n")
    assert allmend("optim", "inspect", "runs/tiny").code == 2
    shown = allmend("tune", "recipe.toml", "--log-updates", "--optimizer", "radam", "--warmup", "1")
    assert (shown.code, shown.err) == (0, "")
    frozen = Path("runs/tiny/recipe.toml").read_text()
    assert 'optimizer = "radam"' in frozen
    assert "warmup_steps = 1" in frozen
    shown = allmend("optim", "inspect", "runs/tiny")
    assert (shown.code, shown.err) == (0, "")
    assert "fedavg" in shown.out
    assert "ours" in shown.out
    assert "× later ones" in shown.out
    (first, second) = json.loads(allmend("optim", "inspect", "runs/tiny", "--json").out)
    assert (first["arm"], second["arm"]) == ("fedavg", "ours")
    assert first["rounds"] >= 1
    assert "lora_" in first["matrix"]


def test_a_run_without_sizes_says_how_to_have_them(allmend: Allmend, workplace: Path) -> None:
    assert allmend("tune", "recipe.toml").code == 0
    shown = allmend("optim", "inspect", "runs/tiny")
    assert shown.code == 2
    assert "the sizes of its steps were not logged" in shown.err
    assert "--log-updates" in shown.err


def test_an_optimiser_that_is_not_there_is_told_with_the_recipe_s_other_problems(
    allmend: Allmend, workplace: Path
) -> None:
    shown = allmend("tune", "recipe.toml", "--optimizer", "adagrad", "--optimizer-state", "kept")
    assert shown.code == 2
    assert "train.optimizer" in shown.err
    assert "train.optimizer_state" in shown.err
    shown = allmend("tune", "--resume", "runs/tiny", "--optimizer", "liona")
    assert shown.code == 2
    assert "goes on with the run as it was begun" in shown.err
