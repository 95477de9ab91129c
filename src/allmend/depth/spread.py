"""Times of repeated runs in three numbers, and waiting for a device before the clock is read."""

import statistics
from collections.abc import Sequence

import torch

from allmend.results import Spread


def spread(values: Sequence[float]) -> Spread:
    """Median and range."""
    return Spread(median=statistics.median(values), low=min(values), high=max(values), n=len(values))


def ratio(a: Sequence[float], b: Sequence[float]) -> Spread:
    """Median and range of the ratio of two things, run by run: what a run has in common cancels."""
    return spread([one / other for one, other in zip(a, b, strict=True)])


def finish(device: torch.device) -> None:
    """Wait until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
