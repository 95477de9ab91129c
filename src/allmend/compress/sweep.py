"""Pruning and quantising in one sweep over the columns, the later ones of which make up for the earlier ones' error.

Column by column, w_j → m_j q(w_j), and the error is spread over the columns that are still to come by the rows of the
Cholesky factor of H⁻¹. Without a mask this is GPTQ, without a format SparseGPT. Masks and scales are taken from weights
as they are when their turn comes, scales from what the mask leaves.

Sources: GPTQ, Frantar et al., arXiv 2210.17323; SparseGPT, Frantar and Alistarh, arXiv 2301.00774.
"""

from dataclasses import dataclass

import torch

from allmend.compress.masks import NofM, Pattern, Unstructured, damped, keep_mask, without_least, zeros
from allmend.models.formats import Format, Scale

COLUMNS = 128
"""Columns whose mask is chosen at once, and whose error is spread over the rest at once."""


@dataclass(frozen=True)
class Swept:
    """A weight after a sweep.

    Attributes:
        weight: [rows, columns], on the format's grid, 0 where the mask is.
        keep: bool [rows, columns].
        scale: of the format, each [rows, blocks, 1]; none without a format.
        dead: inputs that no calibration token has, whose weights went first.
    """

    weight: torch.Tensor
    keep: torch.Tensor
    scale: Scale | None
    dead: int


def prune_and_quantize(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    pattern: Pattern | None,
    fmt: Format | None,
    *,
    damping: float = 0.01,
) -> Swept:
    """The sweep.

    Args:
        weight: [rows, columns], finite.
        hessian: XᵀX [columns, columns] of the calibration tokens.
        pattern: of zeros; a share is of each row, and of each stretch of 128 columns.
        fmt: of what stays.
        damping: added to the diagonal of H, times its mean.

    Raises:
        ValueError: columns cannot be cut into the format's blocks or the pattern's groups.
        torch.linalg.LinAlgError: H is not positive definite with this damping.
    """
    return _Sweep(weight, hessian, pattern, fmt, damping).run()


class _Sweep:
    def __init__(
        self, weight: torch.Tensor, hessian: torch.Tensor, pattern: Pattern | None, fmt: Format | None, damping: float
    ) -> None:
        self.pattern, self.fmt, self.shape, self.dtype = pattern, fmt, weight.shape, weight.dtype
        rows, columns = weight.shape
        if isinstance(pattern, NofM) and columns % pattern.m:
            raise ValueError(f"{columns} columns cannot be cut into groups of {pattern.m}")
        self.block = columns if fmt is None else fmt.blocks(weight).shape[-1]
        precision = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.left = weight.to(precision).clone()
        dead = hessian.diagonal() == 0
        self.left[:, dead] = 0
        self.dead = int(dead.sum())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(hessian, damping)))
        self.upper = torch.linalg.cholesky(inverse, upper=True).to(precision)
        self.found = torch.empty_like(self.left)
        self.keep = torch.ones(rows, columns, dtype=torch.bool)
        self.chosen = 0  # columns whose mask is final
        self.largest = self.left.abs().amax() if weight.numel() else self.left.new_zeros(())
        self.scales: list[Scale] = []

    def run(self) -> Swept:
        columns = self.shape[1]
        for first in range(0, columns, COLUMNS):
            last = min(first + COLUMNS, columns)
            errors = torch.empty_like(self.left[:, first:last])
            if isinstance(self.pattern, Unstructured):
                self._choose(first, last)
            for column in range(first, last):
                if isinstance(self.pattern, NofM) and column % self.pattern.m == 0:
                    self._choose(column, column + self.pattern.m)
                if self.fmt is not None and column % self.block == 0:
                    self.scales.append(self._scale(column))
                own = self.left[:, column]
                new = torch.where(self.keep[:, column], self._snapped(own), 0)
                self.found[:, column] = new
                errors[:, column - first] = (own - new) / self.upper[column, column]
                self.left[:, column:last].addr_(errors[:, column - first], self.upper[column, column:last], alpha=-1)
            self.left[:, last:].addmm_(errors, self.upper[first:last, last:], alpha=-1)
        return Swept(self.found.to(self.dtype), self.keep, self._joined(), self.dead)

    def _choose(self, first: int, last: int) -> None:
        self.keep[:, first:last] = self._mask(first, last)
        self.chosen = last

    def _mask(self, first: int, last: int) -> torch.Tensor:
        """By the weights as they are now; of a share, as many zeros up to each column as it comes to."""
        assert self.pattern is not None
        score = (self.left[:, first:last] / self.upper.diagonal()[first:last]).square()
        if isinstance(self.pattern, NofM):
            return keep_mask(score, self.pattern)
        return without_least(score, zeros(self.pattern.share, last) - zeros(self.pattern.share, first))

    def _scale(self, first: int) -> Scale:
        """Of the block that begins here, from what its mask leaves; where that is still to come, from what it would."""
        assert self.fmt is not None
        last = first + self.block
        keep = self.keep[:, first:last].clone()
        start = max(self.chosen, first)
        if self.pattern is not None and start < last:
            keep[:, start - first :] = self._mask(start, last)
        return self.fmt.scales((self.left[:, first:last] * keep).float(), self.largest.float())

    def _snapped(self, column: torch.Tensor) -> torch.Tensor:
        if self.fmt is None:
            return column
        found = self.fmt.values(self.fmt.codes(column.float()[:, None], self.scales[-1]), self.scales[-1])
        return found[:, 0].to(column.dtype)

    def _joined(self) -> Scale | None:
        if not self.scales:
            return None
        zeros = [scale.zero for scale in self.scales if scale.zero is not None]
        step = torch.stack([scale.step for scale in self.scales], dim=1)
        return Scale(step, torch.stack(zeros, dim=1) if zeros else None, self.scales[0].whole)
