import math

import pytest
import torch

from allmend.federation.collaboration.graph import (
    Graph,
    number_of,
    pair_of,
    sample_pairs,
    update_graph,
)


def graph(n: int, seed: int = 0) -> torch.Tensor:
    w = torch.rand(n, n, generator=torch.Generator().manual_seed(seed)).triu(1)
    return w + w.T


def every_pair(n: int) -> torch.Tensor:
    return torch.arange(n * (n - 1) // 2)


def weighted(n: int) -> Graph:
    numbers = every_pair(n)
    weights = torch.rand(len(numbers), generator=drawn())
    return Graph(n, numbers, weights, torch.zeros(len(numbers), dtype=torch.int64))


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_only_pairs_that_were_probed_move_and_both_halves_alike() -> None:
    before = weighted(6)
    w = before.matrix(range(6))
    places = before.places(torch.tensor([[0, 4, 2], [3, 1, 5]]))

    after = update_graph(before, places, torch.tensor([0.3, -9.0, math.nan]), 0.5)

    found = after.matrix(range(6))
    assert torch.equal(found, found.T)
    assert torch.equal(found.diagonal(), torch.zeros(6))
    assert found.min() >= 0
    assert found.max() <= 1
    expected = w.clone()
    expected[0, 3] = expected[3, 0] = min(1.0, float(w[0, 3]) + 0.15)
    expected[1, 4] = expected[4, 1] = 0.0
    assert torch.allclose(found, expected)
    untouched = torch.ones(6, 6, dtype=torch.bool)
    untouched[[0, 3, 1, 4], [3, 0, 4, 1]] = False
    assert torch.equal(found[untouched], w[untouched])
    seen = {tuple(pair) for pair, count in zip(after.pairs.T.tolist(), after.visits.tolist(), strict=True) if count}
    assert seen == {(0, 3), (1, 4)}


def test_members_and_pairs_that_are_added_leave_the_others_as_they_are() -> None:
    before = update_graph(weighted(5), torch.tensor([3, 4]), torch.tensor([0.1, 0.2]), 1.0)
    more = number_of(torch.tensor([6, 1, 0]), torch.tensor([7, 5, 1]))  # the last is there already

    after = before.grown(8, more, 0.25)

    w, old = after.matrix(range(8)), before.matrix(range(5))
    assert torch.equal(w[:5, :5], old)
    assert w[6, 7] == w[1, 5] == 0.25
    assert torch.count_nonzero(w[5:]) == 3
    assert after.visits.sum() == 2
    assert after.pairs.shape[1] == 12
    assert torch.equal(after.matrix([7, 2, 6]), w[[7, 2, 6]][:, [7, 2, 6]])
    own = before.grown(8, more, torch.tensor([0.1, 0.2, 0.3])).matrix(range(8))
    assert torch.equal(own[:5, :5], old)
    assert torch.equal(own[[6, 1], [7, 5]], torch.tensor([0.1, 0.2]))


def test_every_pair_has_one_number() -> None:
    n = 200
    i, j = torch.tril_indices(n, n, -1).flip(0)
    assert torch.equal(pair_of(every_pair(n)), torch.stack([i, j]))
    assert torch.equal(number_of(i, j), every_pair(n))
    large = torch.tensor([2**52 - 1, 2**52, 4_999_999 * 2_500_000 - 1])
    assert torch.equal(number_of(*pair_of(large)), large)


def test_a_matrix_of_many_is_sparse_and_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = weighted(7).matrix([5, 1, 2, 6])
    monkeypatch.setattr("allmend.federation.collaboration.graph.DENSE", 3)

    found = weighted(7).matrix([5, 1, 2, 6])

    assert found.is_sparse
    assert torch.equal(found.to_dense(), dense)


@pytest.mark.parametrize(("step", "product"), [(0.25, 1.0), (0.3, 0.5), (1.0, -0.07)])
def test_visits_to_cross_from_one_end_to_the_other(step: float, product: float) -> None:
    start, end = (0.0, 1.0) if product > 0 else (1.0, 0.0)
    one = Graph.empty().grown(2, torch.tensor([0]), start)
    one = Graph(2, one.numbers, one.weights.double(), one.visits)
    while one.weights[0] != end:
        one = update_graph(one, torch.tensor([0]), torch.tensor([product], dtype=torch.float64), step)
        assert one.visits[0] < 1000

    assert one.visits[0] == math.ceil(round(1 / (step * abs(product)), 9))


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
    assert sample_pairs(4, 1.0, drawn()).T.tolist() == [[0, 1], [0, 2], [1, 2], [0, 3], [1, 3], [2, 3]]
