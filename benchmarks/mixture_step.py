"""What a mixture of experts costs beside one LoRA of as many components, in an MLP of SmolLM2-135M's shape.

Four experts of rank 8 on gate, up and down (576 to 1,536 and back, float32) against one LoRA of rank 32 in PEFT:
forward and backward of 1,024 tokens, also to the MLP's input, and the forward of a single token as in decoding. They
take turns in one process. Memory is what autograd keeps for the backward pass, parameters left out.

    python benchmarks/mixture_step.py [--quick] [--threads N]
"""

import argparse
from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from _measure import figure, interleaved, machine, times
from allmend.models.adapters import Trainable, add_lora
from allmend.models.mixture import PRESENT, apply_mixture
from allmend.models.mixture_layers import MixtureConfig

TOKENS, EXPERTS, RANK = 1024, 4, 8
TARGETS = ["gate_proj", "up_proj", "down_proj"]
PASSES, DECODED = 3, 200


def model() -> LlamaForCausalLM:
    """One layer of SmolLM2-135M's shape, with random weights and few tokens."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=576, intermediate_size=1536, num_hidden_layers=1, **heads)
    ).eval()


def mlp_of(trainable: Trainable) -> nn.Module:
    """Its MLP, with adapters that do something."""
    for name, parameter in trainable.parameters().items():
        if name != PRESENT:
            nn.init.normal_(parameter, std=0.02)
    found: nn.Module = next(one for name, one in trainable.model.named_modules() if name.endswith("layers.0.mlp"))
    return found


def mixture(form: str, *, experts: int = EXPERTS, rank: int = RANK) -> nn.Module:
    config = MixtureConfig(generalists=1, specialists=experts - 1, rank=rank, scale=2.0, form=form)
    return mlp_of(apply_mixture(model(), config, seed=0, specialist_seed=1, digest=""))


def step(mlp: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    u = torch.randn(1, TOKENS, 576, requires_grad=True)
    y: torch.Tensor = mlp(u)
    return y


def training(mlp: nn.Module) -> Callable[[], float]:
    def work() -> float:
        for _ in range(PASSES):
            y = step(mlp)
            y.backward(torch.ones_like(y))
            mlp.zero_grad(set_to_none=True)
        return PASSES * TOKENS

    return work


def decoding(mlp: nn.Module) -> Callable[[], float]:
    u = torch.randn(1, 1, 576)

    @torch.inference_mode()
    def work() -> float:
        for _ in range(DECODED):
            mlp(u)
        return DECODED

    return work


def kept(mlp: nn.Module) -> int:
    """Bytes that one forward pass keeps for backward, each once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in mlp.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = step(mlp)  # held until the sum is taken, so that no address is used twice
        total = sum(found.values())
    del y
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs = 3 if options.quick else 9
    print(machine())
    lora = mlp_of(add_lora(model(), rank=EXPERTS * RANK, alpha=2.0 * EXPERTS * RANK, targets=TARGETS, seed=0))
    what = f"a mixture of {EXPERTS} experts of rank {RANK} against a LoRA of rank {EXPERTS * RANK} (MLP 576–1,536)"
    for name, mlp in (
        ("`linear`", mixture("linear")),
        ("`block`", mixture("block")),
        ("one expert", mixture("linear", experts=1, rank=EXPERTS * RANK)),
    ):
        a, b = interleaved((name, training(mlp)), ("LoRA", training(lora)), runs=runs)
        longer = [y / x for x, y in zip(a.values, b.values, strict=True)]
        memory = kept(mlp) / kept(lora)
        figure(
            f"tokens forward and backward, {name}, {what}",
            f"{times(a, b)}; {min(longer):.2f} to {max(longer):.2f} times as long, {memory:.2f} times the memory",
        )
        a, b = interleaved((name, decoding(mlp)), ("LoRA", decoding(lora)), runs=runs)
        figure(f"single tokens forward, {name}, {what}", times(a, b))


if __name__ == "__main__":
    main()
