"""Federated averaging of what LoRA's factors make, and not of the factors: mean(B A) instead of mean(B) mean(A).

The mean of the members' changes of B A has a higher rank than one adapter has room for. It is cut back to rank r by
its singular value decomposition, which is the nearest matrix of that rank (Eckart and Young 1936); how much of its
square the cut loses is told. The price of exact averaging are messages of the layers' full size, out × in instead of
r (out + in) numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from allmend.federation.strategies.fedavg import FedAvg
from allmend.models.factors import A, B, layers_of_factors
from allmend.models.tensors import Tensors
from allmend.strategy import (
    Client,
    Declaration,
    Layout,
    Reply,
    Seen,
    State,
    Sums,
    Task,
    Turn,
    grouped,
    of_group,
)


@dataclass(frozen=True, kw_only=True)
class FedAvgProduct(FedAvg):
    """W ← cut_r(B A + Σ nᵢ (Bᵢ Aᵢ − B A) / Σ nᵢ), with A [r, in] and B [out, r] of each layer.

    The new factors are B = U √S and A = √S Vᵀ of the r largest singular values. Where fewer are above zero, the rest
    of A goes on in the directions that it had, and its part of B is zero: so does an adapter begin, and it can learn
    there.
    """

    name = "fedavg_product"

    def declare(self) -> Declaration:
        declared = super().declare()
        summed = {name: what for name, what in declared.summed.items() if name != "update"}
        summed["product"] = "change of each layer's product of factors times number of records"
        return replace(declared, summed=summed)

    def layout(self, initial: Tensors, leg: int = 0) -> Layout:
        return {f"product/{layer}": product.shape for layer, product in _products(initial).items()}

    def work(self, task: Task, client: Client) -> Reply:
        trained = self.train(task, client)
        weight = float(client.examples)
        before, after = _products(task.tensors), _products(trained.tensors)
        changes = {layer: ((after[layer] - before[layer]) * weight).float() for layer in before}
        loss = {} if trained.loss is None else {"loss": trained.loss * weight}
        return Reply(grouped("product", changes), {"weight": weight} | loss)

    def combine(self, state: State, turn: Turn, sums: Sums, seen: Mapping[str, Seen]) -> State:
        weight = sums.fact("weight")
        model = of_group("model", state.tensors)
        lost = whole = 0.0
        for layer, product in _products(model).items():
            a, b = model[layer + A], model[layer + B]
            mean = product + sums[f"product/{layer}"] / weight
            factors = factored(mean, a.double())
            model[layer + A], model[layer + B] = factors.a.to(a.dtype), factors.b.to(b.dtype)
            lost, whole = lost + factors.lost, whole + float(mean.square().sum())
        return State(grouped("model", model), {"discarded": lost / whole if whole else 0.0})

    def revealed(self, task: Task, reply: Reply) -> Tensors | None:
        weight, model = reply.summed_facts["weight"], dict(task.tensors)
        for layer, product in _products(task.tensors).items():
            a, b = model[layer + A], model[layer + B]
            factors = factored(product + reply.summed[f"product/{layer}"] / weight, a.double())
            model[layer + A], model[layer + B] = factors.a.to(a.dtype), factors.b.to(b.dtype)
        return model


@dataclass(frozen=True)
class Factors:
    """B A, the nearest to a matrix of its rank.

    Attributes:
        a: [r, in].
        b: [out, r].
        lost: square of what is left out, in the Frobenius norm.
    """

    a: torch.Tensor
    b: torch.Tensor
    lost: float


def factored(product: torch.Tensor, before: torch.Tensor) -> Factors:
    """Factors of rank r of a product [out, in], float64.

    Args:
        product: what is factored.
        before: A as it was, [r, in]: directions for what the product leaves room for.
    """
    rank = before.shape[0]
    u, s, v = torch.linalg.svd(product, full_matrices=False)
    kept = s[:rank]
    root = kept.sqrt()
    a, b = root[:, None] * v[:rank], u[:, :rank] * root
    if len(kept) < rank:  # a layer narrower than the rank
        a = torch.cat([a, a.new_zeros(rank - len(kept), a.shape[1])])
        b = torch.cat([b, b.new_zeros(b.shape[0], rank - len(kept))], dim=1)
    empty = torch.ones(rank, dtype=torch.bool)
    empty[: len(kept)] = kept <= s.max() * 1e-9 if len(s) and float(s.max()) else True
    if empty.any():
        a[empty], b[:, empty] = before[empty], 0.0
    return Factors(a, b, float(s[rank:].square().sum()))


def _products(tensors: Tensors) -> Tensors:
    """B A of each layer, float64 [out, in], by the layer's name.

    Raises:
        ValueError: a tensor is no factor of a LoRA layer.
    """
    layers = layers_of_factors(tensors)
    return {layer: tensors[b].double() @ tensors[a].double() for layer, (a, b) in layers.items()}
