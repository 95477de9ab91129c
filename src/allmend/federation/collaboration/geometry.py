"""What lies between two adapters: of their factors, or of the products that the factors make.

A LoRA adapter is a product B A of two factors, and (B Q, Q⁻¹ A) is the same adapter. Means of factors depend on which
of them each member happens to hold: mean(B) mean(A) = mean(B A) − ¼ (B_i − B_j)(A_i − A_j). The mean of products does
not, and is itself a LoRA of twice the rank, ½ [B_i B_j] [A_i; A_j].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from allmend.federation.collaboration.pull import pull, pull_weights
from allmend.models.factors import layers_of_factors
from allmend.models.tensors import Tensors


@dataclass(frozen=True)
class Pulled:
    """Models after a pull.

    Attributes:
        models: in their order.
        lost: share of the squared size of all products that no room was for in factors of their rank.
    """

    models: list[Tensors]
    lost: float = 0.0


class Geometry(Protocol):
    """How models are mixed."""

    def midpoint(self, one: Tensors, other: Tensors) -> Tensors:
        """What two members take their gradients at."""
        ...

    def mean(self, models: Sequence[Tensors]) -> Tensors:
        """The mean of all models, one at least."""
        ...

    def pulled(self, models: Sequence[Tensors], w: torch.Tensor, strength: float) -> Pulled:
        """Every model after an implicit pull towards its neighbours in the graph w [n, n]."""
        ...


class Factors:
    """Parameters as they are, one by one."""

    def midpoint(self, one: Tensors, other: Tensors) -> Tensors:
        return {name: (tensor + other[name]) / 2 for name, tensor in one.items()}

    def mean(self, models: Sequence[Tensors]) -> Tensors:
        return {name: torch.stack([model[name] for model in models]).mean(0) for name in models[0]}

    def pulled(self, models: Sequence[Tensors], w: torch.Tensor, strength: float) -> Pulled:
        names = list(models[0])
        found: list[Tensors] = [{} for _ in models]
        for name in names:
            rows = torch.stack([model[name].flatten() for model in models])
            for model, row in zip(found, pull(rows, w, strength), strict=True):
                model[name] = row.view_as(models[0][name])
        return Pulled(found)


class Products:
    """What the factors of each layer make."""

    def midpoint(self, one: Tensors, other: Tensors) -> Tensors:
        found = {}
        for a, b in layers_of_factors(one).values():
            found[a] = torch.cat([one[a], other[a]])
            found[b] = torch.cat([one[b], other[b]], dim=1) / 2
        return {name: found[name] for name in one}

    def mean(self, models: Sequence[Tensors]) -> Tensors:
        shares = torch.full((len(models),), 1 / len(models))
        return self._mixed(models, shares, models[0])[0]

    @staticmethod
    def _mixed(models: Sequence[Tensors], shares: torch.Tensor, like: Tensors) -> tuple[Tensors, float, float]:
        """Products in these shares, as factors of their rank; the square that has no room, and the whole."""
        found, lost, whole = dict(like), 0.0, 0.0
        for a, b in layers_of_factors(like).values():
            mixed = mixture_of_products([(model[a], model[b]) for model in models], shares, like=like[a])
            found[a], found[b] = mixed.a.to(like[a].dtype), mixed.b.to(like[b].dtype)
            lost, whole = lost + mixed.lost, whole + mixed.whole
        return found, lost, whole

    def pulled(self, models: Sequence[Tensors], w: torch.Tensor, strength: float) -> Pulled:
        if strength == 0 or not bool((w.coalesce().values() if w.is_sparse else w).any()):
            return Pulled([dict(model) for model in models])
        weights = pull_weights(w.to_dense() if w.is_sparse else w, strength)
        mixed = [self._mixed(models, shares, model) for shares, model in zip(weights, models, strict=True)]
        lost, whole = sum(part for _, part, _ in mixed), sum(part for _, _, part in mixed)
        return Pulled([model for model, _, _ in mixed], lost / whole if whole else 0.0)


GEOMETRIES: Mapping[str, Geometry] = {"product": Products(), "factors": Factors()}


@dataclass(frozen=True)
class Mixed:
    """B A, the nearest of its rank to a weighted sum of products; `lost` of its `whole` square has no room in it."""

    a: torch.Tensor
    b: torch.Tensor
    lost: float
    whole: float


def mixture_of_products(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]], shares: torch.Tensor, *, like: torch.Tensor
) -> Mixed:
    """Σ share · B A over several layers' factors, as factors of the rank of `like`, in double precision.

    The sum is never formed: it is [√share B …] [A …; …] with as many columns as all ranks together, whose singular
    values are those of the product of two small triangular matrices. New factors are balanced, B = U √S and A = √S Vᵀ.
    Where fewer singular values than the rank are above zero, the rest of A goes on in the directions of `like`, and its
    part of B is zero: it can learn there.

    Args:
        factors: A [r, in] and B [out, r] of each.
        shares: of each, none negative.
        like: A [r, in] as it was.
    """
    rank = like.shape[0]
    kept = [(a.double(), share * b.double()) for (a, b), share in zip(factors, shares, strict=True) if float(share) > 0]
    left, right = torch.cat([b for _, b in kept], dim=1), torch.cat([a for a, _ in kept])
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    room = min(rank, len(s))
    root = s[:room].sqrt()
    a, b = like.double().clone(), like.new_zeros(left.shape[0], rank, dtype=torch.float64)
    alive = s[:room] > s[:1] * 1e-9
    a[:room][alive] = (root[:, None] * (vh[:room] @ q_right.T))[alive]
    b[:, :room][:, alive] = ((q_left @ u[:, :room]) * root)[:, alive]
    return Mixed(a, b, float(s[rank:].square().sum()), float(s.square().sum()))
