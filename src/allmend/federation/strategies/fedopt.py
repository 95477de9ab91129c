"""Adaptive optimisers at the coordinator: the members' mean change is taken for a gradient.

Source: Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan, "Adaptive Federated Optimization", ICLR 2021,
algorithm 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from allmend.federation.strategies.fedavg import FedAvg
from allmend.models.tensors import Tensors
from allmend.strategy import Seen, State, Sums, Turn, grouped, of_group


@dataclass(frozen=True, kw_only=True)
class FedAdam(FedAvg):
    """m ← β₁ m + (1 − β₁) Δ, v ← β₂ v + (1 − β₂) Δ², x ← x + η m / (√v + τ), with Δ = Σ nᵢ (xᵢ − x) / Σ nᵢ.

    m starts at 0 and v at τ². A parameter moves by up to η in a round, however small the members' changes are, so that
    η should be about as large as these changes: with LoRA and AdamW at the members, their learning rate times the
    steps of a round.

    Args:
        server_learning_rate: η.
        beta1, beta2: β₁, β₂ in [0, 1).
        tau: τ, how adaptive it is: where changes are much smaller than τ, a step is about (η / τ) m.
    """

    server_learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    name = "fedadam"

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("server_learning_rate", "tau"):
            if not 0 < getattr(self, option) < float("inf"):
                raise ValueError(f"{option} must be positive, got {getattr(self, option)}")
        for option in ("beta1", "beta2"):
            if not 0 <= getattr(self, option) < 1:
                raise ValueError(f"{option} must lie in [0, 1), got {getattr(self, option)}")

    def init(self, initial: Tensors) -> State:
        first = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in initial.items()}
        second = {name: torch.full_like(tensor, self.tau**2, dtype=torch.float64) for name, tensor in initial.items()}
        return State(grouped("model", initial) | grouped("first", first) | grouped("second", second))

    def combine(self, state: State, turn: Turn, sums: Sums, seen: Mapping[str, Seen]) -> State:
        weight = sums.fact("weight")
        model, first, second = (of_group(group, state.tensors) for group in ("model", "first", "second"))
        for name, x in model.items():
            change = sums[f"update/{name}"] / weight
            first[name] = self.beta1 * first[name] + (1 - self.beta1) * change
            second[name] = self.second_moment(second[name], change.square())
            step = self.server_learning_rate * first[name] / (second[name].sqrt() + self.tau)
            model[name] = (x + step).to(x.dtype)
        return State(grouped("model", model) | grouped("first", first) | grouped("second", second))

    def second_moment(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """The next v, from Δ²."""
        return self.beta2 * v + (1 - self.beta2) * square


@dataclass(frozen=True, kw_only=True)
class FedYogi(FedAdam):
    """FedAdam with v ← v − (1 − β₂) Δ² sign(v − Δ²), which forgets large changes more slowly."""

    name = "fedyogi"

    def second_moment(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        return v - (1 - self.beta2) * square * (v - square).sign()
