"""The graph: a weight in [0, 1] for each pair of members, moved by what their gradients at one point agree on.

The inner problem of CoBo is max over w in [0, 1] of w ⟨∇f_i(z), ∇f_j(z)⟩ at the midpoint z of two members' models. Its
solution is 0 or 1, by the sign of the product; it is taken by projected steps, so that one noisy product does not
decide.
"""

import torch

DENSE = 2000
"""Members up to which the graph may be an array with an entry for each pair of them."""


def update_graph(w: torch.Tensor, pairs: torch.Tensor, products: torch.Tensor, step: float) -> torch.Tensor:
    """w ← clip(w + step · product, 0, 1) for the pairs that were probed.

    Args:
        w: [n, n], symmetric with a zero diagonal; strided, or sparse (COO) with an entry for each pair that counts.
        pairs: int64 [2, P], each once, i ≠ j.
        products: [P] of the two members' gradients; a pair whose product is not finite keeps its weight.
        step: γ.

    Returns:
        The graph after the step, of the same layout.
    """
    finite = products.isfinite()
    (i, j), moves = pairs[:, finite], step * products[finite].to(w.dtype)
    if not w.is_sparse:
        found = w.clone()
        moved = (w[i, j] + moves).clamp(0, 1)
        found[i, j] = found[j, i] = moved
        return found
    both = torch.stack([torch.cat([i, j]), torch.cat([j, i])])
    moved = torch.sparse_coo_tensor(both, torch.cat([moves, moves]), w.shape, check_invariants=True).coalesce()
    # entries of pairs that were not probed stay as they are: adding nothing changes no bit of them
    total = (w + moved).coalesce()
    values = total.values().clamp(0, 1)
    kept = values > 0
    return torch.sparse_coo_tensor(total.indices()[:, kept], values[kept], w.shape, check_invariants=True).coalesce()


def sample_pairs(n: int, probability: float, generator: torch.Generator) -> torch.Tensor:
    """Pairs of n members, each drawn by itself with a probability; an entry for each pair is never made.

    How many there are is drawn first, then which: the pairs are as likely as if a coin were thrown for each.

    Args:
        n: members.
        probability: of a pair, in [0, 1].
        generator: of the draws.

    Returns:
        int64 [2, P], i < j, in order.
    """
    every = n * (n - 1) // 2
    if every == 0 or probability <= 0:
        return torch.empty(2, 0, dtype=torch.int64)
    trials, chance = (torch.tensor(number, dtype=torch.float64) for number in (float(every), min(probability, 1.0)))
    count = int(torch.binomial(trials, chance, generator=generator))
    if 2 * count > every:
        numbers = torch.randperm(every, generator=generator)[:count]
    else:
        numbers = torch.empty(0, dtype=torch.int64)
        while len(numbers) < count:  # in the order drawn, so that what is left out at the end is no matter of size
            more = torch.randint(every, (2 * (count - len(numbers)),), generator=generator)
            numbers = _first_of_each(torch.cat([numbers, more]))[:count]
    return _pair_of(numbers.sort().values)


def _first_of_each(numbers: torch.Tensor) -> torch.Tensor:
    """Different numbers, in the order in which they first come."""
    values, inverse = torch.unique(numbers, return_inverse=True)
    first = torch.full((len(values),), len(numbers)).scatter_reduce(0, inverse, torch.arange(len(numbers)), "amin")
    return numbers[first.sort().values]


def _pair_of(numbers: torch.Tensor) -> torch.Tensor:
    """The pairs (0, 1), (0, 2), (1, 2), (0, 3), … of these numbers: number = j (j − 1) / 2 + i."""
    j = ((1 + (1 + 8 * numbers.double()).sqrt()) / 2).floor().long()
    # the root is rounded where numbers are large
    j = torch.where(j * (j - 1) // 2 > numbers, j - 1, j)
    j = torch.where(j * (j + 1) // 2 <= numbers, j + 1, j)
    pairs = torch.stack([numbers - j * (j - 1) // 2, j])
    return pairs[:, (pairs[0] * (int(j.max()) + 1 if len(j) else 1) + pairs[1]).argsort()]


def laplacian(w: torch.Tensor) -> torch.Tensor:
    """L = diag(W 1) − W, strided."""
    return torch.diag(w.sum(1)) - w
