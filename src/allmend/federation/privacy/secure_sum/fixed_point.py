"""Real numbers as integers that can be summed exactly: clipped, scaled, rounded at random without bias."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from allmend.federation.privacy.secure_sum.masks import Integers, dtype

Floats = npt.NDArray[np.float64]

FINEST = 2**40
"""Most levels unless more are asked for: a float64 holds products with them exactly enough."""

EXACT = 2**52
"""Most levels at all: a float64 holds whole numbers up to there."""


@dataclass(frozen=True)
class FixedPoint:
    """x in [−clip, clip] stands for the integer x · levels / clip, rounded up or down so that its mean is right.

    Attributes:
        clip: c, the largest absolute value; larger ones are cut to it.
        levels: integers from 0 to c; as many as `members` leave room for, where it is None.
        members: most summands: their sum of at most members · levels lies within ±2^(bits − 1), so that it never
            wraps around.
        bits: the integers are taken modulo 2^bits.

    Raises:
        ValueError: a value that cannot be, or a sum that could wrap around.
    """

    clip: float
    members: int
    bits: Literal[32, 64] = 32
    levels: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.clip < float("inf"):
            raise ValueError(f"the clip must be a positive number, got {self.clip}")
        if self.members < 1:
            raise ValueError(f"there must be 1 member or more, got {self.members}")
        if self.scale < 1:
            raise ValueError(f"there must be 1 level or more, got {self.scale}")
        if self.members * self.scale >= 2 ** (self.bits - 1):
            raise ValueError(
                f"{self.members} members × {self.scale} levels = {self.members * self.scale:,} do not fit "
                f"{self.bits} bits with a sign (below {2 ** (self.bits - 1):,})"
            )
        if self.scale > EXACT:
            raise ValueError(f"at most {EXACT:,} levels are exact, got {self.scale:,}")

    @property
    def scale(self) -> int:
        """Levels, as given or as many as fit."""
        return min(FINEST, (2 ** (self.bits - 1) - 1) // self.members) if self.levels is None else self.levels

    @property
    def step(self) -> float:
        """The distance of two neighbouring values."""
        return self.clip / self.scale

    def encode(self, values: Floats, uniform: Callable[[int], Floats]) -> tuple[Integers, int]:
        """Integers, and how many values were cut to ±clip.

        Args:
            values: real numbers [n].
            uniform: that many numbers, uniform on [0, 1).

        Raises:
            ValueError: a value is not finite.
        """
        if not np.isfinite(values).all():
            raise ValueError("a value is NaN or infinite")
        beyond = int((np.abs(values) > self.clip).sum())
        scaled = np.clip(values, -self.clip, self.clip) * (self.scale / self.clip)
        rounded = np.floor(scaled + uniform(len(values)))
        # rounding of the product or the sum can step over the last level
        whole = np.clip(rounded, -self.scale, self.scale).astype(np.int64)
        return whole.astype(np.uint64).astype(dtype(self.bits), copy=False), beyond

    def decode(self, total: Integers) -> Floats:
        """The sum of the values that a sum of integers stands for."""
        signed = total.astype(total.dtype.newbyteorder("=")).view(np.int32 if self.bits == 32 else np.int64)
        return signed.astype(np.float64) * self.step
