"""DP-SGD at one member: noisy gradients with a guarantee for each of its records.

Each step takes a sample of the records, clips every record's gradient to norm C, and adds Gaussian noise of standard
deviation σ C to each coordinate of the sum. What becomes of the sum afterwards (a mean, the optimiser, the parameters)
has the same guarantee. Losses, sizes of batches and counts of tokens have none: they are the member's own.

Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang, "Deep Learning with Differential Privacy", CCS 2016.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from allmend.data.packing import Row
from allmend.learn.noise import Randomness, noise_source
from allmend.learn.per_example import clipped_sum
from allmend.models.adapters import Trainable


@dataclass(frozen=True)
class RecordNoise:
    """How one member's gradients are made private.

    Attributes:
        clip: C, the largest norm of a record's gradient; infinity leaves it as it is.
        noise_multiplier: σ; 0 adds no noise.
        sampling: `poisson` draws each record in each step, independently of the others; `shuffle` goes through
            permutations of the records, as training without noise does.
        randomness: where noise and Poisson samples come from, `seeded` or `secure`.

    Raises:
        ValueError: C or σ is no such number, or there is noise in proportion to an infinite C.
    """

    clip: float
    noise_multiplier: float
    sampling: Literal["poisson", "shuffle"]
    randomness: Randomness

    def __post_init__(self) -> None:
        if not (self.clip > 0 and 0 <= self.noise_multiplier < math.inf):
            raise ValueError(
                f"clip {self.clip} must be positive, noise multiplier {self.noise_multiplier} finite and not negative"
            )
        if self.clip == math.inf and self.noise_multiplier:
            raise ValueError(f"noise of {self.noise_multiplier} times an infinite clip is not possible")

    @property
    def deviation(self) -> float:
        """σ C, the standard deviation of the noise."""
        return self.noise_multiplier * self.clip if self.noise_multiplier else 0.0


def sampling_rate(records: int, batch_size: int) -> float:
    """The probability with which a Poisson sample holds a record: `batch_size` of them are expected, or all."""
    return min(1.0, batch_size / records)


def poisson_batches(records: int, batch_size: int, noise: RecordNoise, *, seed: int, first: int) -> Iterator[list[int]]:
    """Batches of record indices from the `first` on (from 0), without end; a batch may be empty."""
    step = first
    while True:
        drawn = noise_source(noise.randomness, seed, "sample", step).uniform(records)
        yield (drawn < sampling_rate(records, batch_size)).nonzero()[:, 0].tolist()
        step += 1


def private_gradient(
    trainable: Trainable, rows: Sequence[Row], noise: RecordNoise, *, size: int, seed: int, step: int
) -> float:
    """Leave (Σ_i g_i min(1, C / ‖g_i‖) + N(0, (σC)²)) / B in the parameters' `grad`, over the records i of `rows`.

    Args:
        trainable: what learns.
        rows: the batch, from `per_example.separable_rows`.
        noise: C and σ.
        size: B, of a batch, or expected of it where that depends on the records drawn.
        seed: of the member's noise, where it is seeded.
        step: which of the member's steps it is; each has noise of its own.

    Returns:
        The sum of the losses of all targets (nats), without noise.
    """
    losses = clipped_sum(trainable, rows, noise.clip)
    source = noise_source(noise.randomness, seed, "noise", step)
    for parameter in trainable.parameters().values():
        assert parameter.grad is not None
        # added in float64 and rounded once: see `noise`
        noisy = parameter.grad.to("cpu", torch.float64) + noise.deviation * source.normal(parameter.shape)
        parameter.grad.copy_(noisy).div_(size)
    return losses
