"""Gradients of records no longer than a bound, so that no record counts for more than that in a sum."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from allmend.influence.gradients import Batch, Source


@dataclass
class Clipped:
    """A source whose gradients are scaled down, module by module, to a norm of `norm` at most.

    So n records have Σ‖g‖² ≤ n c² in each module, which is the trace of Σ gᵀg. What is short enough stays as it is, bit
    for bit.

    Attributes:
        source: the gradients.
        norm: c.
        count: gradients of a record and a module that were scaled down when the source was last gone through.
    """

    source: Source
    norm: float
    count: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if not self.norm > 0:
            raise ValueError(f"the largest norm must be above 0, got {self.norm}")

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Batch]:
        self.count = 0
        for batch in self.source:
            yield Batch(batch.places, {name: self._short(g) for name, g in batch.gradients.items()}, batch.losses)

    def _short(self, g: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(g.dtype, torch.float32)
        norms = torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=wide)
        if not (longer := int((norms > self.norm).sum())):
            return g
        self.count += longer
        factors = torch.where(norms > self.norm, self.norm / norms, torch.ones_like(norms))
        return (g * factors.view(-1, *[1] * (g.dim() - 1))).to(g.dtype)
