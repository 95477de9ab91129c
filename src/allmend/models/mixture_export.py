"""What plain PEFT can have of a mixture of experts: one LoRA.

Gates differ from token to token, and B̄ (g ⊗ Ā x) with such gates is no matrix times x: no LoRA is the mixture. With
gates that are constant, B̄ diag(g) Ā is one, of rank Σ r.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig
from torch import nn

from allmend.models.adapters import write_adapter
from allmend.models.factors import A, B
from allmend.models.mixture import PRESENT, Mixture
from allmend.models.mixture_layers import MixtureConfig, MixtureLinear, MixtureMLP
from allmend.models.tensors import Tensors
from allmend.run import folder_atomic

How = Literal["generalist", "mean-gates"]


def export_mixture(
    mixture: Mixture,
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    how: How,
    base: str,
    gates: torch.Tensor | None = None,
) -> None:
    """Write one LoRA in the place of a mixture, as an ordinary PEFT folder, which replaces what is there.

    Args:
        mixture: for the names, ranks and scale.
        folder: where to write.
        tensors: a state of the mixture; for `generalist`, that of the generalists is enough.
        how: `generalist` has the generalists alone, each with the gate 1 / G. `mean-gates` has every expert that is
            present with its mean gate in each MLP; it is the mixture itself where the gates are constant and the
            mixture's form is `linear`.
        base: name or folder of the base model, which the PEFT folder records.
        gates: mean gates [layers, E], for `mean-gates`: `routing(…).mean(1)` of some text.

    Raises:
        UserError: the operating system refused.
        ValueError: there is nothing to export so: no generalist, or gates that are missing or misshapen.
    """
    config = mixture.config
    mlps = [name for name, module in mixture.model.named_modules() if isinstance(module, MixtureMLP)]
    if how == "generalist":
        if not config.generalists:
            raise ValueError("the mixture has no generalist to export")
        alone = torch.tensor([1 / config.generalists] * config.generalists + [0.0] * config.specialists)
        weights, chosen = alone.expand(len(mlps), -1), list(range(config.generalists))
    else:
        if gates is None or gates.shape != (len(mlps), config.experts):
            found = None if gates is None else list(gates.shape)
            raise ValueError(f"mean gates are {found} instead of [{len(mlps)}, {config.experts}]")
        weights, chosen = gates.cpu(), tensors[PRESENT].nonzero()[:, 0].tolist()
    factors: Tensors = {}
    for place, gate in zip(mlps, weights, strict=True):
        for layer in sorted({name.rpartition(".")[0] for name in tensors if name.startswith(f"{place}.")} - {place}):
            down, up = zip(*(expert(tensors, layer, config, e) for e in chosen), strict=True)
            name = f"base_model.model.{layer}"
            factors[name + A] = torch.cat(down)
            factors[name + B] = torch.cat([one * gate[e].to(one) for one, e in zip(up, chosen, strict=True)], dim=1)
    rank = sum(config.ranks[e] for e in chosen)
    layers = [name.removesuffix(A).removeprefix("base_model.model.") for name in factors if name.endswith(A)]
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=config.scale * rank, target_modules=_targets(mixture.model, layers)
    )
    with folder_atomic(folder) as partial:
        write_adapter(partial, lora, factors, base=base)


def expert(
    tensors: Mapping[str, torch.Tensor], layer: str, config: MixtureConfig, number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [out, r] of one of a layer's E experts, as views."""
    own, first = ("generalist", 0) if number < config.generalists else ("specialist", config.generalists)
    start, r = sum(config.ranks[first:number]), config.ranks[number]
    return tensors[f"{layer}.{own}_A"][start : start + r], tensors[f"{layer}.{own}_B"][:, start : start + r]


def _targets(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """The last parts of the layers' names, which other tools expect; whole names where others share such a part."""
    ends = sorted({name.rpartition(".")[2] for name in layers})
    own = {linear.base for linear in model.modules() if isinstance(linear, MixtureLinear)}
    others = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in own
    }
    return list(layers) if others & set(ends) else ends
