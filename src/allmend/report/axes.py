"""Axes: from values to pixels, and where the ticks stand."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from allmend.report.numbers import Format, tick


@dataclass(frozen=True)
class Axis:
    """What an axis says.

    Attributes:
        label: quantity and unit.
        form: how a tick is written.
        ticks: where ticks stand; None chooses round values.
        ordinal: ticks stand at equal distances whatever their values (1, 3, 10 copies).
        log: equal factors have equal distances; ticks are powers of ten where none are given. Values of 0 and below
            have no place on it.
        low: lowest value shown; None takes it from the data. Likewise `high`.
        reference: a value whose line is drawn stronger (no difference, no gap).
        limit: a value that none can exceed, whose line is dashed.
    """

    label: str
    form: Format = tick
    ticks: tuple[float, ...] | None = None
    ordinal: bool = False
    low: float | None = None
    high: float | None = None
    reference: float | None = None
    limit: float | None = None
    log: bool = False


@dataclass(frozen=True)
class Scale:
    """An axis on the page: values of [`low`, `high`] lie on [`start`, `end`] px."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    ordinal: bool = False
    log: bool = False

    def has(self, value: float) -> bool:
        """Whether a value has a place here."""
        return math.isfinite(value) and (value > 0 or not self.log)

    def __call__(self, value: float) -> float:
        """Pixel of a value that has a place."""
        if self.ordinal:
            place = (self.ticks.index(value) + 0.5) / len(self.ticks)
        elif self.log:
            place = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            place = (value - self.low) / (self.high - self.low)
        return self.start + place * (self.end - self.start)


def round_ticks(low: float, high: float, about: int = 5) -> tuple[float, ...]:
    """Round values (1, 2 or 5 times a power of ten apart) that cover [low, high], about that many."""
    if not high > low:
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    rough = (high - low) / max(1, about - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(float(f"{i * step:.12g}") for i in range(first, last + 1))


def scale(axis: Axis, values: Iterable[float], start: float, end: float, about: int = 5, tight: bool = False) -> Scale:
    """Lay an axis over the values it has to show; values that have no place on it are ignored.

    A tight scale ends at the data and has its ticks inside; otherwise it ends at ticks, or, if it is logarithmic, at
    powers of ten.
    """
    if axis.ordinal and axis.ticks:
        return Scale(0, 1, start, end, axis.ticks, ordinal=True)
    shown = [value for value in values if math.isfinite(value) and (value > 0 or not axis.log)]
    shown += [value for value in (axis.low, axis.high, axis.reference, axis.limit) if value is not None]
    shown = shown or list(axis.ticks or ((0.1, 1.0) if axis.log else (0.0, 1.0)))
    low = min(shown) if axis.low is None else axis.low
    high = max(shown) if axis.high is None else axis.high
    if axis.ticks:
        low, high = min(low, axis.ticks[0]), max(high, axis.ticks[-1])
        if low == high:
            low, high = (low / 2, high * 2) if axis.log else (low - 1, high + 1)
        return Scale(low, high, start, end, axis.ticks, log=axis.log)
    if axis.log:
        return _logarithmic(low, high, start, end, about)
    ticks = round_ticks(low, high, about)
    if tight and high > low:
        return Scale(low, high, start, end, tuple(tick for tick in ticks if low <= tick <= high))
    return Scale(ticks[0], ticks[-1], start, end, ticks)


def _logarithmic(low: float, high: float, start: float, end: float, about: int) -> Scale:
    """From a power of ten to another, with about as many ticks at equal factors; one is at 1 if that is between."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    step = max(1, round((last - first) / max(1, about - 1)))
    ticks = tuple(float(f"1e{i}") for i in range(first, last + 1) if i % step == 0)
    return Scale(float(f"1e{first}"), float(f"1e{last}"), start, end, ticks, log=True)


def fitting(ticks: Sequence[float], room: int) -> set[float]:
    """Those of many ticks that get a label: every k-th, so that at most `room` do."""
    step = max(1, math.ceil(len(ticks) / max(1, room)))
    return set(ticks[::step])
