"""Which first, pruning or quantising: errors of both orders, in the weights and at the output.

Written S→Q for pruning first, Q→S for quantising first. With a mask by magnitude and a max-scaled format, S→Q leaves
two errors with disjoint supports, and is never above their sum. Q→S prunes by the magnitudes of quantised values, among
which there are ties.

Source: Harma et al., "Effective Interplay between Sparsity and Quantization", arXiv 2405.20935.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from allmend.compress.masks import Pattern, keep_mask
from allmend.models.formats import Format, quantize

Score = Callable[[torch.Tensor], torch.Tensor]
"""What each weight of a tensor scores."""


@dataclass(frozen=True)
class Errors:
    """Of one way to compress a weight.

    Attributes:
        weights: ‖ε‖².
        output: tr(ε H εᵀ), over the calibration tokens.
        over_bound: rows whose ‖ε‖ is above ‖ε_q‖ + ‖ε_s‖.
    """

    weights: float
    output: float
    over_bound: int = 0


@dataclass(frozen=True)
class OrderReport:
    """Errors of a weight, each alone and both in either order.

    Attributes:
        quantized, pruned: one step alone.
        sq, qs: both, pruned first or quantised first.
        size: ‖w‖², and at the output tr(w H wᵀ).
        rows: of the weight.
        moved: share of weights of which the two orders' masks think otherwise.
    """

    quantized: Errors
    pruned: Errors
    sq: Errors
    qs: Errors
    size: Errors
    rows: int
    moved: float

    @property
    def gap(self) -> float:
        """Output error of S→Q beside that of the two steps alone: 0 if they were independent."""
        return self.sq.output - self.quantized.output - self.pruned.output


def prune_then_quantize(weight: torch.Tensor, score: Score, pattern: Pattern, fmt: Format) -> torch.Tensor:
    """S→Q: scales are those of what the mask leaves."""
    return quantize(weight * keep_mask(score(weight), pattern), fmt)


def quantize_then_prune(
    weight: torch.Tensor, score: Score, pattern: Pattern, fmt: Format, *, original_decides: bool = False
) -> torch.Tensor:
    """Q→S: the mask is by what quantised values score; `original_decides` between equal ones."""
    found = quantize(weight, fmt)
    return found * keep_mask(score(found), pattern, tie=score(weight) if original_decides else None)


def order_analysis(
    weight: torch.Tensor, hessian: torch.Tensor, pattern: Pattern, fmt: Format, score: Score = torch.abs
) -> OrderReport:
    """Errors of both orders.

    Args:
        weight: [rows, columns].
        hessian: XᵀX [columns, columns] of the calibration tokens.
        pattern: of zeros.
        fmt: of what stays.
        score: of weights; their magnitude by default.
    """
    wide = weight.double()
    keep = keep_mask(score(weight), pattern)
    alone_q = wide - quantize(weight, fmt).double()
    alone_s = wide * ~keep
    both = {
        "sq": wide - prune_then_quantize(weight, score, pattern, fmt).double(),
        "qs": wide - (late := quantize_then_prune(weight, score, pattern, fmt)).double(),
    }
    bound = alone_q.norm(dim=1) + alone_s.norm(dim=1)
    over = {name: int((error.norm(dim=1) > bound * (1 + 1e-9)).sum()) for name, error in both.items()}
    late_keep = keep_mask(score(quantize(weight, fmt)), pattern)
    assert not bool(late[~late_keep].any())
    return OrderReport(
        quantized=_errors(alone_q, hessian),
        pruned=_errors(alone_s, hessian),
        sq=_errors(both["sq"], hessian, over["sq"]),
        qs=_errors(both["qs"], hessian, over["qs"]),
        size=_errors(wide, hessian),
        rows=len(weight),
        moved=float((keep != late_keep).double().mean()),
    )


def output_error(error: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(ε H εᵀ): the squared error of all outputs over the calibration tokens."""
    wide = error.double()
    return float(((wide @ hessian.double()) * wide).sum())


def _errors(error: torch.Tensor, hessian: torch.Tensor, over: int = 0) -> Errors:
    return Errors(float(error.square().sum()), output_error(error, hessian), over)


@dataclass(frozen=True)
class DotProduct:
    """Errors of ⟨x, w⟩ with both sides quantised and w pruned first; `both` = `quantized` + `pruned` − `gap`.

    Attributes:
        quantized: of q(x) with q(w).
        pruned: of x with m ⊙ w.
        both: of q(x) with q(m ⊙ w).
        gap: Σ over pruned i of q(x)_i ε_q(w)_i + ε_q(x)_i w_i.
        bound: on |gap|, the same with magnitudes.
    """

    quantized: float
    pruned: float
    both: float
    gap: float
    bound: float


def dot_product(
    x: torch.Tensor, weight: torch.Tensor, keep: torch.Tensor, of_x: Callable[[torch.Tensor], torch.Tensor], fmt: Format
) -> DotProduct:
    """The errors of one dot product, for a mask with which q(m ⊙ w) = m ⊙ q(w).

    Args:
        x: activations [n].
        weight: [n].
        keep: bool [n].
        of_x: quantises activations.
        fmt: of weights.
    """
    qx, qw = of_x(x).double(), quantize(weight[None], fmt)[0].double()
    both = quantize((weight * keep)[None], fmt)[0].double()
    x, weight = x.double(), weight.double()
    exact, gone = x @ weight, ~keep
    terms = torch.stack([qx * (weight - qw), (x - qx) * weight])[:, gone]
    return DotProduct(
        quantized=float(exact - qx @ qw),
        pruned=float(exact - x @ (weight * keep)),
        both=float(exact - qx @ both),
        gap=float(terms.sum()),
        bound=float(terms.abs().sum()),
    )
