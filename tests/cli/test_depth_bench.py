"""`allmend depth bench`: rates, what was foretold, what they do not show; for programs, JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from allmend.cli.depth_bench import bench
from allmend.depth import bench_parallel
from allmend.depth.apply import apply_plan, save_paired
from allmend.depth.bench import Decoded
from allmend.depth.bench_parallel import ParallelSpeed, ShardedSpeed
from allmend.depth.plan import stretch_plan
from allmend.depth.spread import ratio, spread
from allmend.errors import UserError

SHORT = ("--prompt-tokens", "3", "--tokens", "4", "--runs", "2", "--device", "cpu")


@pytest.fixture
def folders(tmp_path: Path, tiny_folder: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `model` and `paired`, which has both of its layers in one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    Path("model").symlink_to(tiny_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="sdpa")
    plan = stretch_plan(2, 0, 2)
    save_paired(apply_plan(model, plan), tiny_tokenizer, Path("paired"), plan)
    return tmp_path


def run(*arguments: str) -> str:
    """What the command printed; its errors come through."""
    app = typer.Typer()
    app.command()(bench)
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None:
        raise result.exception
    return result.output


def test_both_models_are_shown_with_what_was_foretold(folders: Path) -> None:
    text = run("paired", "--against", "model", *SHORT)
    assert max(map(len, text.splitlines())) <= 100
    words = " ".join(text.split())
    for expected in (
        "Greedy decoding, batch 1: 4 tokens after a prompt of 3, 2 runs of each in turns",
        "Eager: the model is",
        "over 2 runs",
        "Timed alone: a layer",
        "one of width 2",
        "This foretells",
        "do the same arithmetic and read the same weights",
        "1.2 times as fast is no figure of a CPU",
        "float32, torch",
        "Written to speed.json",
    ):
        assert expected in words
    found = json.loads(Path("speed.json").read_text())
    assert found["models"]["model"]["widths"] == [2]
    assert found["models"]["against"]["widths"] == [1, 1]
    assert len(found["models"]["model"]["decoded"]["eager"]["rates"]) == 2


def test_json_is_what_the_file_holds(folders: Path) -> None:
    printed = json.loads(run("paired", "--against", "model", *SHORT, "--batch", "2", "--out", "it.json", "--json"))
    assert printed == json.loads(Path("it.json").read_text())
    assert printed["batch"] == 2
    assert not Path("speed.json").exists()


def test_one_model_alone_has_no_ratio(folders: Path) -> None:
    words = " ".join(run("model", *SHORT).split())
    assert "times" not in words
    assert "No prediction" not in words


def sharded(depth: int, rates: tuple[float, ...], seconds: tuple[float, ...]) -> ShardedSpeed:
    return ShardedSpeed(
        sharding=f"cut in two, {depth} deep",
        depth=depth,
        decoded=Decoded(prefill=(0.1,) * len(rates), rates=rates),
        all_reduces=2 * depth,
        all_reduce_seconds=seconds,
        weights=1000,
        predicted=0.025 * depth,
    )


def test_over_processes_sums_are_shown(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = sharded(1, (30.0, 36.0), (0.002, 0.003)), sharded(2, (20.0, 30.0), (0.004, 0.006))
    made = ParallelSpeed(
        machine={"device": "cpu", "name": "it", "threads": 1, "dtype": "float32", "torch": "2", "transformers": "5"},
        world=2,
        backend="gloo",
        batch=1,
        prompt_tokens=3,
        tokens=4,
        runs=2,
        models={"model": one, "against": other},
        message=128,
        latency=spread([50e-6, 60e-6]),
        bandwidth=spread([5e9]),
        ratio=ratio(one.decoded.rates, other.decoded.rates),
        all_reduce_ratio=ratio(one.all_reduce_seconds, other.all_reduce_seconds),
        predicted_ratio=2.0,
        notes=("to know",),
    )
    asked: list[Any] = []

    def compare(sources: dict[str, str], world: int, **named: Any) -> ParallelSpeed:
        asked.append((sources, world, named))
        return made

    monkeypatch.setattr(bench_parallel, "compare_sources_in_parallel", compare)
    text = run("paired", "--against", "model", *SHORT, "--tp", "2")
    settings = {"device": "cpu", "batch": 1, "prompt_tokens": 3, "tokens": 4, "runs": 2}
    assert asked == [({"model": "paired", "against": "model"}, 2, settings)]
    assert max(map(len, text.splitlines())) <= 100
    rows = [line.split() for line in text.splitlines() if line.startswith(("paired ", "model "))]
    assert rows[1:] == [  # after the head
        ["paired", "1", "33", "30", "to", "36", "2", "2.5", "40"],
        ["model", "2", "25", "20", "to", "30", "4", "5", "20"],
    ]
    words = " ".join(text.split())
    for expected in (
        "2 processes, gloo",
        "The model is 1.35 times (1.20 to 1.50) as fast as the other, over 2 runs.",
        "All-reduces: 0.50 times (0.50 to 0.50) the time. Foretold: 2.00 times as fast.",
        "An all-reduce of 128 bytes takes 55 µs (50 to 60), and a process reads 5.0 GB a second.",
        "paired: cut in two, 1 deep.",
        "model: cut in two, 2 deep.",
        "to know",
    ):
        assert expected in words
    assert ParallelSpeed.model_validate_json(Path("speed.json").read_text()) == made


def test_what_makes_no_sense_is_refused(folders: Path) -> None:
    with pytest.raises(UserError, match="one process is no parallelism"):
        run("paired", "--tp", "1")
    with pytest.raises(UserError, match="one device only"):
        run("paired", "--tp", "2", "--compile")
    with pytest.raises(UserError, match="do not divide by 3"):
        run("paired", "--against", "model", "--tp", "3", "--device", "cpu")
    with pytest.raises(UserError, match="positions"):
        run("paired", "--tokens", "600", "--device", "cpu")
