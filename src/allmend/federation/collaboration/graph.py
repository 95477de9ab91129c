"""The graph: a weight in [0, 1] for pairs of members, moved by what their gradients at one point agree on.

The inner problem of CoBo is max over w in [0, 1] of w ⟨∇f_i(z), ∇f_j(z)⟩ at the midpoint z of two members' models. Its
solution is 0 or 1, by the sign of the product; it is taken by projected steps, so that one noisy product does not
decide.

Pairs have a number, j (j − 1) / 2 + i for i < j, which does not change when members are added.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

DENSE = 2000
"""Members up to which the graph may have an entry for each pair of them."""


@dataclass(frozen=True)
class Graph:
    """Weights of those pairs that may work together; all others have none.

    Attributes:
        n: members.
        numbers: int64 [E], of the pairs, ascending.
        weights: float32 [E].
        visits: int64 [E], probes that gave a product.
    """

    n: int
    numbers: torch.Tensor
    weights: torch.Tensor
    visits: torch.Tensor

    @classmethod
    def empty(cls) -> "Graph":
        none = torch.zeros(0, dtype=torch.int64)
        return cls(0, none, torch.zeros(0), none)

    @property
    def pairs(self) -> torch.Tensor:
        """int64 [2, E], i < j."""
        return pair_of(self.numbers)

    @property
    def visits_of_a_pair(self) -> float:
        """Mean over pairs; 0 without any."""
        return float(self.visits.double().mean()) if len(self.visits) else 0.0

    def grown(self, n: int, numbers: torch.Tensor, weights: torch.Tensor | float) -> "Graph":
        """With more members, and more pairs; those that are there already keep their weights.

        Args:
            n: members afterwards.
            numbers: int64 [P], in any order.
            weights: one for all, or [P], each pair then once.
        """
        fresh = ~torch.isin(numbers, self.numbers)
        new, inverse = torch.unique(numbers[fresh], return_inverse=True)
        own = self.weights.new_empty(new.shape)
        own[inverse] = torch.as_tensor(weights, dtype=own.dtype).expand(numbers.shape)[fresh]
        every = torch.cat([self.numbers, new])
        order = every.argsort()
        visits = torch.cat([self.visits, self.visits.new_zeros(new.shape)])
        return Graph(n, every[order], torch.cat([self.weights, own])[order], visits[order])

    def among(self, members: Sequence[int]) -> torch.Tensor:
        """Places in `numbers` of the pairs both of whose members are these, int64 [P]."""
        here = torch.zeros(self.n, dtype=torch.bool)
        here[torch.as_tensor(members, dtype=torch.int64)] = True
        i, j = self.pairs
        return (here[i] & here[j]).nonzero()[:, 0]

    def places(self, pairs: torch.Tensor) -> torch.Tensor:
        """Places in `numbers` of pairs [2, P] that are there."""
        return torch.searchsorted(self.numbers, number_of(*pairs.sort(0).values))

    def matrix(self, members: Sequence[int]) -> torch.Tensor:
        """w [m, m] of these members in their order, symmetric with a zero diagonal: sparse (COO) where an entry for
        each two of them would be too many."""
        place = torch.full((self.n,), -1, dtype=torch.int64)
        place[torch.as_tensor(members, dtype=torch.int64)] = torch.arange(len(members))
        kept = self.among(members)
        i, j = place[self.pairs[:, kept]]
        both, values = torch.stack([torch.cat([i, j]), torch.cat([j, i])]), self.weights[kept].repeat(2)
        w = torch.sparse_coo_tensor(both, values, (len(members),) * 2, check_invariants=True).coalesce()
        return w if len(members) > DENSE else w.to_dense()


def update_graph(graph: Graph, places: torch.Tensor, products: torch.Tensor, step: float) -> Graph:
    """w ← clip(w + step · product, 0, 1) for the pairs that were probed, whose visits are counted.

    Args:
        graph: before.
        places: int64 [P] in `graph.numbers`, each once.
        products: [P] of the two members' gradients; a pair whose product is not finite keeps weight and visits.
        step: γ; with 0 the visits alone are counted.
    """
    finite = products.isfinite()
    some, moves = places[finite], step * products[finite].to(graph.weights.dtype)
    weights, visits = graph.weights.clone(), graph.visits.clone()
    weights[some] = (weights[some] + moves).clamp(0, 1)
    visits[some] += 1
    return replace(graph, weights=weights, visits=visits)


def draw(count: int, probability: float, generator: torch.Generator) -> torch.Tensor:
    """Places out of `count`, each drawn by itself with a probability, ascending; an entry for each is never made.

    How many there are is drawn first, then which: they are as likely as if a coin were thrown for each.
    """
    if count == 0 or probability <= 0:
        return torch.empty(0, dtype=torch.int64)
    trials, chance = (torch.tensor(number, dtype=torch.float64) for number in (float(count), min(probability, 1.0)))
    drawn = int(torch.binomial(trials, chance, generator=generator))
    if 2 * drawn > count:
        return torch.randperm(count, generator=generator)[:drawn].sort().values
    places = torch.empty(0, dtype=torch.int64)
    while len(places) < drawn:  # in the order drawn, so that what is left out at the end is no matter of size
        more = torch.randint(count, (2 * (drawn - len(places)),), generator=generator)
        places = _first_of_each(torch.cat([places, more]))[:drawn]
    return places.sort().values


def sample_pairs(n: int, probability: float, generator: torch.Generator) -> torch.Tensor:
    """Pairs of n members, each drawn by itself with a probability.

    Args:
        n: members.
        probability: of a pair, in [0, 1].
        generator: of the draws.

    Returns:
        int64 [2, P], i < j, each once.
    """
    return pair_of(draw(n * (n - 1) // 2, probability, generator))


def number_of(i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """Numbers of the pairs i < j."""
    return j * (j - 1) // 2 + i


def pair_of(numbers: torch.Tensor) -> torch.Tensor:
    """The pairs (0, 1), (0, 2), (1, 2), (0, 3), … of these numbers, int64 [2, P]."""
    j = ((1 + (1 + 8 * numbers.double()).sqrt()) / 2).floor().long()
    # the root is rounded where numbers are large
    j = torch.where(j * (j - 1) // 2 > numbers, j - 1, j)
    j = torch.where(j * (j + 1) // 2 <= numbers, j + 1, j)
    return torch.stack([numbers - j * (j - 1) // 2, j])


def _first_of_each(numbers: torch.Tensor) -> torch.Tensor:
    """Different numbers, in the order in which they first come."""
    values, inverse = torch.unique(numbers, return_inverse=True)
    first = torch.full((len(values),), len(numbers)).scatter_reduce(0, inverse, torch.arange(len(numbers)), "amin")
    return numbers[first.sort().values]


def laplacian(w: torch.Tensor) -> torch.Tensor:
    """L = diag(W 1) − W, strided or sparse (COO) as W is."""
    degrees = w.sum(1)
    if not w.is_sparse:
        return torch.diag(degrees) - w
    return _diagonal(degrees.to_dense()) - w


def identity(w: torch.Tensor) -> torch.Tensor:
    """I of the size, precision and layout of W."""
    ones = torch.ones(len(w), dtype=w.dtype)
    return _diagonal(ones) if w.is_sparse else torch.diag(ones)


def _diagonal(entries: torch.Tensor) -> torch.Tensor:
    places = torch.arange(len(entries)).expand(2, -1)
    return torch.sparse_coo_tensor(places, entries, (len(entries),) * 2, is_coalesced=True, check_invariants=True)
