"""What to average: LoRA's factors (`fedavg`) or what they make (`fedavg_product`).

Three MedQuAD clients adapt the small Llama of `memorisation.py` for equal rounds, with few and with many local steps,
over several seeds; paired by seed, the difference in held-out loss, the bytes of a round, and how much of the
product's average the cut to the adapter's rank loses.

    python benchmarks/averaging.py --data FOLDER [--quick]
"""

import argparse
import math
from pathlib import Path

from _measure import machine, with_data
from _small_llama import small_llama
from allmend.events import RoundDone
from allmend.federation.checkpoint import Checkpoints
from allmend.intervals import mean
from allmend.life import tune
from allmend.recipe import Recipe, make_recipe
from allmend.results import POOLED, UtilityTable
from allmend.run import RunFolder
from memorisation import MEMBERS, QUICK, write_clients

EPOCHS = (0.34, 1.0, 3.0)
ARMS = ("fedavg", "fedavg_product")


def recipe(model: str, seed: int, epochs: float, rate: float, rounds: int) -> Recipe:
    """Both ways to average, from the same start on the same data."""
    return make_recipe(
        {
            "name": "averaging",
            "seed": seed,
            "model": {"source": model, "dtype": "float32"},
            "data": {"template": "plain", "max_tokens": 128, "fields": {"prompt": "question", "response": "answer"}},
            "clients": [{"name": name, "data": f"{name}.jsonl"} for name in MEMBERS],
            "adapter": {"rank": 8},
            "train": {"learning_rate": rate, "batch_size": 4, "local_epochs": epochs},
            "strategy": {"name": ARMS[0], "rounds": rounds},
            "compare": {ARMS[1]: {"strategy": {"name": ARMS[1]}}},
        }
    )


def loss(run: RunFolder, arm: str) -> float:
    table = run.read_table("utility", UtilityTable)
    assert table is not None
    return math.log(next(r.perplexity.value for r in table.rows if (r.model, r.held_out) == (arm, POOLED)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/averaging"))
    parser.add_argument("--quick", action="store_true", help="one seed, two rounds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rate", type=float, default=5e-3)
    options = with_data(parser)
    seeds, rounds = (options.seeds[:1], 2) if options.quick else (options.seeds, 6)
    print(machine())
    model = str(small_llama(Path("~/.cache/allmend/benchmarks").expanduser(), data=options.data))
    for epochs in EPOCHS:
        gaps, losses, lost = [], {arm: [] for arm in (*ARMS, "base")}, []
        octets = {}
        for seed in seeds:
            base = options.out / f"data-{seed}"
            write_clients(options.data, base, QUICK, seed)
            made = recipe(model, seed, epochs, options.rate, rounds)
            run = tune(made, options.out / f"{epochs:g}-{seed}-{rounds}", base=base)
            for arm in losses:
                losses[arm].append(loss(run, arm))
            gaps.append(losses[ARMS[1]][-1] - losses[ARMS[0]][-1])
            done = [event for event in run.history() if isinstance(event, RoundDone)]
            octets = {event.arm: max(event.received.values()) for event in done}
            newest = Checkpoints(run.arm(ARMS[1]), identity=f"{made.digest()}/{ARMS[1]}").newest()
            lost.append(float(newest.server.facts["discarded"]) if newest else math.nan)
        gap = mean(gaps)
        print(
            f"{epochs:g} epochs a round, {rounds} rounds, learning rate {options.rate:g}, {len(seeds)} seeds: loss "
            + ", ".join(f"{arm} {mean(values).value:.3f}" for arm, values in losses.items())
            + f"; product minus factors {gap.value:+.4f}"
            + (f" ({gap.low:+.4f} to {gap.high:+.4f})" if gap.low is not None else "")
            + f"; a member sends {octets[ARMS[0]] / 1e6:.2f} and {octets[ARMS[1]] / 1e6:.2f} MB; the last cut loses "
            f"{max(lost):.1e} of the square at most",
            flush=True,
        )


if __name__ == "__main__":
    main()
