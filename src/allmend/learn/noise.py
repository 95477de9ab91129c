"""Where the noise of differential privacy comes from: a seed, or the operating system's cryptographic generator.

A seeded source is for simulation: its noise can be repeated, and whoever knows the seed can take it off again. A
guarantee needs the secure one. Both make random 64-bit words, and the same code makes numbers of the words.

What is proved about Gaussian noise is proved for real numbers. These are float64, with gaps between them that depend
on the noise, and the last bits of a noisy value can tell what it was before (Mironov, "On significance of the least
significant bits for differential privacy", CCS 2012; for Gaussian samplers Jin, McMurtry, Rubinstein, Ohrimenko, "Are
we there yet? Timing and floating-point attacks on differential privacy systems", S&P 2022). Callers add the noise in
float64 and round the sum to float32, which hides most of these bits; there is no proof that it hides enough.
"""

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

Randomness = Literal["seeded", "secure"]


@dataclass(frozen=True)
class NoiseSource:
    """Random numbers made of `words`, a function that gives that many fresh random 64-bit words."""

    words: Callable[[int], npt.NDArray[np.uint64]]

    def uniform(self, count: int) -> torch.Tensor:
        """Multiples of 2⁻⁵³, each of those in [0, 1) as likely as the next, float64 [count]."""
        return torch.from_numpy((self.words(count) >> np.uint64(11)) * 2.0**-53)

    def normal(self, shape: Sequence[int]) -> torch.Tensor:
        """Standard normal numbers, float64 of this shape.

        Two uniform numbers give two normal ones (Box and Muller 1958); none lies beyond √(2 · 53 ln 2) ≈ 8.57.
        """
        count = math.prod(shape)
        first, second = self.uniform(count + count % 2).view(2, (count + 1) // 2)
        radius = (1 - first).log_().mul_(-2).sqrt_()  # 1 − u is never 0
        angle = second * (2 * math.pi)
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count].view(tuple(shape))


def noise_source(randomness: Randomness, seed: int, *purpose: str | int) -> NoiseSource:
    """A source of randomness.

    Args:
        randomness: `seeded`, or `secure` for the operating system's cryptographic generator, which takes no seed.
        seed: of the run or the member.
        purpose: what the numbers are for (a word, the round, the step). Each purpose has numbers of its own, and the
            same seed and purpose give the same numbers.
    """
    if randomness == "secure":
        return NoiseSource(lambda count: np.frombuffer(os.urandom(8 * count), dtype=np.uint64))
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=16).digest()
    return NoiseSource(np.random.Philox(key=int.from_bytes(digest, "little")).random_raw)
