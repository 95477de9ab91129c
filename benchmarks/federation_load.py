"""A run among organisations on one machine: a coordinator and its members in processes of their own, over TLS.

All learn a small Llama whole (about the size of an adapter of SmolLM2-135M), with little to train on, so that a round
is mostly exchange. Set against it: the same recipe as a simulation, and a copy of the bytes that a round carries.

    python benchmarks/federation_load.py [--quick]
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from transformers import LlamaConfig, LlamaForCausalLM

from _measure import figure, machine, spread
from allmend.events import RoundDone
from allmend.life import tune
from allmend.recipe import load_recipe
from allmend.run import RunFolder
from empirical_epsilon import tiny_model

ADDRESS = "127.0.0.1:18443"


def make_model(folder: Path) -> Path:
    """A Llama of about 0.6 million parameters over bytes, with the tokenizer of another benchmark's."""
    tiny_model(folder)
    small = LlamaConfig.from_pretrained(folder)
    small.hidden_size, small.intermediate_size, small.num_hidden_layers = 128, 344, 3
    small.head_dim = 32
    LlamaForCausalLM(small).save_pretrained(folder)
    return folder


def recipe(model: Path, names: list[str], rounds: int) -> str:
    clients = "".join(f'[[clients]]\nname = "{name}"\ndata = "{name}.jsonl"\n' for name in names)
    return f"""name = "load"
[model]
source = "{model}"
[data]
held_out = 0.2
max_tokens = 64
{clients}
[adapter]
kind = "full"
[train]
local_steps = 1
batch_size = 2
[strategy]
name = "fedavg"
rounds = {rounds}
[engine]
threads = 1
"""


def allmend(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-c", "from allmend.cli import main; main()", *arguments]


def prepare(folder: Path, names: list[str], rounds: int) -> None:
    """Keys, certificates, records and a recipe."""
    model = make_model(folder / "model")
    subprocess.run(allmend(folder, "pki", "init"), cwd=folder, check=True, capture_output=True)
    lines = []
    for name in names:
        rows = [{"id": f"{name}-{i}", "prompt": f"{name} {i}?", "response": f"{i}"} for i in range(12)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        made = subprocess.run(
            allmend(folder, "member", "key", "--out", f"{name}.key"),
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        )
        lines.append(f'{name} = "{made.stdout.strip()}"')
    (folder / "members.toml").write_text("[members]\n" + "\n".join(lines))
    (folder / "recipe.toml").write_text(recipe(model, names, rounds))


def run(folder: Path, names: list[str]) -> tuple[float, int]:
    """Seconds of the whole run, and the largest memory of the coordinator (bytes)."""
    processes, began, largest = {}, time.perf_counter(), 0

    def start(name: str, *arguments: str) -> None:
        with (folder / f"{name}.log").open("wb") as log:
            processes[name] = subprocess.Popen(
                allmend(folder, *arguments), cwd=folder, stdout=log, stderr=subprocess.STDOUT
            )

    try:
        start(
            "coordinator",
            *("coordinate", "recipe.toml", "--members", "members.toml", "--listen", ADDRESS, "--out", "run"),
            *("--fewest", str(len(names))),
        )
        while not (found := re.search(r"Offer\s+([0-9a-f]{64})", (folder / "coordinator.log").read_text())):
            if processes["coordinator"].poll() is not None:
                raise RuntimeError((folder / "coordinator.log").read_text())
            time.sleep(0.1)
        for name in names:
            start(
                name,
                *("join", ADDRESS, "--ca", "pki/ca.pem", "--key", f"{name}.key", "--data", f"{name}.jsonl"),
                *("--name", name, "--accept", found[1]),
            )
        while processes["coordinator"].poll() is None:
            largest = max(largest, psutil.Process(processes["coordinator"].pid).memory_info().rss)
            time.sleep(0.2)
        if codes := {name: process.wait(60) for name, process in processes.items() if process.wait(60)}:
            raise RuntimeError(f"{codes}\n{(folder / 'coordinator.log').read_text()}")
    finally:
        for process in processes.values():
            process.kill()
    return time.perf_counter() - began, largest


def copy_seconds(octets: int) -> float:
    """Seconds that copying so many bytes takes, the best of five."""
    data, found = bytearray(octets), []
    for _ in range(5):
        began = time.perf_counter()
        bytes(data)
        found.append(time.perf_counter() - began)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three members, five rounds")
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    count, rounds = (3, 5) if options.quick else (options.members, options.rounds)
    names = [f"member-{number}" for number in range(count)]
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, names, rounds)
        seconds, largest = run(folder, names)
        there = [event for event in RunFolder.open(folder / "run").history() if isinstance(event, RoundDone)]
        here = [
            event
            for event in tune(load_recipe(folder / "recipe.toml"), folder / "here", base=folder).history()
            if isinstance(event, RoundDone)
        ]
    octets = sum(there[-1].sent.values()) + sum(there[-1].received.values())
    each = [event.seconds for event in there]
    training = statistics.median(event.training_seconds for event in here)
    copy = copy_seconds(octets)
    rest = statistics.median(each) - training
    print(f"{octets / 1e6:.1f} MB both ways in a round, copied in {1e3 * copy:.1f} ms: goal {1.5 * copy + 2:.2f} s")
    figure(
        f"a round of {count} members and a coordinator in {count + 1} processes over TLS, {octets / 2e6 / count:.1f} "
        "MB each way for each member",
        f"{spread(each)} s, of which training is {training:.2f} s, and {rest:.2f} s are not; {rounds} rounds and all "
        f"before and after them: {seconds:.0f} s; the coordinator's largest memory: {largest / 1e9:.2f} GB",
    )


if __name__ == "__main__":
    main()
