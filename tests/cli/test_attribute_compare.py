"""`allmend attribute compare`: figures that fit the terminal, what they rest on, and mistakes told in one message."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Allmend, Shown

from allmend.attribution.loss_folder import LossFolder

ADAPTER = "runs/tiny/arms/fedavg/adapter"
GIVEN = ("model", "--adapter", ADAPTER, "--train", "north.jsonl", "--train", "south.jsonl", "--target", "target.jsonl")
TRAINING = ("--learning-rate", "0.02", "--epochs", "1", "--batch-size", "4")

Compared = Callable[..., Shown]


@pytest.fixture
def compared(allmend: Allmend, workplace: Path) -> Compared:
    assert allmend("tune", "recipe.toml").code == 0
    rows = [{"id": f"t{i}", "prompt": f"north: {i} plus 1?", "response": f"{i + 1}"} for i in range(20, 24)]
    Path("target.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lambda *words: allmend("attribute", "compare", *GIVEN, *words)


def test_without_retraining_only_agreement_is_shown(compared: Compared) -> None:
    shown = compared("--methods", "gfim,hessian-free,tracin")
    assert (shown.code, shown.err) == (0, "")
    text = " ".join(shown.out.split())
    for words in (
        "15 records for 4 target records",
        "Agreement (Spearman over records",
        "Methods that agree may all be wrong: --retrain",
        "tracin: of a single checkpoint this is hessian_free",
    ):
        assert words in text
    for words in ("LDS", "random", "DataInf", "Kept in"):
        assert words not in text
    assert not Path("comparison").exists()


@pytest.mark.parametrize("columns", [80, 120])
def test_with_retraining_methods_are_judged_and_the_lines_fit(
    compared: Compared, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    words = ("--methods", "gfim,exact,datainf,lissa,hessian_free,tracin", "--retrain", "3", *TRAINING)
    shown = compared(*words)
    assert (shown.code, shown.err) == (0, "")
    assert max(map(len, shown.out.splitlines())) <= columns
    text = " ".join(shown.out.split())
    for told in (
        "LDS",
        "random halves of the records",
        "This is fair only if the adapter was trained on these records as on the halves (learning rate 0.02, 1 epoch",
        "--train-first trains it here",
        "DataInf agrees with Hessian-free by",
        "Kept in comparison",
    ):
        assert told in text
    trained = compared(*words, "--train-first", "--out", "other")
    assert "The adapter was trained here, as on the halves" in " ".join(trained.out.split())
    assert sorted(path.name for path in Path("other").iterdir()) == [
        "comparison.json",
        "retrained",
        "retraining.json",
        "trained",
    ]


def test_a_program_gets_the_table_and_nothing_else(compared: Compared) -> None:
    shown = compared("--methods", "gfim,tracin", "--retrain", "3", *TRAINING, "--out", "X", "--json")
    assert (shown.code, shown.err) == (0, "")
    found = json.loads(shown.out)
    assert [one["method"] for one in found["methods"]] == ["gfim", "tracin", "loss"]
    assert found == json.loads(Path("X/comparison.json").read_text())


def test_a_comparison_that_is_stopped_says_how_to_go_on(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    write = LossFolder.write

    def stop_at_second(self: LossFolder, index: int, *rest: object) -> None:
        if index == 1:
            raise KeyboardInterrupt
        write(self, index, *rest)  # type: ignore[arg-type]

    words = ("--methods", "gfim", "--retrain", "3", *TRAINING)
    monkeypatch.setattr(LossFolder, "write", stop_at_second)
    shown = compared(*words)
    assert shown.code == 130
    assert "What was complete is kept; the same command goes on." in " ".join(shown.out.split())
    monkeypatch.setattr(LossFolder, "write", write)
    assert compared(*words).code == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--methods", "magic"), "there is no method 'magic'"),
        (("--methods", ","), "no method is named"),
        (("--side", "tall"), "'tall' is none of wide, rank"),
        (("--template", "tall"), "'tall' is none of auto, chat, plain"),
        (("--damping", "0"), "damping must be above 0"),
        (("--retrain", "2"), "a correlation over 2 retrainings says nothing"),
        (("--retrain", "3", "--learning-rate", "-1"), "--learning-rate: must be a number above 0, got -1"),
        (("--retrain", "3", "--epochs", "0"), "--epochs: must be 1 or more, got 0"),
        (("--retrain", "3", "--out", "north.jsonl"), "a file stands where a folder is needed"),
        (("--retrain", "3", "--out", "runs"), "not empty and holds no comparison"),
        (("--checkpoint", "a"), "tracin, which is not asked for"),
        (("--methods", "tracin", "--checkpoint", "a"), "no adapter is here"),
        (("--methods", "tracin", "--checkpoint-rate", "1"), "1 rates and 0 checkpoints"),
        (("--modules", "k_proj"), "no weight that learns matches 'k_proj'"),
    ],
)
def test_mistakes_are_told(compared: Compared, words: tuple[str, ...], told: str) -> None:
    shown = compared(*words)
    assert shown.code == 2
    assert told in shown.err
    assert "Traceback" not in shown.err
