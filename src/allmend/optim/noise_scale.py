"""How much of a gradient is noise: its noise scale, from batches of two sizes or from an optimiser's momentum.

Source of the first: McCandlish, Kaplan, Amodei, "An Empirical Model of Large-Batch Training", 2018 (B_simple = σ²/‖g‖²,
with the unbiased estimators of their appendix A). The second is derived here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from allmend.optim.closed_forms import noise_share


@dataclass(frozen=True)
class NoiseScale:
    """Signal and noise of a gradient.

    Attributes:
        signal: ‖E g‖². An unbiased estimate may come out below 0 where there is little of it.
        noise: tr Cov(g) of one example's gradient, σ².
    """

    signal: float
    noise: float

    @property
    def critical_batch_size(self) -> float:
        """σ² / ‖E g‖²: batches much larger bring little. Infinite where no signal is seen."""
        return self.noise / self.signal if self.signal > 0 else float("inf")

    @property
    def per_example(self) -> float:
        """φ = ‖E g‖² / σ², 0 or more."""
        return max(self.signal, 0.0) / self.noise if self.noise > 0 else float("inf")


def from_two_sizes(small: Sequence[float], large: float, *, small_size: float, large_size: float) -> NoiseScale:
    """From squared norms of small batches' gradients and of their mean, which accumulation and federated rounds have.

    S = (B ‖g_B‖² − b mean ‖g_b‖²) / (B − b),  σ² = (mean ‖g_b‖² − ‖g_B‖²) / (1/b − 1/B), both unbiased.

    Args:
        small: squared norms of the small batches' gradients.
        large: squared norm of the mean of these gradients.
        small_size: b, examples in a small batch.
        large_size: B, examples in all.

    Raises:
        ValueError: there are no small batches, or the sizes are not 0 < b < B.
    """
    if not small:
        raise ValueError("no small batch is given")
    if not 0 < small_size < large_size:
        raise ValueError(f"a small batch must be smaller than all together, got {small_size} and {large_size}")
    mean = sum(small) / len(small)
    signal = (large_size * large - small_size * mean) / (large_size - small_size)
    noise = (mean - large) / (1 / small_size - 1 / large_size)
    return NoiseScale(signal, noise)


@dataclass
class GradientNoiseScale:
    """Follows signal over noise of the batches' gradients from averages that a momentum already makes.

    With R = E‖g‖² and M = E‖m̂‖², both averaged with β: S = (M − κR) / (1 − κ), N = (R − M) / (1 − κ), Φ = S / N. It
    supposes that the mean gradient stays about the same over 1/(1 − β) steps: an estimate, and a biased one where it
    turns quickly.

    Attributes:
        beta: of the averages.
        batch_size: examples in a step, over all ranks and accumulation steps.
    """

    beta: float = 0.9
    batch_size: float = 1.0
    steps: int = 0
    _squares: float = 0.0
    _of_mean: float = 0.0

    def see(self, gradient_square: float, momentum_square: float) -> None:
        """Take in a step.

        Args:
            gradient_square: ‖g‖².
            momentum_square: ‖m‖², of the momentum after the step, not corrected for its start at 0.
        """
        self.steps += 1
        corrected = momentum_square / (1 - self.beta**self.steps) ** 2
        self._squares = self.beta * self._squares + (1 - self.beta) * gradient_square
        self._of_mean = self.beta * self._of_mean + (1 - self.beta) * corrected

    @property
    def estimate(self) -> NoiseScale | None:
        """Of one example's gradient; None until two steps were seen."""
        if self.steps < 2:
            return None
        weight = 1 - self.beta**self.steps
        squares, of_mean = self._squares / weight, self._of_mean / weight
        kappa = noise_share(self.beta, self.steps)
        signal = (of_mean - kappa * squares) / (1 - kappa)
        noise = (squares - of_mean) / (1 - kappa)
        return NoiseScale(signal, noise * self.batch_size)

    def see_gradients(self, gradients: Sequence[torch.Tensor], momenta: Sequence[torch.Tensor]) -> None:
        """The same from the tensors themselves."""
        squares = [
            sum(float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2 for tensor in tensors)
            for tensors in (gradients, momenta)
        ]
        self.see(*squares)
