"""Gradients that are kept in memory once they are formed, and the count of passes over them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from allmend.influence.gradients import Batch, Given, Source


def keep(source: Source) -> Given:
    """All gradients of a source, from one pass over it: n r d numbers for each module.

    Raises:
        ValueError: there are no records.
    """
    gradients: dict[str, torch.Tensor] = {}
    losses = torch.zeros(len(source), dtype=torch.float64)
    for batch in source:
        places = torch.tensor(batch.places)
        losses[places] = batch.losses
        for name, g in batch.gradients.items():
            if name not in gradients:
                gradients[name] = g.new_zeros(len(source), *g.shape[1:])
            gradients[name][places.to(g.device)] = g
    if not gradients:
        raise ValueError("there are no records")
    return Given(gradients, losses)


@dataclass
class Counted:
    """A source that counts how often it is gone through.

    Attributes:
        source: the gradients.
        passes: so far.
    """

    source: Source
    passes: int = 0

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        return iter(self.source)
