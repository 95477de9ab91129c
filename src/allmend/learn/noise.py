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
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

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

    def skellam(self, count: int, variance: float) -> npt.NDArray[np.int64]:
        """Whole numbers of a Skellam distribution [count] with mean 0: the difference of two Poisson numbers.

        Sums of such numbers are such numbers, whose variances add up: many parties can each add a share of a noise.

        Raises:
            ValueError: a variance below 200, where the sampler of Poisson numbers is none, or above 2⁸⁰.
        """
        if not 200 <= variance <= 2.0**80:
            raise ValueError(f"the variance must lie between 200 and 2⁸⁰, got {variance:g}")
        return _poisson(self, count, variance / 2) - _poisson(self, count, variance / 2)


def _poisson(source: NoiseSource, count: int, mean: float) -> npt.NDArray[np.int64]:
    """Poisson numbers of a large mean, less the mean's whole part.

    Source: Hörmann, "The transformed rejection method for generating Poisson random variables", 1993, algorithm PTRS.
    The logarithm of the probability is taken by Loader's saddle-point expansion (2000), which is accurate where the
    difference of large logarithms is not.
    """
    b = 0.931 + 2.53 * math.sqrt(mean)
    a = -0.059 + 0.02483 * b
    inverse, v_r = 1.1239 + 1.1328 / (b - 3.4), 0.9277 - 3.6224 / (b - 2)
    whole = math.floor(mean)
    found = np.empty(count, dtype=np.int64)
    left = np.arange(count)
    while len(left):
        u = source.uniform(len(left)).numpy() - 0.5
        v = 1 - source.uniform(len(left)).numpy()  # in (0, 1]
        near = 0.5 - np.abs(u)
        # the first edge has no probability; guard it for the division
        near = np.maximum(near, 2.0**-54)
        offset = np.floor((2 * a / near + b) * u + (mean - whole) + 0.43)
        inside = (near >= 0.07) & (v <= v_r)
        possible = (offset + whole >= 0) & ((near >= 0.013) | (v <= near))
        with np.errstate(invalid="ignore", divide="ignore"):
            likely = np.log(v * inverse / (a / near**2 + b)) <= _log_poisson(offset, whole, mean)
        taken = inside | (possible & likely)
        found[left[taken]] = offset[taken].astype(np.int64)
        left = left[~taken]
    return found


def _log_poisson(offset: npt.NDArray[np.float64], whole: int, mean: float) -> npt.NDArray[np.float64]:
    """Logarithm of the probability of `whole` + `offset` under a Poisson distribution of this mean."""
    k = np.maximum(offset + whole, 1.0)
    t = (offset - (mean - whole)) / mean  # (k − mean) / mean, without the loss of digits
    # (1 + t) log(1 + t) − t, by its series where its terms cancel
    terms = [(-1) ** n / (n * (n - 1)) for n in range(2, 13)]
    series = t * t * np.polynomial.polynomial.polyval(t, terms)
    direct = (1 + t) * np.log1p(t) - t
    deviance = mean * np.where(np.abs(t) < 0.01, series, direct)
    correction = 1 / (12 * k) - 1 / (360 * k**3)
    return -0.5 * np.log(2 * np.pi * k) - correction - deviance


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


def keyed_source(key: bytes, *purpose: str | int) -> NoiseSource:
    """A source of cryptographic strength that gives the same numbers for the same secret key and purpose: ChaCha20.

    Args:
        key: 32 random bytes that nobody else knows.
        purpose: what the numbers are for.
    """
    own = hashlib.blake2b(repr(purpose).encode(), key=key, digest_size=32).digest()
    stream = Cipher(ChaCha20(own, bytes(16)), mode=None).encryptor()
    return NoiseSource(lambda count: np.frombuffer(stream.update(bytes(8 * count)), dtype=np.uint64))
