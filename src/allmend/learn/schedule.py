"""When what is learnt: how many steps a round has, their learning rate, and the records of each.

All of it follows from a step's number, so that a run goes on at any step as if it had not stopped.
"""

import math
from collections.abc import Iterator

import torch

from allmend.recipe import Train


def steps_per_round(records: int, settings: Train) -> int:
    """Optimiser steps that a client with so many records takes in a round; at least 1."""
    if settings.local_steps is not None:
        return settings.local_steps
    return max(1, math.ceil((settings.local_epochs or 1.0) * math.ceil(records / settings.batch_size)))


def learning_rate(step: int, total: int, settings: Train) -> float:
    """The learning rate of step `step` (from 0) of `total`: linear warmup, then cosine to 0 or constant."""
    if step < settings.warmup_steps:
        return settings.learning_rate * ((step + 1) / settings.warmup_steps)
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def batches(records: int, batch_size: int, *, seed: int, first: int) -> Iterator[list[int]]:
    """Batches of record indices from the `first` on (from 0), without end: each epoch is a fresh permutation.

    An epoch's last batch is smaller when `batch_size` does not divide the number of records.
    """
    per_epoch = math.ceil(records / batch_size)
    epoch, at = divmod(first, per_epoch)
    while True:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(records, generator=generator).tolist()
        for start in range(at * batch_size, records, batch_size):
            yield order[start : start + batch_size]
        epoch, at = epoch + 1, 0
