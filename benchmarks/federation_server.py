"""The coordinator's side alone: rounds over thousands of members, whose updates are random and come one by one.

Sums are formed as updates come, so that memory should not grow with the members. The updates have the size of a LoRA
adapter of SmolLM2-135M (rank 8, query and value).

    python benchmarks/federation_server.py [--quick]
"""

import argparse
import multiprocessing as mp
import resource
import time
from collections.abc import Iterator, Mapping

import torch

from _measure import figure, machine
from allmend.federation.checkpoint import Checkpoint
from allmend.federation.engines import Answer
from allmend.federation.rounds import run_rounds
from allmend.federation.strategies import build_strategy
from allmend.models.tensors import Tensors
from allmend.strategy import Reply, State, Strategy, Task, grouped

SHAPES = {
    f"layers.{layer}.{name}": shape
    for layer in range(30)
    for name, shape in (("q.A", (8, 576)), ("q.B", (576, 8)), ("v.A", (8, 576)), ("v.B", (192, 8)))
}


class RandomMembers:
    """An engine whose members answer with one of a few random updates."""

    def __init__(self, count: int) -> None:
        self.members = [f"m{number:05d}" for number in range(count)]
        generator = torch.Generator().manual_seed(0)
        self._updates = [
            grouped("update", {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()})
            for _ in range(8)
        ]

    def work(self, strategy: Strategy, tasks: Mapping[str, Task]) -> Iterator[Answer]:
        for place, name in enumerate(sorted(tasks)):
            yield Answer(name, Reply(self._updates[place % 8], {"weight": 1.0, "loss": 1.0}))

    def summed(self) -> None:
        return None

    def states(self) -> dict[str, State]:
        return {}

    def restore(self, states: Mapping[str, State]) -> None:
        pass

    def close(self) -> None:
        pass


class Nowhere:
    """Checkpoints that are not written."""

    def save(self, checkpoint: Checkpoint, announce: object) -> None:
        pass


def serve(name: str, members: int, rounds: int, memory: "mp.Queue[tuple[float, int]]") -> None:
    torch.set_num_threads(1)
    strategy = build_strategy(name, {}, seed=0)
    initial: Tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    began = time.perf_counter()
    run_rounds(
        strategy,
        RandomMembers(members),
        Checkpoint(0, strategy.init(initial), {}),
        rounds=rounds,
        arm=name,
        checkpoints=Nowhere(),  # type: ignore[arg-type]
        emit=lambda event: None,
        tokens=lambda: (0, None),
    )
    memory.put((time.perf_counter() - began, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1,000 members at most, two rounds")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--strategies", nargs="+", default=["fedavg", "fedadam"])
    options = parser.parse_args()
    counts, rounds = ((10, 1_000), 2) if options.quick else ((10, 1_000, 10_000), options.rounds)
    print(machine())
    parameters = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    context = mp.get_context("spawn")
    for name in options.strategies:
        for members in counts:
            memory: mp.Queue[tuple[float, int]] = context.Queue()
            process = context.Process(target=serve, args=(name, members, rounds, memory))
            process.start()
            seconds, largest = memory.get()
            process.join()
            figure(
                f"the coordinator's side of {rounds} rounds of `{name}` with {members:,} members and {parameters:,} "
                "parameters",
                f"{1e3 * seconds / members / rounds:.2f} ms a reply, {seconds:,.0f} s in all; largest memory "
                f"{largest / 1e9:.2f} GB",
            )


if __name__ == "__main__":
    main()
