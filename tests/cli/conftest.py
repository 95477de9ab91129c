"""The command line in this process, and a folder with a recipe to spoil."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from allmend import cli

RECIPE = """name = "tiny"
[model]
source = "model"
[data]
held_out = 0.3
max_tokens = 256
[[clients]]
name = "north"
data = "north.jsonl"
[[clients]]
name = "south"
data = "south.jsonl"
[adapter]
rank = 2
[train]
learning_rate = 0.01
batch_size = 4
[strategy]
name = "fedavg"
rounds = 2
[engine]
threads = 1
"""


CANARIES = """
[canaries]
copies = [1]
count = 4
[audit]
exposure = []
membership_records = 0
prefix_tokens = [5]
"""


@dataclass
class Shown:
    """What a command left: its exit code and what it wrote."""

    code: int
    out: str
    err: str


Allmend = Callable[..., Shown]


@pytest.fixture
def allmend(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Allmend:
    """`allmend("tune", "recipe.toml")`; a traceback is a failure of the test."""

    def call(*arguments: object) -> Shown:
        monkeypatch.setattr(sys, "argv", ["allmend", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        code = end.value.code
        return Shown(code if isinstance(code, int) else 0 if code is None else 1, captured.out, captured.err)

    return call


@pytest.fixture
def workplace(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder: a recipe, its model and two clients' data."""
    threads = torch.get_num_threads()  # the recipe sets them
    (tmp_path / "model").symlink_to(tiny_folder)
    for client, count in (("north", 6), ("south", 9)):
        rows = [
            {"id": f"{client}-{i}", "prompt": f"{client}: {i} plus {i}?", "response": f"{2 * i}"} for i in range(count)
        ]
        (tmp_path / f"{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    yield tmp_path
    torch.set_num_threads(threads)
