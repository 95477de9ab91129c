"""What every benchmark prints: the machine, and times of two things taken in turns with their spread."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch


def machine() -> str:
    """The machine in one line."""
    memory = psutil.virtual_memory().total / 1e9
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GB, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}"
    )


@dataclass(frozen=True)
class Rates:
    """Work per second of repeated runs of one thing."""

    name: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        median, low, high = (_rounded(value) for value in (self.median, min(self.values), max(self.values)))
        return f"{self.name}: median {median} per second ({low} to {high}, {len(self.values)} runs)"


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def interleaved(
    first: tuple[str, Callable[[], float]], second: tuple[str, Callable[[], float]], *, runs: int
) -> tuple[Rates, Rates]:
    """Run two things in turns, `runs` times each after one warm-up, the order changing each time.

    Args:
        first: name and function that does the work once and returns how much it was (tokens, questions).
        second: the same.
        runs: counted runs of each.
    """
    values: dict[str, list[float]] = {first[0]: [], second[0]: []}
    for number in range(runs + 1):
        pair = (first, second) if number % 2 else (second, first)
        for name, work in pair:
            start = time.perf_counter()
            amount = work()
            if number:
                values[name].append(amount / (time.perf_counter() - start))
    a, b = (Rates(name, tuple(values[name])) for name in (first[0], second[0]))
    return a, b


def ratios(a: Rates, b: Rates) -> str:
    """The ratio of two things run in turns, pair by pair."""
    pairs = [x / y for x, y in zip(a.values, b.values, strict=True)]
    return f"{a.name} / {b.name}: median {statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})"
