"""Which optimisers need a warmup of the learning rate? A small Llama from scratch, over seeds.

0.54 million parameters, MedQuAD and WikiText-2, 300 steps of 32 sequences of 64 tokens, the learning rate falling over
the last half, gradients clipped to norm 1, weight decay 0.1 (`allmend.optim.small_model`). Held-out loss in nats a
token. Trainings are single-threaded and run side by side in processes.

    python benchmarks/warmup.py --data FOLDER [--seeds 0 1 2] [--processes 2] [--quick] [--figure FILE.svg]

What is printed last are the acceptance figures: AdamW at 4e-3 loses at least 0.25 nats without warmup, else the
benchmark tests nothing; LionAR at 3.2e-2 loses at most 0.03; LionAR without warmup beats AdamW without it, at the best
of its learning rates, by 0.03; AdamW's first step is 3.6 to 5.4 times as long as its 24th, LionA's 0.98 to 1.02.
With `--figure`, the sizes of updates over a training with and without warmup, as a picture.
"""

import argparse
import json
import multiprocessing as mp
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean

import torch

from _measure import figure, machine
from _small_llama import read_text
from allmend.optim.comparison import Method, Training, Trial, gaps, rows, train_once
from allmend.optim.small_model import Sequences, Shape, encode

ADAMW = tuple(Method("adamw", lr, label=f"AdamW {lr:g}") for lr in (1e-3, 2e-3, 4e-3))
LIONAR = Method("lionar", 3.2e-2, label="LionAR 0.032")
BOTH = (
    ADAMW[2],
    LIONAR,
    Method("radam", 4e-3, label="RAdam 0.004"),
    Method("muon", 4e-3, label="Muon 0.004"),
    Method("liona", 4e-3, label="LionA 0.004"),
    Method("adamw", 4e-3, ramp=True, label="AdamW 0.004 with a ramp"),
)
WARMUP = 0.25
AT_24 = 24


def trials(seeds: list[int]) -> Iterator[tuple[Method, float, int]]:
    """What is trained; RAdam and Muon stand beside ours."""
    for seed in seeds:
        for method in BOTH:
            for warmup in (0.0, WARMUP):
                if not (method.ramp and warmup):
                    yield method, warmup, seed
        for method in ADAMW[:2]:
            yield method, 0.0, seed


def one(data: Sequences, training: Training, what: tuple[Method, float, int]) -> Trial:
    torch.set_num_threads(1)
    method, warmup, seed = what
    return train_once(data, method, warmup=warmup, seed=seed, shape=Shape(), training=training)


def length_at(trial: Trial, step: int) -> float:
    """‖Δ‖ over attention's query, key and value matrices."""
    return trial.attention[step]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("ALLMEND_DATA"), help="folder of medquad/, wikitext2/"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="40 steps without cooldown: the sizes of updates only")
    parser.add_argument("--out", type=Path, help="a file for all trials, as JSON")
    parser.add_argument("--figure", type=Path, help="an SVG file for the sizes of updates over a training")
    options = parser.parse_args()
    if options.data is None:
        print("No data: name a folder with --data or ALLMEND_DATA. Nothing was measured.")
        return
    print(machine())
    texts = read_text(Path(options.data)).train
    random.Random(0).shuffle(texts)
    data = encode(texts, Shape())
    print(f"{data.train.numel():,} tokens to learn from, {data.held_out.numel():,} held out", flush=True)
    if options.figure:
        from _warmup_figure import draw, trajectories

        options.figure.write_text(draw(trajectories(data, seed=options.seeds[0])), encoding="utf-8")
        print(f"{options.figure}")
        return
    seeds = options.seeds
    training = replace(Training(), steps=40, cooldown=0.0) if options.quick else Training()
    found: list[Trial] = []
    with mp.get_context("spawn").Pool(options.processes) as pool:
        for trial in pool.imap(partial(one, data, training), list(trials(seeds))):
            found.append(trial)
            spike = length_at(trial, 1) / length_at(trial, AT_24) if not trial.warmup else float("nan")
            print(
                f"  {trial.method}, warmup {trial.warmup:.0%}, seed {trial.seed}: {trial.loss:.3f}, first step "
                f"{spike:.2f} times the 24th",
                flush=True,
            )
    if options.out:
        content = [{"method": t.method, "lr": t.lr, "warmup": t.warmup, "seed": t.seed, "loss": t.loss} for t in found]
        options.out.write_text(json.dumps(content, indent=1))
    table = rows(found)
    print("\n| optimiser | without warmup | 25 % warmup | first step over the 24th |\n| --- | --- | --- | --- |")
    by = {(row.method, row.warmup): row for row in table}
    for name in dict.fromkeys(row.method for row in table):
        without, with_warmup = by[name, 0.0], by.get((name, WARMUP))
        some = [trial for trial in found if trial.method == name and not trial.warmup]
        shown = [
            "" if row is None else f"{row.loss:.3f} ({min(row.losses.values()):.3f} to {max(row.losses.values()):.3f})"
            for row in (without, with_warmup)
        ]
        ratio = mean(length_at(trial, 1) / length_at(trial, AT_24) for trial in some)
        print(f"| {name} | {shown[0]} | {shown[1]} | {ratio:.2f} |")
    for gap in gaps(table):
        print(f"{gap.verdict}.")
    adamw = {
        row.lr: row.loss
        for row in table
        if row.method.startswith("AdamW") and "ramp" not in row.method and not row.warmup
    }
    figure(
        "AdamW at 4e-3: loss without warmup minus with 25 % (0.25 or more is asked for)",
        f"{by[str(ADAMW[2]), 0.0].loss - by[str(ADAMW[2]), WARMUP].loss:.3f} nats",
    )
    figure(
        "LionAR at 3.2e-2: the same (0.03 or less is asked for)",
        f"{by[str(LIONAR), 0.0].loss - by[str(LIONAR), WARMUP].loss:.3f} nats",
    )
    figure(
        "LionAR without warmup minus AdamW without, at the best of 1e-3, 2e-3 and 4e-3 (−0.03 or less is asked for)",
        f"{by[str(LIONAR), 0.0].loss - min(adamw.values()):.3f} nats",
    )
    turned = [trial for trial in found if trial.method == str(LIONAR) and not trial.warmup]
    angles = [one.first_angle or 0.0 for trial in turned for one in trial.report.tensors if "proj" in one.name]
    print(f"LionAR's angles at the first step: {min(angles):.6f} to {max(angles):.6f} rad")


if __name__ == "__main__":
    main()
