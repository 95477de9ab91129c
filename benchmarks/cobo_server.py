"""CoBo's coordinator with 10,000 members: neighbours from sketches, the graph, a pull, and what its log and pairs take.

Members have sketches of 256 numbers around 200 centres and 50 neighbours at least. The pull is of some coordinates at a
time, so that time grows with their number, and what a whole adapter takes (SmolLM2-135M, r = 8, queries and values) is
said for the share that was measured; what does not grow with it is taken once. Memory is resident, of this process,
before and at its highest.

    python benchmarks/cobo_server.py [--members 10000] [--neighbours 50] [--coordinates 4096] [--quick]
"""

import argparse
import resource
import time
from collections.abc import Callable
from typing import TypeVar

import psutil
import torch

from _measure import figure, machine
from allmend.federation.collaboration.graph import Graph, draw, update_graph
from allmend.federation.collaboration.pull import largest_strength, pull
from allmend.federation.collaboration.sketches import nearest

ADAPTER, SKETCH, CENTRES = 460_800, 256, 200

T = TypeVar("T")


def timed(name: str, work: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    found = work()
    spent = time.perf_counter() - start
    figure(name, f"{spent:.2f} s")
    return found, spent


def run(members: int, neighbours: int, coordinates: int) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CENTRES, SKETCH, generator=generator)
    group = torch.randint(CENTRES, (members,), generator=generator)
    sketches = centres[group] + torch.randn(members, SKETCH, generator=generator)
    before = psutil.Process().memory_info().rss
    numbers, _ = timed(f"neighbours of {members:,} members, {neighbours} each", lambda: nearest(sketches, neighbours))
    graph = Graph.empty().grown(members, numbers, 1.0)
    own = sum(part.nbytes for part in (graph.numbers, graph.weights, graph.visits))
    figure("pairs in the graph, and their memory", f"{len(numbers):,}; {own / 1e6:.1f} MB")
    right = (group[graph.pairs[0]] == group[graph.pairs[1]]).double().mean()
    figure("pairs that are of one centre", f"{100 * float(right):.1f} %")
    drawn = draw(len(numbers), members / len(numbers), generator)
    products = torch.randn(len(drawn), generator=generator, dtype=torch.float64)
    timed(f"a round's {len(drawn):,} products move the graph", lambda: update_graph(graph, drawn, products, 0.1))
    w, _ = timed("the graph as a sparse matrix", lambda: graph.matrix(range(members)))
    x = torch.randn(members, coordinates, generator=generator)
    most, once = timed("the largest strength of an explicit pull", lambda: largest_strength(w))
    figure("that is", f"{most:.3g}")
    for method, strength, fixed in (("explicit", 0.01, once), ("implicit", 0.05, 0.0)):
        _, spent = timed(
            f"a pull, {method}, {coordinates:,} coordinates",
            lambda method=method, strength=strength: pull(x, w, strength, method=method),  # type: ignore[misc]
        )
        figure(
            f"so many seconds for a whole adapter, {method}", f"{fixed + (spent - fixed) * ADAPTER / coordinates:.0f} s"
        )
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figure("memory beside that before, at most", f"{(most - before) / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=10_000)
    parser.add_argument("--neighbours", type=int, default=50)
    parser.add_argument("--coordinates", type=int, default=4096)
    parser.add_argument("--quick", action="store_true", help="1,000 members, 10 neighbours, 256 coordinates")
    options = parser.parse_args()
    print(machine(), flush=True)
    sizes = (1_000, 10, 256) if options.quick else (options.members, options.neighbours, options.coordinates)
    run(*sizes)


if __name__ == "__main__":
    main()
