"""What should become of a client's optimiser between rounds? A federation that begins a new one, keeps it, or ramps.

Three MedQuAD clients adapt a small Llama that was pretrained on other text (`_small_llama.py`) with LoRA of rank 8, in
rounds of H = 5 and of 20 steps, 60 steps a client in all. Four ways: AdamW begun anew in each round (`reset`),
AdamW that goes on (`persist`), AdamW begun anew with a ramp, and LionA with a ramp. Each way's learning rate is the
best of one grid on seed 0; what is compared are other seeds, by held-out loss in nats a token, paired by seed.

Beside that, the length of AdamW's steps over what it comes to when it goes on, each divided by its learning rate: the
first of a round, and the mean over a round, against the closed form for gradients of noise alone.

    python benchmarks/federated_warmup.py --data FOLDER [--seeds 1 2 3] [--steps 5 20] [--quick]
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import mean as average

from _measure import figure, machine, with_data
from _small_llama import small_llama
from allmend.events import StepDone
from allmend.intervals import mean
from allmend.life import resume, tune
from allmend.optim import monitor
from allmend.optim.closed_forms import first_step_spike, inflation
from allmend.recipe import Recipe, make_recipe
from allmend.results import POOLED, UtilityTable
from allmend.run import RunFolder
from memorisation import MEMBERS, QUICK, write_clients

WAYS = {
    "adamw-reset": {"optimizer": "adamw", "optimizer_state": "reset"},
    "adamw-persist": {"optimizer": "adamw", "optimizer_state": "persist"},
    "adamw-ramp": {"optimizer": "adamw", "optimizer_state": "ramp"},
    "liona-ramp": {"optimizer": "liona", "optimizer_state": "ramp"},
}
GRID = (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 1.28e-1, 2.56e-1)
ROUNDS = {5: 12, 20: 3}
BETA = 0.9


def recipe(model: str, seed: int, steps: int, rates: dict[str, tuple[float, ...]], rounds: int) -> Recipe:
    """Every way at each of its learning rates, as arms of one run."""
    arms = [(name, rate) for name, some in rates.items() for rate in some]
    (first, *rest) = [({"learning_rate": rate} | WAYS[name], arm_name(name, rate)) for name, rate in arms]
    return make_recipe(
        {
            "name": "federated-warmup",
            "seed": seed,
            "model": {"source": model, "dtype": "float32"},
            "data": {"template": "plain", "max_tokens": 128, "fields": {"prompt": "question", "response": "answer"}},
            "clients": [{"name": name, "data": f"{name}.jsonl"} for name in MEMBERS],
            "adapter": {"rank": 8},
            "train": {"batch_size": 4, "local_steps": steps, "log_updates": True} | first[0],
            "strategy": {"name": "fedavg", "rounds": rounds},
            "compare": {name: {"train": train} for train, name in rest},
            "evaluation": {"max_held_out": 100},
        }
    )


def arm_name(way: str, rate: float) -> str:
    return f"{way}-{rate:g}"


def arm_of(way: str, rate: float, rates: dict[str, tuple[float, ...]]) -> str:
    """The first arm bears its strategy's name."""
    first = next((name, some[0]) for name, some in rates.items())
    return "fedavg" if (way, rate) == first else arm_name(way, rate)


def run_once(folder: Path, made: Recipe, data: Path, seed: int) -> RunFolder:
    if RunFolder(folder).marker.exists():
        return resume(folder)
    base = folder.parent / f"data-{seed}"
    write_clients(data, base, QUICK, seed)
    return tune(made, folder, base=base)


def loss(run: RunFolder, arm: str) -> float:
    table = run.read_table("utility", UtilityTable)
    assert table is not None
    return math.log(next(r.perplexity.value for r in table.rows if (r.model, r.held_out) == (arm, POOLED)))


def relative_lengths(run: RunFolder, arm: str, steps: int) -> dict[int, list[float]]:
    """‖Δ‖ over the learning rate, by place in a round, from the second round on."""
    found: dict[int, list[float]] = {}
    for event in run.history():
        if isinstance(event, StepDone) and event.arm == arm and event.update and event.round > 1:
            found.setdefault((event.step - 1) % steps + 1, []).append(event.update.length / event.learning_rate)
    return found


def inflated(run: RunFolder, reset: str, persist: str, steps: int) -> tuple[float, float]:
    """First step and mean over a round of AdamW begun anew, over steps of AdamW that goes on."""
    anew, on = (relative_lengths(run, arm, steps) for arm in (reset, persist))
    base = average(length for lengths in on.values() for length in lengths)
    return average(anew[1]) / base, average(average(lengths) for lengths in anew.values()) / base


def best_rates(run: RunFolder, rates: dict[str, tuple[float, ...]]) -> Iterator[tuple[str, float]]:
    for way, some in rates.items():
        losses = {rate: loss(run, arm_of(way, rate, rates)) for rate in some}
        print(f"  {way}, seed 0: " + ", ".join(f"{rate:g} {value:.4f}" for rate, value in losses.items()), flush=True)
        yield way, min(losses, key=lambda rate: losses[rate])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/federated-warmup"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="others than 0, which tunes")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 20], choices=list(ROUNDS))
    parser.add_argument("--quick", action="store_true", help="two rounds, two learning rates, one seed")
    options = with_data(parser)
    monitor.EARLY = 10**6  # look at every step
    print(machine())
    data, model = (
        options.data,
        str(small_llama(Path("~/.cache/allmend/benchmarks").expanduser(), data=options.data)),
    )
    grid = GRID[:2] if options.quick else GRID
    for steps in options.steps:
        rounds = 2 if options.quick else ROUNDS[steps]
        out = options.out / ("quick" if options.quick else f"{steps}-steps")
        all_rates = dict.fromkeys(WAYS, grid)
        tuning = run_once(out / "tuning", recipe(model, 0, steps, all_rates, rounds), data, 0)
        chosen = {way: (rate,) for way, rate in best_rates(tuning, all_rates)}
        losses: dict[str, list[float]] = {way: [] for way in (*WAYS, "base")}
        for seed in options.seeds[:1] if options.quick else options.seeds:
            run = run_once(out / f"seed-{seed}", recipe(model, seed, steps, chosen, rounds), data, seed)
            for way, (rate,) in chosen.items():
                losses[way].append(loss(run, arm_of(way, rate, chosen)))
            losses["base"].append(loss(run, "base"))
        print(f"\n| {rounds} rounds of {steps} steps | learning rate | held-out loss | against adamw-reset |")
        print("| --- | --- | --- | --- |")
        for way, (rate,) in chosen.items():
            gap = mean([a - b for a, b in zip(losses[way], losses["adamw-reset"], strict=True)])
            against = f"{gap.value:+.4f}" + (f" ({gap.low:+.4f} to {gap.high:+.4f})" if gap.low is not None else "")
            print(f"| {way} | {rate:g} | {average(losses[way]):.4f} | {'' if way == 'adamw-reset' else against} |")
        print(f"before any round: {average(losses['base']):.4f}", flush=True)
        for rate in grid:
            arms = [arm_of(way, rate, all_rates) for way in ("adamw-reset", "adamw-persist")]
            first, whole = inflated(tuning, *arms, steps)
            figure(
                f"AdamW begun anew in rounds of {steps} steps, learning rate {rate:g}: its steps over those of AdamW "
                "that goes on",
                f"the first {first:.2f} times, over a round {whole:.2f} times (closed form for noise: "
                f"{first_step_spike(BETA):.2f} and {inflation(BETA, steps):.2f})",
            )


if __name__ == "__main__":
    main()
