"""‖F‖² of the block of all rd parameters of a module, without forming it: from a few records as they go by."""

import random
from collections.abc import Iterator

import torch

from allmend.influence.gradients import Batch, Source

RECORDS = 64
"""The most whose gradients are kept."""

FEWEST = 16
"""Of a larger number of records, fewer pairs than of as many say too little."""

BYTES = 2**28
"""The most that they may take."""


class NormsOnTheWay:
    """A source that keeps the gradients of a few records, drawn by chance, while others go through it.

    With F = (1/n) Σ g gᵀ, n² ‖F‖² = Σ_i ‖g_i‖⁴ + Σ_{i≠j} ⟨g_i, g_j⟩². The first sum is formed of all records; the
    second is n (n − 1) times the mean over the pairs of those kept, which makes the whole exact where all are, and else
    an unbiased estimate.

    Args:
        source: the gradients.
        seed: of the draw.
        most: records to keep; fewer where they would take more than `BYTES`.
    """

    def __init__(self, source: Source, *, seed: int = 0, most: int = RECORDS) -> None:
        self._source, self._seed, self._most = source, seed, most
        self._kept: dict[str, list[torch.Tensor]] = {}
        self._fourth: dict[str, float] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._source)

    def __iter__(self) -> Iterator[Batch]:
        self._kept, self._fourth = {}, {}
        drawn: set[int] | None = None
        for batch in self._source:
            if drawn is None:
                size = sum(4 * g[0].numel() for g in batch.gradients.values())
                self._count = min(len(self), self._most, BYTES // max(1, size))
                drawn = set(random.Random(self._seed).sample(range(len(self)), self._count))
            chosen = [index for index, place in enumerate(batch.places) if place in drawn]
            for name, g in batch.gradients.items():
                flat = g.flatten(1).to(torch.promote_types(g.dtype, torch.float32))
                norms = flat.square().sum(1).double() if g.device.type != "mps" else flat.square().sum(1).cpu().double()
                self._fourth[name] = self._fourth.get(name, 0.0) + float(norms.square().sum())
                if chosen:
                    self._kept.setdefault(name, []).append(flat[chosen].clone())
            yield batch

    def squared_norm(self, module: str) -> float | None:
        """‖F‖² of a module, once the source was gone through; None where too few records could be kept."""
        n, m = len(self), self._count
        if m < min(n, FEWEST) or module not in self._kept:
            return None
        products = torch.cat(self._kept[module])
        products = products @ products.T
        if products.device.type == "mps":
            products = products.cpu()
        squares = products.double().square()
        pairs = float(squares.sum() - squares.diagonal().sum())
        scale = n * (n - 1) / (m * (m - 1)) if m > 1 else 0.0
        return (self._fourth[module] + scale * pairs) / n**2
