"""What every benchmark prints: the machine, and times of two things taken in turns with their spread."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from allmend.results import Estimate


def machine() -> str:
    """The machine in one line."""
    memory = psutil.virtual_memory().total / 1e9
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GB, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}"
    )


def interval_of(estimate: Estimate) -> str:
    """A value with its interval, where it has one."""
    low, high = estimate.low, estimate.high
    return f"{estimate.value:+.3f}" + (f" ({low:+.3f} to {high:+.3f})" if low is not None else "")


def with_data(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """A benchmark's options, with `--data` and `--threads` among them; where there are no data it ends here."""
    parser.add_argument("--data", type=Path, default=os.environ.get("ALLMEND_DATA"), help="folder with medquad/")
    parser.add_argument("--threads", type=int, help="of torch")
    options = parser.parse_args()
    if options.data is None:
        print("No data: name a folder with --data or ALLMEND_DATA. Nothing was measured.")
        raise SystemExit(0)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.data = Path(options.data)
    return options


FIGURES = "ALLMEND_FIGURES"
"""The environment variable that names the file in which `_table.py` gathers figures."""


def figure(what: str, value: str) -> None:
    """Print a result, one row of the table that `make bench` makes.

    Args:
        what: what was measured, on what, against what.
        value: with its unit and spread.
    """
    print(f"{what}: {value}", flush=True)
    if path := os.environ.get(FIGURES):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"what": what, "value": value}) + "\n")


@dataclass(frozen=True)
class Rates:
    """Work per second of repeated runs of one thing."""

    name: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{self.name}: median {spread(self.values)} per second ({len(self.values)} runs)"


def spread(values: Sequence[float]) -> str:
    """Median and range: `4.31 (4.02 to 4.5)`."""
    median, low, high = map(_rounded, (statistics.median(values), min(values), max(values)))
    return f"{median} ({low} to {high})" if len(values) > 1 else median


def times(a: Rates, b: Rates) -> str:
    """How many times as fast the first is as the second, and both rates: what two things run in turns come to."""
    pairs = [x / y for x, y in zip(a.values, b.values, strict=True)]
    return f"{spread(pairs)} times: {_rounded(a.median)} against {_rounded(b.median)} a second"


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def interleaved(*jobs: tuple[str, Callable[[], float]], runs: int) -> tuple[Rates, ...]:
    """Run things in turns, `runs` times each after one warm-up, the order changing each time.

    Args:
        jobs: name and function that does the work once and returns how much it was (tokens, questions).
        runs: counted runs of each.
    """
    values: dict[str, list[float]] = {name: [] for name, _ in jobs}
    for number in range(runs + 1):
        for name, work in jobs if number % 2 else reversed(jobs):
            start = time.perf_counter()
            amount = work()
            if number:
                values[name].append(amount / (time.perf_counter() - start))
    return tuple(Rates(name, tuple(values[name])) for name, _ in jobs)
