"""Formats: what values a quantised weight can take, simulated in floating point.

A weight [rows, columns] is cut into blocks of columns that share a scale. `quantize` gives the nearest values of the
format's grid in the weight's own shape and type; `packing` makes bits of them.

A format is *max-scaled* if a block's scale depends on its largest magnitude alone, 0 is on the grid, and rounding keeps
the order of magnitudes. Then pruning first by magnitude and quantising afterwards is exact: q(m ⊙ x) = m ⊙ q(x), as
long as each block that keeps anything keeps its largest magnitude.

Sources: Harma et al., "Effective Interplay between Sparsity and Quantization", arXiv 2405.20935; OCP Microscaling
Formats (MX) 1.0; scales, ranges and rounding are those of `compressed-tensors`, whose folders they end up in.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

MX_BLOCK = 32
NV_BLOCK = 16

E4M3_MAX = 448.0
E2M1_MAX = 6.0


@dataclass(frozen=True)
class Scale:
    """What a block's numbers are multiplied with.

    Attributes:
        step: float32, broadcast over a block's values.
        zero: the code of 0, in the same shape; none where it is 0.
        whole: of formats whose scales have a scale: what all steps of the weight were multiplied with.
    """

    step: torch.Tensor
    zero: torch.Tensor | None = None
    whole: torch.Tensor | None = None


@dataclass(frozen=True)
class Format(ABC):
    """A grid, and how scales are found.

    Attributes:
        name: as on the command line.
        element_bits: of one weight.
        scale_bits: of one block, the zero point's among them.
        block: columns with one scale; a whole row where it is 0.
    """

    name: str
    element_bits: int
    scale_bits: int
    block: int

    max_scaled: ClassVar[bool] = True

    def bits(self, columns: int) -> float:
        """Of one weight on average, scales included, in rows of so many columns."""
        return self.element_bits + self.scale_bits / (self.block or columns)

    def blocks(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight [rows, columns] as float32 [rows, blocks, block].

        Raises:
            ValueError: the columns cannot be cut into blocks.
        """
        rows, columns = weight.shape
        block = self.block or columns
        if columns % block:
            raise ValueError(f"{columns} columns cannot be cut into blocks of {block} ({self.name})")
        return weight.float().view(rows, columns // block, block)

    @abstractmethod
    def scales(self, blocks: torch.Tensor, largest: torch.Tensor) -> Scale:
        """Of blocks [..., block].

        Args:
            blocks: float32.
            largest: magnitude in the whole weight, which few formats look at.
        """

    @abstractmethod
    def codes(self, blocks: torch.Tensor, scale: Scale) -> torch.Tensor:
        """The nearest points of the grid, in units of the step and without the zero point taken off."""

    def values(self, codes: torch.Tensor, scale: Scale) -> torch.Tensor:
        """What codes stand for."""
        return (codes if scale.zero is None else codes - scale.zero) * scale.step


def quantize(weight: torch.Tensor, fmt: Format, *, scale_from: torch.Tensor | None = None) -> torch.Tensor:
    """A weight's nearest values in a format.

    Args:
        weight: [rows, columns], floating point.
        fmt: the format.
        scale_from: a weight of the same shape whose scales are taken, such as the dense one of a pruned one.

    Returns:
        [rows, columns], in the type of `weight`.

    Raises:
        ValueError: the columns cannot be cut into blocks, or a value is not finite.
    """
    scale = scales_of(weight if scale_from is None else scale_from, fmt)
    found = fmt.values(fmt.codes(_finite(fmt.blocks(weight), fmt), scale), scale)
    return found.view(weight.shape).to(weight.dtype)


def scales_of(weight: torch.Tensor, fmt: Format) -> Scale:
    """Scales of a weight's blocks, each [rows, blocks, 1].

    Raises:
        ValueError: as `quantize`.
    """
    blocks = _finite(fmt.blocks(weight), fmt)
    return fmt.scales(blocks, blocks.abs().amax() if blocks.numel() else blocks.new_zeros(()))


def straight_through(weight: torch.Tensor, fmt: Format) -> torch.Tensor:
    """`quantize`, with the gradient of the weight as it is: rounding has none."""
    return weight + (quantize(weight.detach(), fmt) - weight).detach()


def _finite(blocks: torch.Tensor, fmt: Format) -> torch.Tensor:
    if not bool(blocks.isfinite().all()):
        raise ValueError(f"a weight that is not finite has no value in {fmt.name}")
    return blocks


def _largest(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.abs().amax(-1, keepdim=True)


def _safe(step: torch.Tensor) -> torch.Tensor:
    """Steps, and 1 for blocks of zeros."""
    return torch.where(step == 0, torch.ones_like(step), step)


@dataclass(frozen=True)
class Integers(Format):
    """Symmetric integers of b bits, 0 on the grid; scales in bfloat16.

    Attributes:
        narrow: codes to ±(2^(b−1) − 1) with the largest magnitude on the last, as the paper has it; otherwise the
            step is 2 max / (2^b − 1), the codes from −2^(b−1) on, as `compressed-tensors` has it. Then the largest
            magnitude has another code with a minus than without.
    """

    narrow: bool = False

    @property
    def top(self) -> int:
        """The largest code."""
        return int(2 ** (self.element_bits - 1) - 1)

    def scales(self, blocks: torch.Tensor, largest: torch.Tensor) -> Scale:
        over = float(self.top) if self.narrow else (2**self.element_bits - 1) / 2
        return Scale(_safe((_largest(blocks) / over).bfloat16().float()))

    def codes(self, blocks: torch.Tensor, scale: Scale) -> torch.Tensor:
        return (blocks / scale.step).round().clamp(-self.top - (not self.narrow), self.top)


@dataclass(frozen=True)
class AffineIntegers(Format):
    """Integers of b bits between a block's least and largest value, 0 among them; scales in bfloat16, integer zero."""

    max_scaled: ClassVar[bool] = False

    def scales(self, blocks: torch.Tensor, largest: torch.Tensor) -> Scale:
        low, high = blocks.amin(-1, keepdim=True).clamp_max(0), blocks.amax(-1, keepdim=True).clamp_min(0)
        step = _safe(((high - low) / (2**self.element_bits - 1)).bfloat16().float())
        bottom = -(2.0 ** (self.element_bits - 1))
        return Scale(step, (bottom - low / step).round().clamp(bottom, -bottom - 1))

    def codes(self, blocks: torch.Tensor, scale: Scale) -> torch.Tensor:
        assert scale.zero is not None
        half = 2 ** (self.element_bits - 1)
        return (blocks / scale.step + scale.zero).round().clamp(-half, half - 1)


@dataclass(frozen=True)
class BlockFloats(Format):
    """HBFP: signed mantissas of b bits under one power of two, the first that is above every magnitude of the block."""

    def scales(self, blocks: torch.Tensor, largest: torch.Tensor) -> Scale:
        exponent = torch.frexp(_largest(blocks)).exponent
        return Scale(_power_of_two(exponent - (self.element_bits - 1)))

    def codes(self, blocks: torch.Tensor, scale: Scale) -> torch.Tensor:
        half = 2 ** (self.element_bits - 1)
        return (blocks / scale.step).round().clamp(-half, half - 1)


@dataclass(frozen=True)
class Minifloat:
    """Floating-point numbers of few bits, without infinities.

    Attributes:
        mantissa: bits of it.
        least: exponent of the smallest normal number.
        largest: number.
        bump: significand from which on a block's largest magnitude takes the next power of two.
    """

    mantissa: int
    least: int
    largest: float
    bump: float

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest numbers, the even of two that are as near; beyond the largest, the largest."""
        step = torch.ldexp(torch.ones_like(x), (torch.frexp(x).exponent - 1).clamp_min(self.least) - self.mantissa)
        return ((x / step).round() * step).clamp(-self.largest, self.largest)


E2M1 = Minifloat(1, 0, E2M1_MAX, 1.75)
E2M3 = Minifloat(3, 0, 7.5, 1.9375)
E4M3 = Minifloat(3, -6, E4M3_MAX, 1.75)


@dataclass(frozen=True)
class Microscaling(Format):
    """OCP's MX: small floats under one power of two for 32 of them."""

    element: Minifloat = E4M3

    def scales(self, blocks: torch.Tensor, largest: torch.Tensor) -> Scale:
        significand, exponent = torch.frexp(_largest(blocks))  # in [½, 1), or 0
        room = math.floor(math.log2(self.element.largest))
        found = exponent - 1 + (2 * significand >= self.element.bump) - room
        return Scale(_power_of_two(torch.where(significand == 0, 0, found)))

    def codes(self, blocks: torch.Tensor, scale: Scale) -> torch.Tensor:
        return self.element.nearest(blocks / scale.step)


@dataclass(frozen=True)
class Float8(Format):
    """FP8 (e4m3) with the largest magnitude of a row on its last number; scales in bfloat16."""

    def scales(self, blocks: torch.Tensor, largest: torch.Tensor) -> Scale:
        return Scale(_safe((_largest(blocks) / E4M3_MAX).bfloat16().float()))

    def codes(self, blocks: torch.Tensor, scale: Scale) -> torch.Tensor:
        return E4M3.nearest(blocks / scale.step)


@dataclass(frozen=True)
class NvFloat4(Format):
    """NVFP4: e2m1 in blocks of 16 whose scales are e4m3, under one float32 for the whole weight."""

    def scales(self, blocks: torch.Tensor, largest: torch.Tensor) -> Scale:
        whole = self.whole(largest)
        local = E4M3.nearest(_largest(blocks) / E2M1_MAX * whole)
        return Scale(_safe(local / whole), whole=whole)

    @staticmethod
    def whole(largest: torch.Tensor) -> torch.Tensor:
        """What all scales are multiplied with before they are rounded, so that the largest is the last of e4m3."""
        found = E4M3_MAX * E2M1_MAX / largest.float().clamp_min(torch.finfo(torch.float32).tiny)
        return torch.where(found.isfinite() & (largest > 0), found, torch.ones_like(found))

    def codes(self, blocks: torch.Tensor, scale: Scale) -> torch.Tensor:
        return E2M1.nearest(blocks / scale.step)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent in float32, within what 8 bits of an exponent hold."""
    return torch.ldexp(torch.ones(exponent.shape), exponent.clamp(-127, 127))


Range = Literal["full", "narrow"]

GROUPS = (128, 64, 32)
"""Columns that may share a scale, where the format leaves it open."""

GROUP = 64


def _integers(bits: int) -> Callable[[str, int, Range], Format]:
    return lambda name, group, range: Integers(name, bits, 16, group, narrow=range == "narrow")


_BY_GROUP: dict[str, Callable[[str, int, Range], Format]] = {
    "int8": _integers(8),
    "int6": _integers(6),
    "int4": _integers(4),
    "int3": _integers(3),
    "int4_affine": lambda name, group, _: AffineIntegers(name, 4, 20, group),
}

_FIXED: dict[str, Format] = {
    "fp8": Float8("fp8", 8, 16, 0),
    "mxfp8": Microscaling("mxfp8", 8, 8, MX_BLOCK, E4M3),
    "mxfp6": Microscaling("mxfp6", 6, 8, MX_BLOCK, E2M3),
    "mxfp4": Microscaling("mxfp4", 4, 8, MX_BLOCK, E2M1),
    "nvfp4": NvFloat4("nvfp4", 4, 8, NV_BLOCK),
    "hbfp8": BlockFloats("hbfp8", 8, 8, MX_BLOCK),
    "hbfp6": BlockFloats("hbfp6", 6, 8, MX_BLOCK),
    "hbfp4": BlockFloats("hbfp4", 4, 8, MX_BLOCK),
}

GROUPED = tuple(_BY_GROUP)
"""Names of formats that leave it open how many columns share a scale."""

FORMATS = (*_BY_GROUP, *_FIXED)
"""Names of all formats."""

_BY_ROW = ("int8",)
"""Formats that have one scale a row unless a group is asked for."""


def format_named(name: str, *, group: int | None = None, range: Range = "full") -> Format:
    """A format by its name.

    Args:
        name: one of `FORMATS`.
        group: columns with one scale, 0 for a row, where the format leaves it open; its usual one when absent.
        range: of symmetric integers.

    Raises:
        ValueError: no such format, or it does not leave that open.
    """
    if name in _FIXED:
        if group is not None or range == "narrow":
            raise ValueError(f"{name} has blocks of its own: leave out the group and the range")
        return _FIXED[name]
    if name not in _BY_GROUP:
        raise ValueError(f"no format {name!r}; there are {', '.join(FORMATS)}")
    if range == "narrow" and name == "int4_affine":
        raise ValueError("int4_affine has a zero point and no narrow range: leave out the range")
    return _BY_GROUP[name](name, (0 if name in _BY_ROW else GROUP) if group is None else group, range)


def largest_group(columns: int) -> int:
    """The largest of the usual groups that divides a row, 0 for the whole row where none does."""
    return next((group for group in GROUPS if columns % group == 0), 0)


def fitted(fmt: Format, columns: int) -> Format:
    """A format with the largest group that divides a row."""
    return replace(fmt, block=largest_group(columns))


def groups_that_fit(widths: Iterable[int]) -> tuple[int, ...]:
    """Those of the usual groups that divide every row."""
    widths = tuple(widths)
    return tuple(group for group in GROUPS if all(columns % group == 0 for columns in widths))
