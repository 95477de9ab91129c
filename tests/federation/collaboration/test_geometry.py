"""Means of adapters against dense products, and what does not depend on the factors that a member happens to hold."""

import pytest
import torch

from allmend.federation.collaboration.geometry import Factors, Products, mixture_of_products
from allmend.federation.collaboration.pull import pull, pull_weights
from allmend.models.tensors import Tensors

from .test_graph import graph

RANK, WIDE, HIGH = 3, 11, 7
A, B = "layer.lora_A.weight", "layer.lora_B.weight"


def adapter(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    sizes = {A: (RANK, WIDE), B: (HIGH, RANK)}
    return {name: torch.randn(*size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}


def product(model: Tensors) -> torch.Tensor:
    return model[B] @ model[A]


def turned(model: Tensors, seed: int = 9) -> Tensors:
    """The same adapter in other factors."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(RANK, RANK, generator=generator, dtype=torch.float64))[0]
    return {A: q.T @ model[A], B: model[B] @ q}


def cut(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The nearest matrix of a rank (Eckart and Young)."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def test_the_midpoint_of_products_is_exact_and_that_of_factors_is_off_by_a_quarter() -> None:
    one, other = adapter(1), adapter(2)
    mean = (product(one) + product(other)) / 2

    assert torch.allclose(product(Products().midpoint(one, other)), mean)
    off = (one[B] - other[B]) @ (one[A] - other[A]) / 4
    assert torch.allclose(product(Factors().midpoint(one, other)), mean - off)


def test_only_products_do_not_mind_which_factors_there_are() -> None:
    one, other = adapter(1), adapter(2)
    w = torch.ones(2, 2).fill_diagonal_(0)
    for geometry, same in ((Products(), True), (Factors(), False)):
        found, again = (geometry.pulled([model, other], w, 0.7).models[1] for model in (one, turned(one)))
        assert torch.allclose(product(found), product(again), atol=1e-5) == same


def test_beside_one_a_both_geometries_have_the_same_midpoint_mean_and_pull() -> None:
    a, models, w = adapter(9)[A], [adapter(seed) for seed in range(4)], graph(4)
    shared = [{A: a, B: model[B]} for model in models]
    alone = [{B: model[B]} for model in models]

    def close(products: Tensors, factors: Tensors) -> None:
        assert torch.allclose(product(products), factors[B] @ a)

    close(Products().midpoint(*shared[:2]), Factors().midpoint(*alone[:2]))
    close(Products().mean(shared), Factors().mean(alone))
    pulled = Products().pulled(shared, w, 0.8)
    assert pulled.lost == pytest.approx(0, abs=1e-12)
    for products, factors in zip(pulled.models, Factors().pulled(alone, w, 0.8).models, strict=True):
        close(products, factors)


@pytest.mark.parametrize("members", [2, 3, 6])  # of 6 × 3 components, more than the layer has
def test_a_pull_of_products_is_the_nearest_of_its_rank_to_the_pulled_products(members: int) -> None:
    models, w = [adapter(seed) for seed in range(members)], graph(members)
    dense = pull(torch.stack([product(model).flatten() for model in models]), w, 0.8).view(-1, HIGH, WIDE)

    found = Products().pulled(models, w, 0.8)

    lost = 0.0
    for model, whole in zip(found.models, dense, strict=True):
        assert torch.allclose(product(model), cut(whole, RANK), atol=1e-9)
        assert torch.allclose(model[A] @ model[A].T, model[B].T @ model[B], atol=1e-9)  # balanced
        lost += float((whole - cut(whole, RANK)).square().sum())
    assert found.lost == pytest.approx(lost / float(dense.square().sum()))


def test_a_mean_is_that_of_all_products_or_factors() -> None:
    models = [adapter(seed) for seed in range(4)]
    whole = torch.stack([product(model) for model in models]).mean(0)

    assert torch.allclose(product(Products().mean(models)), cut(whole, RANK), atol=1e-9)
    assert torch.allclose(Factors().mean(models)[A], torch.stack([model[A] for model in models]).mean(0))
    assert torch.allclose(product(Products().mean(models[:1])), product(models[0]))


def test_what_a_mean_has_no_use_for_can_still_learn() -> None:
    """Where products vanish, A goes on in the directions that it had, and B is zero, as an adapter begins."""
    start = {A: adapter(1)[A], B: torch.zeros(HIGH, RANK, dtype=torch.float64)}

    found = Products().mean([start, start])

    assert torch.equal(found[A], start[A])
    assert not found[B].any()
    thin = {A: start[A], B: start[B].clone()}
    thin[B][:, 0] = 1.0
    found = Products().mean([thin, thin])
    assert torch.allclose(product(found), product(thin))
    assert all(found[A].norm(dim=1) > 0)


def test_without_neighbours_nothing_moves() -> None:
    models = [adapter(seed) for seed in range(3)]
    for geometry in (Products(), Factors()):
        for w, strength in ((torch.zeros(3, 3), 0.9), (graph(3), 0.0)):
            found = geometry.pulled(models, w, strength).models
            assert all(
                torch.equal(one[name], other[name]) for one, other in zip(found, models, strict=True) for name in one
            )


def test_shares_of_nothing_are_left_out() -> None:
    one, other = adapter(1), adapter(2)
    shares = pull_weights(torch.zeros(2, 2), 1.0)[0]

    found = mixture_of_products([(one[A], one[B]), (other[A] * torch.nan, other[B])], shares, like=one[A])

    assert torch.allclose(found.b @ found.a, product(one))
    assert found.lost == pytest.approx(0, abs=1e-12)
