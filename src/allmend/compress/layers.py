"""One weight's way: what it is to become, how many bytes that is, and the best way there that its inputs tell.

Methods: `round` gives every weight its nearest value; a mask, where there is one, is by magnitude. `wanda` masks by
|w| ‖x‖ and rounds. `sparsegpt` prunes in a sweep and rounds afterwards, `sweep` does both in one: without a mask that
is GPTQ. The damping of a sweep is chosen for each weight by the error on windows that the sweep has not seen, since
with few tokens the error on its own windows says little; rounding is always a candidate.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from allmend.compress.calibration import Products
from allmend.compress.masks import NofM, Pattern, keep_mask, kept, magnitude, wanda
from allmend.compress.order import Score, output_error
from allmend.compress.sweep import Swept, prune_and_quantize
from allmend.models.formats import AffineIntegers, Format, Integers, NvFloat4, Scale, quantize, scales_of

Method: TypeAlias = Literal["round", "wanda", "sparsegpt", "sweep"]
METHODS: tuple[Method, ...] = ("round", "wanda", "sparsegpt", "sweep")

Order: TypeAlias = Literal["sq", "qs"]
"""Pruned first, or quantised first."""

DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Times the mean of H's diagonal."""

HALF = 16
"""Bits of a weight that keeps bfloat16."""


