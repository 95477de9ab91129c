"""Where the time of a round goes: SmolLM2-135M with LoRA of rank 8 on queries and values, four clients in one process.

torch's profiler counts the time of each operation without those that it calls, over one round of a few steps a client,
after one to warm up. It makes short operations look longer than they are: shares of small ones are upper bounds.
What is not an operation of torch (packing records, Python) is the rest of the training's time.

    python benchmarks/round_profile.py [--quick]
"""

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from _measure import figure, machine
from allmend.events import Event, RoundDone
from allmend.federation.checkpoint import Checkpoint, Checkpoints
from allmend.federation.engines.in_process import InProcessEngine
from allmend.federation.rounds import run_rounds
from allmend.federation.strategies import build_strategy
from allmend.models.adapters import add_lora
from tune_throughput import prepared_data

KINDS = {
    "matrix products": "mm addmm bmm baddbmm",
    "attention": "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward",
    "arithmetic (norms, activations, rotation)": "mul mul_ add add_ silu silu_backward pow mean rsqrt neg sub div sum "
    "cos sin linalg_vector_norm",
    "copies": "copy_ cat index index_put_ _index_put_impl_ index_select clone fill_ zero_ embedding",
    "loss": "_log_softmax _log_softmax_backward_data log_softmax logsumexp nll_loss_forward nll_loss_backward gather",
}
"""Operations of torch by what they are for."""


def kind_of(operation: str) -> str:
    name = operation.removeprefix("aten::")
    return next((kind for kind, names in KINDS.items() if name in names.split()), "other operations")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one step a client")
    options = parser.parse_args()
    print(machine())
    prepared = prepared_data("icd10cm", max_tokens=128, quick=True)
    few = prepared.recipe.train.model_copy(update={"local_steps": 1 if options.quick else 4})
    trainable = add_lora(prepared.model.model, rank=8, alpha=16, targets=["q_proj", "v_proj"], seed=0)
    strategy = build_strategy("fedavg", {}, seed=0)
    engine = InProcessEngine(trainable, prepared.members, few, lambda name, turn, step: None)
    told: list[Event] = []

    def one_round(folder: str) -> None:
        start = Checkpoint(0, strategy.init(trainable.state()), {})
        run_rounds(
            strategy,
            engine,
            start,
            rounds=1,
            arm="fedavg",
            checkpoints=Checkpoints(Path(folder), "benchmark"),
            emit=told.append,
            tokens=lambda: (0, None),
        )

    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        one_round(first)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            began = time.perf_counter()
            one_round(second)
            wall = time.perf_counter() - began
    done = next(event for event in reversed(told) if isinstance(event, RoundDone))
    seconds: Counter[str] = Counter()
    single: Counter[str] = Counter()
    for operation in profiler.key_averages():
        seconds[kind_of(operation.key)] += operation.self_cpu_time_total / 1e6
        single[operation.key] += operation.self_cpu_time_total / 1e6
    seconds["outside torch: packing, Python"] = done.training_seconds - seconds.total()
    seconds["exchange, sums and checkpoint"] = wall - done.training_seconds
    for name, spent in single.most_common(12):
        print(f"  {name:60s} {spent / wall:6.1%}")
    shares = ", ".join(f"{kind} {spent / wall:.1%}" for kind, spent in seconds.most_common())
    figure(f"where the time of a round of {few.local_steps} steps a client goes, under the profiler", shares)


if __name__ == "__main__":
    main()
