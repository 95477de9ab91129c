"""What members only ever sum, as one vector of integers: the form in which secure aggregation adds it up.

The same code serves a simulation, where the integers are added in this process, and members on other machines, whose
integers are masked: both sums are the same integers, and both models the same bits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from allmend.federation.privacy.accounting import SKELLAM_LEVELS
from allmend.federation.privacy.secure_sum.fixed_point import FixedPoint, Floats
from allmend.federation.privacy.secure_sum.masks import Integers, dtype
from allmend.federation.strategies.private_fedavg import PrivateFedAvg
from allmend.learn.noise import NoiseSource, Randomness, noise_source
from allmend.models.tensors import Tensors, is_finite
from allmend.recipe import SecureAggregation
from allmend.strategy import Layout, Reply, Strategy, Sums, Turn

LARGEST_NUMBER = 2.0**27
"""Of a single number in a reply, such as a loss times a number of records."""


@dataclass(frozen=True)
class VectorCode:
    """Replies as vectors, and sums of vectors as sums of replies.

    Tensors come first, in order of their names, then the numbers, last of all how many of the reply's values were cut
    to what fits. A name that a reply leaves out stands for zeros.

    Attributes:
        layout: of the tensors.
        numbers: names of the numbers.
        clip: largest absolute value in a tensor.
        members: most members of a sum.
        bits: integers are taken modulo 2^bits.
        levels: whole numbers from 0 to the clip; as many as fit where it is None.
        noise: variance of the Skellam noise that a member adds to each of its tensors' values, in whole numbers.
    """

    layout: Layout
    numbers: Sequence[str]
    clip: float
    members: int
    bits: Literal[32, 64] = 64
    levels: int | None = None
    noise: float = 0.0

    @classmethod
    def of(
        cls, strategy: Strategy, initial: Tensors, layer: SecureAggregation, members: int, leg: int = 0
    ) -> "VectorCode":
        """The code of an arm's replies in a leg.

        Args:
            strategy: the arm's.
            initial: the parameters that everybody starts from.
            layer: the recipe's.
            members: in the run.
        """
        declared = strategy.declare()
        numbers, layout = sorted(set(declared.summed) & declared.numbers), strategy.layout(initial, leg)
        if not isinstance(strategy, PrivateFedAvg):
            return cls(layout, numbers, layer.clip * layer.largest_weight, members)
        # a change of norm C has the norm L on the grid, and √d more at most when it is rounded
        norm = SKELLAM_LEVELS + math.sqrt(sum(shape.numel() for shape in layout.values()))
        share = (strategy.noise_multiplier * norm) ** 2 / layer.fewest
        return cls(layout, numbers, strategy.clip, members, levels=SKELLAM_LEVELS, noise=share)

    @property
    def length(self) -> int:
        """Numbers in a vector."""
        return sum(shape.numel() for shape in self.layout.values()) + len(self.numbers) + 1

    @property
    def nbytes(self) -> int:
        """Size of a vector."""
        return self.length * self.bits // 8

    @property
    def of_tensors(self) -> FixedPoint:
        """Levels of the tensors' values."""
        return FixedPoint(self.clip, self.members, self.bits, self.levels)

    @property
    def of_numbers(self) -> FixedPoint:
        """Levels of the numbers, whatever those of tensors are; with 64 bits and up to 2¹⁶ members, or with 32 bits and
        up to 8, whole numbers are exact."""
        finest = FixedPoint(LARGEST_NUMBER, self.members, self.bits).scale
        return FixedPoint(LARGEST_NUMBER, self.members, self.bits, 1 << (finest.bit_length() - 1))

    def encode(self, reply: Reply, source: NoiseSource) -> tuple[Integers, int]:
        """The summed part of a reply, and how many of its values were cut to what fits.

        Args:
            reply: a member's.
            source: of the rounding and of the noise.

        Raises:
            ValueError: a name is not in the layout, a shape differs, or a value is not finite (which is said).
        """
        strangers = sorted({*reply.summed, *reply.summed_facts} - {*self.layout, *self.numbers})
        if strangers:
            raise ValueError(f"{strangers[0]!r} has no place in the sum")
        parts = []
        for name in sorted(self.layout):
            shape = self.layout[name]
            tensor = reply.summed.get(name)
            if tensor is None:
                parts.append(np.zeros(shape.numel()))
                continue
            if tensor.shape != shape:
                raise ValueError(f"tensor {name!r} has shape {tuple(tensor.shape)}, and the sum has {tuple(shape)}")
            if not is_finite(tensor):
                raise ValueError(f"tensor {name!r} holds NaN or infinite values")
            parts.append(tensor.detach().to("cpu", torch.float64).flatten().numpy())
        numbers = np.array([reply.summed_facts.get(name, 0.0) for name in sorted(self.numbers)] + [0.0])
        if not np.isfinite(numbers).all():
            raise ValueError(f"number {sorted(self.numbers)[int(np.argmin(np.isfinite(numbers)))]!r} is not finite")

        def uniform(count: int) -> Floats:
            return np.asarray(source.uniform(count).numpy(), dtype=np.float64)

        tensors, cut = self.of_tensors.encode(np.concatenate([*parts, np.zeros(0)]), uniform)
        if self.noise:
            tensors = tensors + source.skellam(len(tensors), self.noise).astype(np.uint64).astype(tensors.dtype)
        cut += int((np.abs(numbers) > LARGEST_NUMBER).sum())
        numbers[-1] = cut
        return np.concatenate([tensors, self.of_numbers.encode(numbers, uniform)[0]]), cut

    def decode(self, total: Integers, members: int) -> Sums:
        """The sums that a sum of vectors stands for.

        Args:
            total: modulo 2^bits, [length].
            members: how many are in it.
        """
        split = self.length - len(self.numbers) - 1
        values = torch.from_numpy(self.of_tensors.decode(total[:split]))
        tensors, start = {}, 0
        for name in sorted(self.layout):
            size = self.layout[name].numel()
            tensors[name] = values[start : start + size].view(self.layout[name])
            start += size
        numbers = self.of_numbers.decode(total[split:]).tolist()
        return Sums.of(tensors, dict(zip(sorted(self.numbers), numbers, strict=False)), members, cut=round(numbers[-1]))