@dataclass(frozen=True)
class Option:
    """What a weight is to become.

    Attributes:
        fmt: of its values; bfloat16 where there is none.
        pattern: of its zeros.
    """

    fmt: Format | None
    pattern: Pattern | None = None

    def bytes(self, shape: tuple[int, int]) -> int:
        """That the weight [rows, columns] takes in a file, exactly, without names and the note of its shape."""
        return sum(self._parts(shape))

    def _parts(self, shape: tuple[int, int]) -> Iterator[int]:
        rows, columns = shape
        bits = HALF if self.fmt is None else self.fmt.element_bits
        if self.pattern is None:
            by_words = isinstance(self.fmt, Integers | AffineIntegers) and not (bits == 8 and not self.fmt.block)
            yield rows * (_words(columns * bits) if by_words else columns * bits // 8)
        else:
            values = kept(self.pattern, shape) * bits
            yield values // 8 if self.fmt is None else _words(values)
            in_fours = self.pattern == NofM(2, 4)
            yield _words(rows * columns // 4 * 3) if in_fours else rows * -(-columns // 8)
        if self.fmt is not None:
            blocks = columns // (self.fmt.block or columns)
            affine = isinstance(self.fmt, AffineIntegers)
            yield rows * blocks * (2 if affine else self.fmt.scale_bits // 8)
            if affine:
                yield blocks * _words(rows * bits)
            if isinstance(self.fmt, NvFloat4):
                yield 4


def _words(bits: int) -> int:
    """Bytes of as many words of 32 bits as these bits need."""
    return -(-bits // 32) * 4


@dataclass(frozen=True)
class Inputs:
    """What is known of a layer's inputs.

    Attributes:
        seen: products of the windows that a sweep learns from.
        held_out: of those that it is judged on.
    """

    seen: Products
    held_out: Products


@dataclass(frozen=True)
class Compressed:
    """A weight after its way.

    Attributes:
        weight: [rows, columns], its values.
        keep: bool [rows, columns]; none where all stay.
        scale: of the format; none without one.
        method: that was taken.
        damping: of its sweep; none without one.
        seen, held_out: output error over the size of the output, on the windows of either sort; none without inputs.
        dead: inputs that no token has.
    """

    weight: torch.Tensor
    keep: torch.Tensor | None
    scale: Scale | None
    method: Method
    damping: float | None = None
    seen: float | None = None
    held_out: float | None = None
    dead: int = 0


def compress_weight(
    weight: torch.Tensor,
    option: Option,
    inputs: Inputs | None = None,
    *,
    methods: Sequence[Method] = METHODS,
    dampings: Sequence[float] = DAMPINGS,
    order: Order = "sq",
) -> Compressed:
    """The best of some methods by the error on windows that none has seen; on equal errors the first.

    Args:
        weight: [rows, columns], finite.
        option: what it is to become.
        inputs: of its layer; without them it is rounded, and pruned by magnitude.
        methods: candidates, in the order of preference.
        dampings: candidates of a sweep.
        order: of pruning and rounding; a sweep has none.

    Raises:
        ValueError: a sweep is asked to quantise first; all methods need inputs, and there are none; columns cannot be
            cut into blocks or groups.
    """
    if order == "qs" and not {"round", "wanda"}.issuperset(methods):
        raise ValueError("a sweep prunes and quantises at once, and has no order: take round or wanda")
    if option.fmt is None and option.pattern is None:
        return Compressed(weight.bfloat16().to(weight.dtype), None, None, "round")
    if inputs is None:
        if "round" not in methods:
            raise ValueError(f"{', '.join(methods)}: each needs text to calibrate on")
        return _rounded(weight, option, "round", magnitude, order)
    candidates = [judged(one, weight, inputs) for one in _candidates(weight, option, inputs, methods, dampings, order)]
    return min(candidates, key=lambda one: one.held_out or 0.0)


def _candidates(
    weight: torch.Tensor,
    option: Option,
    inputs: Inputs,
    methods: Sequence[Method],
    dampings: Sequence[float],
    order: Order,
) -> Iterator[Compressed]:
    norms = (inputs.seen + inputs.held_out).norms
    for method in methods:
        match method:
            case "round":
                yield _rounded(weight, option, method, magnitude, order)
            case "wanda" if option.pattern is not None:
                yield _rounded(weight, option, method, lambda some: wanda(some, norms), order)
            case "sparsegpt" if option.pattern is not None and option.fmt is not None:
                for damping in dampings:
                    swept = prune_and_quantize(weight, inputs.seen.matrix, option.pattern, None, damping=damping)
                    scale = scales_of(swept.weight, option.fmt)
                    values = quantize(swept.weight, option.fmt)
                    yield _swept(Swept(values, swept.keep, scale, swept.dead), option, method, damping)
            case "sweep":
                for damping in dampings:
                    swept = prune_and_quantize(weight, inputs.seen.matrix, option.pattern, option.fmt, damping=damping)
                    yield _swept(swept, option, method, damping)
            case _:
                pass


def _rounded(weight: torch.Tensor, option: Option, method: Method, score: Score, order: Order) -> Compressed:
    fmt, pattern = option.fmt, option.pattern
    if order == "qs" and fmt is not None and pattern is not None:
        found = quantize(weight, fmt)
        keep = keep_mask(score(found), pattern)
        return Compressed(found * keep, keep, scales_of(weight, fmt), method)
    late = None if pattern is None else keep_mask(score(weight), pattern)
    masked = weight if late is None else weight * late
    if fmt is None:
        return Compressed(masked.bfloat16().to(weight.dtype), late, None, method)
    return Compressed(quantize(masked, fmt), late, scales_of(masked, fmt), method)


def _swept(found: Swept, option: Option, method: Method, damping: float) -> Compressed:
    keep = None if option.pattern is None else found.keep
    values = found.weight if option.fmt is not None else found.weight.bfloat16().to(found.weight.dtype)
    return Compressed(values, keep, found.scale, method, damping, dead=found.dead)


def judged(found: Compressed, weight: torch.Tensor, inputs: Inputs) -> Compressed:
    """With its errors at the output, as shares of the output's own size."""
    shares = [
        output_error(weight - found.weight, some.matrix) / max(output_error(weight, some.matrix), 1e-300)
        for some in (inputs.seen, inputs.held_out)
    ]
    return Compressed(
        found.weight, found.keep, found.scale, found.method, found.damping, shares[0], shares[1], found.dead
    )
