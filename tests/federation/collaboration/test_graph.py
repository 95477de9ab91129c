import math

import pytest
import torch

from allmend.federation.collaboration.graph import sample_pairs, update_graph


def graph(n: int, seed: int = 0) -> torch.Tensor:
    w = torch.rand(n, n, generator=torch.Generator().manual_seed(seed)).triu(1)
    return w + w.T


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sparse", [False, True])
def test_only_pairs_that_were_probed_move_and_both_halves_alike(sparse: bool) -> None:
    w = graph(6)
    pairs = torch.tensor([[0, 4, 2], [3, 1, 5]])
    products = torch.tensor([0.3, -9.0, math.nan])

    found = update_graph(w.to_sparse() if sparse else w, pairs, products, 0.5)

    dense = found.to_dense() if sparse else found
    assert torch.equal(dense, dense.T)
    assert torch.equal(dense.diagonal(), torch.zeros(6))
    assert dense.min() >= 0
    assert dense.max() <= 1
    expected = w.clone()
    expected[0, 3] = expected[3, 0] = min(1.0, float(w[0, 3]) + 0.15)
    expected[1, 4] = expected[4, 1] = 0.0
    assert torch.allclose(dense, expected)
    untouched = torch.ones(6, 6, dtype=torch.bool)
    untouched[[0, 3, 1, 4], [3, 0, 4, 1]] = False
    assert torch.equal(dense[untouched], w[untouched])
    assert found.is_sparse == sparse


def test_a_pair_that_no_weight_was_known_of_comes_into_a_sparse_graph() -> None:
    none = torch.zeros(4, 4).to_sparse()

    found = update_graph(none, torch.tensor([[1], [3]]), torch.tensor([0.5]), 1.0)

    assert found.to_dense()[1, 3] == found.to_dense()[3, 1] == 0.5
    assert found._nnz() == 2


@pytest.mark.parametrize(("step", "product"), [(0.25, 1.0), (0.3, 0.5), (1.0, -0.07)])
def test_visits_to_cross_from_one_end_to_the_other(step: float, product: float) -> None:
    w = torch.full((2, 2), 0.0 if product > 0 else 1.0, dtype=torch.float64).fill_diagonal_(0)
    end = 1.0 if product > 0 else 0.0
    visits = 0
    while w[0, 1] != end:
        w = update_graph(w, torch.tensor([[0], [1]]), torch.tensor([product], dtype=torch.float64), step)
        visits += 1
        assert visits < 1000

    assert visits == math.ceil(round(1 / (step * abs(product)), 9))


@pytest.mark.parametrize("n", [2, 3, 7, 40])
def test_every_pair_is_as_likely_as_asked_for(n: int) -> None:
    generator, tries, probability = drawn(), 2000, min(1.0, 2 / n)
    counts = torch.zeros(n, n)
    for _ in range(tries):
        pairs = sample_pairs(n, probability, generator)
        assert bool((pairs[0] < pairs[1]).all())
        counts[pairs[0], pairs[1]] += 1
    assert counts.max() <= tries  # no pair twice in a draw
    upper = counts[torch.triu_indices(n, n, 1).unbind()]
    assert counts.sum() == upper.sum()

    spread = math.sqrt(tries * probability * (1 - probability))
    assert bool(((upper - tries * probability).abs() <= 5 * spread + 1e-9).all())
    every = n * (n - 1) / 2
    # 2/n of all pairs are n − 1
    assert float(upper.sum()) / tries == pytest.approx(min(every, n - 1), abs=5 * spread * math.sqrt(every) / tries)


def test_pairs_of_many_members_are_drawn_without_a_place_for_each() -> None:
    n = 3_000_000
    pairs = sample_pairs(n, 2e3 / (n * (n - 1) / 2), drawn())

    assert 1700 < pairs.shape[1] < 2300
    assert bool((pairs[0] < pairs[1]).all())
    assert int(pairs.max()) < n
    assert len(torch.unique(pairs, dim=1).T) == pairs.shape[1]
    # uniform over pairs: the larger of both has mean 2n/3
    assert float(pairs[1].double().mean()) / n == pytest.approx(2 / 3, abs=0.03)


def test_nobody_to_pair_with() -> None:
    assert sample_pairs(1, 1.0, drawn()).shape == (2, 0)
    assert sample_pairs(5, 0.0, drawn()).shape == (2, 0)
    assert sample_pairs(4, 1.0, drawn()).T.tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
