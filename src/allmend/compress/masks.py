"""Masks: which weights stay, by what they score, in which pattern.

Sources: magnitude pruning, Han et al. 2015; Wanda, Sun et al., arXiv 2306.11695; optimal brain surgeon, Hassibi and
Stork 1993, as SparseGPT takes it, Frantar and Alistarh, arXiv 2301.00774.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch


@dataclass(frozen=True)
class Unstructured:
    """A share of zeros, anywhere.

    Attributes:
        share: of weights that go, in [0, 1); of n, ⌊share · n⌋.
        per: whether they are counted row by row or over the whole tensor.
    """

    share: float
    per: Literal["row", "tensor"] = "row"

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"a share of zeros lies in [0, 1), got {self.share}")
        if self.per not in ("row", "tensor"):
            raise ValueError(f"zeros are counted per row or tensor, got {self.per!r}")


@dataclass(frozen=True)
class NofM:
    """Of each M neighbours in a row, N stay."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise ValueError(f"of {self.m} neighbours {self.n} cannot stay")

    @property
    def share(self) -> float:
        """Of weights that go."""
        return 1 - self.n / self.m


Pattern: TypeAlias = Unstructured | NofM


def pattern_named(text: str) -> Pattern | None:
    """A pattern from what the command line calls it: `none`, a share such as `0.5`, or `2:4`.

    Raises:
        ValueError: it is neither.
    """
    try:
        if text == "none":
            return None
        if ":" in text:
            n, m = text.split(":")
            return NofM(int(n), int(m))
        return Unstructured(float(text))
    except ValueError as error:
        raise ValueError(
            f"{text!r} is no sparsity: give a share such as 0.5, a pattern such as 2:4, or none"
        ) from error


def keep_mask(score: torch.Tensor, pattern: Pattern, *, tie: torch.Tensor | None = None) -> torch.Tensor:
    """Which weights stay: those that score most.

    Args:
        score: [rows, columns], not negative.
        pattern: how many, and where they are counted.
        tie: [rows, columns], larger for those that stay where scores are equal; then the later ones do.

    Returns:
        bool [rows, columns].

    Raises:
        ValueError: the columns cannot be cut into groups of M.
    """
    rows, columns = score.shape
    match pattern:
        case NofM(n, m):
            if columns % m:
                raise ValueError(f"{columns} columns cannot be cut into groups of {m}")
            shape, drop = (rows * columns // m, m), m - n
        case Unstructured(share, "row"):
            shape, drop = (rows, columns), zeros(share, columns)
        case Unstructured(share, _):
            shape, drop = (1, rows * columns), zeros(share, rows * columns)
    keep = without_least(score.reshape(shape), drop, tie=None if tie is None else tie.reshape(shape))
    return keep.view(rows, columns)


def without_least(score: torch.Tensor, drop: int, *, tie: torch.Tensor | None = None) -> torch.Tensor:
    """Which of each row [rows, columns] stay if so many of the least go; equal ones by their ties, then the earlier."""
    if tie is None:
        order = score.argsort(dim=1, stable=True)
    else:
        first = tie.argsort(dim=1, stable=True)
        order = first.gather(1, score.gather(1, first).argsort(dim=1, stable=True))
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, order[:, :drop], False)


def zeros(share: float, n: int) -> int:
    """⌊share · n⌋ of the share as it was written: 0.29 · 100 is 28.999… in floating point."""
    return int(share * n + 1e-9)


def kept(pattern: Pattern | None, shape: tuple[int, int]) -> int:
    """How many weights of a tensor stay."""
    rows, columns = shape
    match pattern:
        case None:
            return rows * columns
        case NofM(n, m):
            return rows * columns * n // m
        case Unstructured(share, "row"):
            return rows * (columns - zeros(share, columns))
        case Unstructured(share, _):
            return rows * columns - zeros(share, rows * columns)


def magnitude(weight: torch.Tensor) -> torch.Tensor:
    """|w|."""
    return weight.abs()


def wanda(weight: torch.Tensor, input_norm: torch.Tensor) -> torch.Tensor:
    """|w_ij| ‖x_j‖ with the norm of each input over the calibration tokens [columns]."""
    return weight.abs() * input_norm


def obs(weight: torch.Tensor, hessian: torch.Tensor, *, damping: float = 0.01) -> torch.Tensor:
    """w_ij² / [H⁻¹]_jj: what the output's error grows by if a weight goes and the others of its row make up for it.

    Args:
        weight: [rows, columns].
        hessian: XᵀX [columns, columns] of the calibration tokens.
        damping: added to the diagonal, times its mean.
    """
    wide = damped(hessian, damping)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide))
    return weight.square() / inverse.diagonal().to(weight.dtype)


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """H + λ mean(diag H) I in double precision; inputs that are always 0 get 1, so that there is an inverse."""
    wide = hessian.double().clone()
    diagonal = wide.diagonal()
    mean = float(diagonal.mean())
    diagonal += torch.where(diagonal == 0, 1.0 if mean == 0 else mean, damping * mean)
    return wide
