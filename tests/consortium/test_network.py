"""Real processes over TLS: the run ends where the simulation does, whoever is killed on the way."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from allmend.federation.pki import make_pki
from allmend.life import tune
from allmend.recipe import load_recipe
from allmend.run import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NAMES = ("east", "north", "south")
RECIPE = """
name = "tiny"
seed = 3
[model]
source = "{model}"
[data]
held_out = 0.3
max_tokens = 256
{clients}
[adapter]
rank = 2
[train]
learning_rate = 0.01
batch_size = 4
[strategy]
name = "fedavg"
rounds = {rounds}
[engine]
threads = 1
{more}
"""


class Machine:
    """Processes of one machine, each with its log."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.running = folder, {}

    def start(self, name: str, *arguments: str) -> None:
        log = (self.folder / f"{name}.log").open("ab")
        self.running[name] = subprocess.Popen(
            [sys.executable, "-c", "from allmend.cli import main; main()", *arguments],
            cwd=self.folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def until(self, name: str, words: str, seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while words not in self.log(name):
            assert time.monotonic() < end, f"{name} has not said {words!r}:\n{self.log(name)}"
            time.sleep(0.05)

    def kill(self, name: str) -> None:
        self.running[name].send_signal(signal.SIGKILL)
        self.running[name].wait()

    def done(self, name: str, seconds: float = 180.0) -> int:
        code: int = self.running[name].wait(seconds)
        return code


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    for process in made.running.values():
        process.kill()
        process.wait()


class Federation:
    def __init__(self, machine: Machine, model: Path, *, rounds: int = 4, more: str = "") -> None:
        self.machine, folder = machine, machine.folder
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        make_pki(folder / "pki", [], days=2)
        lines = []
        for place, name in enumerate(NAMES):
            rows = [
                {"id": f"{name}-{i}", "prompt": f"{name}: {i} + {i}?", "choices": [f"{2 * i}", "none"], "answer": 0}
                for i in range(8 + 2 * place)
            ]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            made = subprocess.run(
                [sys.executable, "-c", "from allmend.cli import main; main()", "member", "key", "--out", f"{name}.key"],
                cwd=folder,
                capture_output=True,
                text=True,
                check=True,
            )
            lines.append(f'{name} = "{made.stdout.strip()}"')
        (folder / "members.toml").write_text("[members]\n" + "\n".join(lines))
        clients = "".join(f'[[clients]]\nname = "{name}"\ndata = "{name}.jsonl"\n' for name in NAMES)
        text = RECIPE.format(model=model, clients=clients, rounds=rounds, more=more)
        (folder / "recipe.toml").write_text(text)

    def coordinate(self, **options: Any) -> None:
        given = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        self.machine.start(
            "coordinator",
            *("coordinate", "recipe.toml", "--members", "members.toml", "--listen", self.address, "--out", "run"),
            *given,
        )

    def join(self, name: str) -> None:
        self.machine.until("coordinator", "Offer ")
        digest = re.findall(r"Offer\s+([0-9a-f]{64})", self.machine.log("coordinator"))[-1]
        self.machine.start(
            name,
            *("join", self.address, "--ca", "pki/ca.pem", "--key", f"{name}.key", "--data", f"{name}.jsonl"),
            *("--name", name, "--accept", digest),
        )

    def simulated(self) -> bytes:
        run = tune(load_recipe(self.folder / "recipe.toml"), self.folder / "simulated", base=self.folder)
        return adapter(run)


def adapter(run: RunFolder) -> bytes:
    return (run.arm("fedavg") / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def make_federation(machine: Machine, tiny_folder: Path) -> Callable[..., Federation]:
    return lambda **options: Federation(machine, tiny_folder, **options)


@pytest.mark.parametrize("more", ["", "[privacy.secure_aggregation]\n"], ids=["open", "secure"])
def test_processes_end_at_the_bits_of_the_simulation(more: str, make_federation: Callable[..., Federation]) -> None:
    it = make_federation(more=more)
    it.coordinate(fewest=3)
    for name in NAMES:
        it.join(name)
    assert it.machine.done("coordinator") == 0, it.machine.log("coordinator")
    assert [it.machine.done(name) for name in NAMES] == [0, 0, 0]
    run = RunFolder.open(it.folder / "run")
    assert adapter(run) == it.simulated()
    assert (run.path / "report.html").exists()
    assert run.path.stat().st_mode & 0o077 == 0
    assert (run.path / "post.db").stat().st_mode & 0o077 == 0


def test_who_is_killed_and_comes_back_changes_nothing(make_federation: Callable[..., Federation]) -> None:
    it = make_federation(rounds=8)
    it.coordinate(fewest=3)
    for name in NAMES:
        it.join(name)
    it.machine.until("coordinator", "round 2:")
    it.machine.kill("north")
    it.join("north")
    it.machine.until("coordinator", "round 4:")
    it.machine.kill("coordinator")
    time.sleep(1)
    it.coordinate(fewest=3)
    it.machine.until("coordinator", "round 6:")
    it.machine.kill("coordinator")
    it.machine.kill("south")
    it.coordinate(fewest=3)
    it.join("south")
    assert it.machine.done("coordinator") == 0, it.machine.log("coordinator")
    assert adapter(RunFolder.open(it.folder / "run")) == it.simulated()


def test_a_stranger_and_a_wrong_certificate_are_told(make_federation: Callable[..., Federation]) -> None:
    it = make_federation()
    it.coordinate()
    it.machine.until("coordinator", "Offer ")
    subprocess.run(
        [sys.executable, "-c", "from allmend.cli import main; main()", "member", "key", "--out", "stranger.key"],
        cwd=it.folder,
        check=True,
        capture_output=True,
    )
    make_pki(it.folder / "other", [], days=2)
    common = ["join", it.address, "--data", "east.jsonl", "--name", "east"]
    it.machine.start("stranger", *common, "--ca", "pki/ca.pem", "--key", "stranger.key")
    it.machine.start("fooled", *common, "--ca", "other/ca.pem", "--key", "east.key")
    assert it.machine.done("stranger") == 2
    assert "does not know this member" in it.machine.log("stranger")
    assert it.machine.done("fooled") == 2
    assert "certificate is not to be trusted" in it.machine.log("fooled")
