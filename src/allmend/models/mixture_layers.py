"""The layers of a mixture of low-rank experts: a decoder's MLP, whose router weighs its experts token by token.

With u [d] the input of an MLP, R [E, d] its router and the softmax over the experts that are present,

    g = softmax(R u)                       one gate for each expert and token, for all matrices of the MLP;
    y = W x + s · B̄ (g ⊗ Ā x)             `linear`: in each matrix W, with the experts' A [r, in] stacked to Ā and
                                           their B [out, r] to B̄, and g_e for all r rows of expert e;
    y = Σ_e g_e MLP_e(u)                   `block`: between whole MLPs, each with the W + s · B_e A_e of one expert.

The two agree to first order in B A; `linear` takes one pass through W, `block` one for each expert. Experts are float32
in a bfloat16 or float16 model. This file knows nothing of roles beyond names, nor of members and training.

Source: Fan, Messmer, Doikov, Jaggi, "On-Device Collaborative Language Modeling via a Mixture of Generalists and
Specialists" (CoMiGS), arXiv 2409.13931, which mixes by `block`. `linear` is ours.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from allmend.models.lora_targets import ALL_LINEAR


@dataclass(frozen=True)
class MixtureConfig:
    """The experts that a model has room for.

    Attributes:
        generalists: G.
        specialists: S; the E = G + S experts stand in this order. A single one needs no router.
        rank: r of a generalist, and of a specialist where the next is None.
        specialist_rank: r of a specialist.
        scale: s, which multiplies every expert's B A; LoRA's α / r.
        targets: linear layers of the MLPs, by name or the last part of it, or all of them.
        form: `linear` or `block`.
    """

    generalists: int = 1
    specialists: int = 1
    rank: int = 8
    specialist_rank: int | None = None
    scale: float = 2.0
    targets: Sequence[str] | Literal["all-linear"] = ALL_LINEAR
    form: Literal["linear", "block"] = "linear"

    @property
    def experts(self) -> int:
        """E."""
        return self.generalists + self.specialists

    @property
    def generalist_ranks(self) -> tuple[int, ...]:
        """r of each generalist."""
        return (self.rank,) * self.generalists

    @property
    def specialist_ranks(self) -> tuple[int, ...]:
        """r of each specialist."""
        return (self.rank if self.specialist_rank is None else self.specialist_rank,) * self.specialists

    @property
    def ranks(self) -> tuple[int, ...]:
        """r of each expert, generalists first."""
        return self.generalist_ranks + self.specialist_ranks


class MixtureLinear(nn.Module):
    """y = W x + s · B̄ (g ⊗ Ā x): a linear layer with stacked low-rank experts, weighed by each token's gates.

    The experts of a role stand one below the other in `generalist_A` [Σr, in] and `specialist_A`, and side by side in
    `generalist_B` [out, Σr] and `specialist_B`. A role without experts has neither.

    Args:
        base: W [out, in], with its bias where it has one.
        config: of the experts, which are zero at first.
    """

    def __init__(self, base: nn.Linear, config: MixtureConfig) -> None:
        super().__init__()
        self.base = base
        self.ranks = config.ranks
        self.scale = config.scale
        self.weights: torch.Tensor | None = None
        """s g of each component [.., Σr], in the call that is under way, from the MLP around this layer."""
        zeros = partial(torch.zeros, device=base.weight.device, dtype=dtype_of_experts(base.weight))
        for role, ranks in (("generalist", config.generalist_ranks), ("specialist", config.specialist_ranks)):
            if rows := sum(ranks):
                self.register_parameter(f"{role}_A", nn.Parameter(zeros(rows, base.in_features)))
                self.register_parameter(f"{role}_B", nn.Parameter(zeros(base.out_features, rows)))

    def forward(self, x: torch.Tensor, gates: torch.Tensor | None = None) -> torch.Tensor:
        """y [.., out], of the base's type.

        Args:
            x: [.., in].
            gates: g [.., E]; by default those that the MLP around this layer has found, and 1 for a single expert.

        Raises:
            ValueError: there are several experts and no gates.
        """
        weights = self.weights if gates is None else weights_of_components(gates, self.ranks, self.scale)
        if weights is None and len(self.ranks) > 1:
            raise ValueError(f"{len(self.ranks)} experts need gates: call the MLP around this layer")
        A, B = self._stacked("A", dim=0), self._stacked("B", dim=1)
        hidden = functional.linear(x.to(A.dtype), A) * (self.scale if weights is None else weights)
        y: torch.Tensor = self.base(x)
        return (y + functional.linear(hidden, B)).to(y.dtype)

    def _stacked(self, end: str, *, dim: int) -> torch.Tensor:
        """Ā [Σr, in] or B̄ [out, Σr]."""
        both = (self._parameters.get(f"{role}_{end}") for role in ("generalist", "specialist"))
        found: list[torch.Tensor] = [one for one in both if one is not None]
        return found[0] if len(found) == 1 else torch.cat(found, dim=dim)


def weights_of_components(gates: torch.Tensor, ranks: Sequence[int], scale: float) -> torch.Tensor:
    """s g for each of the experts' components, [.., Σr], of gates g [.., E]."""
    gates = gates * scale
    if len(set(ranks)) == 1:
        return gates.repeat_interleave(ranks[0], dim=-1)
    # `repeat_interleave` by a list would add up gradients in no fixed order on a GPU
    apart = zip(torch.split(gates, 1, dim=-1), ranks, strict=True)
    return torch.cat([gate.expand(*gate.shape[:-1], r) for gate, r in apart], dim=-1)