def rounding(randomness: Randomness, seed: int, arm: str, turn: Turn, member: str) -> NoiseSource:
    """Where a member's rounding and its share of noise get their random numbers in a leg: another source for each."""
    return noise_source(randomness, seed, "rounding", arm, turn.round, turn.leg, member)


def without_sums(reply: Reply) -> Reply:
    """What of a reply may be looked at by itself."""
    return Reply(seen=reply.seen, seen_facts=reply.seen_facts)


@dataclass
class CodedSum:
    """A sum of vectors formed in this process, as secure aggregation would form it behind masks.

    Attributes:
        code: of the vectors.
        members: how many are in it.
    """

    code: VectorCode
    members: int = 0

    def __post_init__(self) -> None:
        self._total: Integers = np.zeros(self.code.length, dtype=dtype(self.code.bits))

    def add(self, reply: Reply, source: NoiseSource) -> int:
        """Add a member's reply; gives the bytes of its vector.

        Raises:
            ValueError: see `VectorCode.encode`.
        """
        vector, _ = self.code.encode(reply, source)
        self._total += vector
        self.members += 1
        return vector.nbytes

    def sums(self) -> Sums:
        """The sums of the replies."""
        return self.code.decode(self._total, self.members)


def codes_of_legs(strategy: Strategy, initial: Tensors, layer: SecureAggregation, members: int) -> list[VectorCode]:
    """The code of each leg's replies; arguments as of `VectorCode.of`."""
    return [VectorCode.of(strategy, initial, layer, members, leg) for leg in range(strategy.legs)]