class MixtureMLP(nn.Module):
    """A decoder layer's MLP whose linear layers have experts; it finds each token's gates and hands them to them.

    Args:
        base: the MLP; some of its layers are replaced until `taken_off`.
        layers: names of these.
        present: [E] of 0 and 1, which experts there are; one for all MLPs of a model.
        config: of the experts.
    """

    def __init__(self, base: nn.Module, layers: Sequence[str], present: nn.Parameter, config: MixtureConfig) -> None:
        super().__init__()
        first = next(child for child in base.children() if isinstance(child, nn.Linear))
        self.base = base
        self.present = present
        self.router: nn.Parameter | None = None
        if config.experts > 1:
            shape = (config.experts, first.in_features)
            kind = dtype_of_experts(first.weight)
            self.router = nn.Parameter(torch.zeros(shape, device=first.weight.device, dtype=kind))
        self.seen: list[torch.Tensor] | None = None
        """Where gates are put while somebody watches."""
        self.linears: dict[str, MixtureLinear] = {}
        for name in layers:
            linear = base.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            self.linears[name] = MixtureLinear(linear, config)
            setattr(base, name, self.linears[name])

    def gates(self, u: torch.Tensor) -> torch.Tensor | None:
        """g [.., E] of inputs u [.., d], exactly 0 for an absent expert; None where there is a single one."""
        if self.router is None:
            return None
        logits = functional.linear(u.to(self.router.dtype), self.router)
        return logits.masked_fill(self.present == 0, -math.inf).softmax(-1)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """y [.., d] of inputs u [.., d]."""
        gates = self.gates(u)
        if self.seen is not None:
            self.seen.append(u.new_ones(*u.shape[:-1], 1, dtype=self.present.dtype) if gates is None else gates)
        return self._mixed(u, gates)

    def taken_off(self) -> nn.Module:
        """The MLP with its own layers back in place."""
        for name, linear in self.linears.items():
            setattr(self.base, name, linear.base)
        return self.base

    def _mixed(self, u: torch.Tensor, gates: torch.Tensor | None) -> torch.Tensor:
        return self._through(u, gates)

    def _through(self, u: torch.Tensor, gates: torch.Tensor | None) -> torch.Tensor:
        """One pass through the MLP, with these gates in each of its layers."""
        first = next(iter(self.linears.values()))
        weights = None if gates is None else weights_of_components(gates, first.ranks, first.scale)
        for linear in self.linears.values():
            linear.weights = weights
        try:
            y: torch.Tensor = self.base(u)
            return y
        finally:
            for linear in self.linears.values():
                linear.weights = None  # they would hold on to the graph


class BlockMixtureMLP(MixtureMLP):
    """y = Σ_e g_e MLP_e(u): the same, with the mixture between whole MLPs of one expert each, as in the paper."""

    def _mixed(self, u: torch.Tensor, gates: torch.Tensor | None) -> torch.Tensor:
        if gates is None:
            return self._through(u, None)
        alone = torch.eye(gates.shape[-1], device=gates.device, dtype=gates.dtype)
        each = zip(torch.split(gates, 1, dim=-1), alone, strict=True)
        return torch.stack([gate * self._through(u, one) for gate, one in each]).sum(0).to(u.dtype)


def dtype_of_experts(weight: torch.Tensor) -> torch.dtype:
    """The type of the experts beside a weight: half of its precision would be lost on their small steps."""
    return torch.float32 if weight.dtype in (torch.bfloat16, torch.float16) else weight.dtype


@contextlib.contextmanager
def watched_gates(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """The gates [.., E] of every MLP that runs in this context, with their graph, in the order in which they run."""
    found: list[torch.Tensor] = []
    mlps = [module for module in model.modules() if isinstance(module, MixtureMLP)]
    for mlp in mlps:
        mlp.seen = found
    try:
        yield found
    finally:
        for mlp in mlps:
            mlp.seen = None


@torch.no_grad()
def routing(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The gates of every token, [layers, tokens, E].

    Args:
        model: that of a mixture, in evaluation mode.
        batch: what the model is called with: `input_ids` [N, T] and, where some are padding, which is left out,
            `attention_mask` [N, T]. The tokens come text by text.
    """
    with watched_gates(model) as found:
        model(**batch)
    gates = torch.stack([one.flatten(0, -2) for one in found])
    return gates if "attention_mask" not in batch else gates[:, batch["attention_mask"].flatten().bool()]
