"""Sketches of gradients: few numbers that keep inner products, and groups of members from them.

Rows of a Gaussian matrix S from a common seed make k numbers of a gradient. ⟨Sg, Sh⟩ / k is ⟨g, h⟩ on average, with
variance (|g|² |h|² + ⟨g, h⟩²) / k: a cosine is off by about 1/√k.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from allmend.federation.collaboration.graph import number_of

BLOCK = 16_384
"""Coordinates whose columns of S are made at a time."""

INTERCHANGES, LEVEL = 199, 0.1
"""Of members at random, and the share of them that may part groups as well as the groups that were found."""

ROWS = 1024
"""Members whose cosines with all others are held at a time."""


def gradient_sketch(gradient: Mapping[str, torch.Tensor], size: int, seed: int) -> torch.Tensor:
    """S g, float32 [size].

    Args:
        gradient: by name; all who compare sketches have the same names and shapes.
        size: k.
        seed: of S, common to all.
    """
    found = torch.zeros(size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(gradient):
        flat = gradient[name].detach().flatten().float().cpu()
        for start in range(0, len(flat), BLOCK):
            some = flat[start : start + BLOCK]
            found += (torch.randn(size, len(some), generator=generator) @ some).double()
    return found.float()


def cosines(sketches: torch.Tensor) -> torch.Tensor:
    """Of each two rows, float64 [n, n]; 0 with a row of zeros."""
    wide = sketches.double()
    unit = wide / wide.norm(dim=1, keepdim=True).clamp_min(1e-300)
    found: torch.Tensor = unit @ unit.T
    return found


def nearest(sketches: torch.Tensor, count: int, *, first: int = 0) -> torch.Tensor:
    """Numbers of the pairs (see `graph`) of members and those whose sketches have the largest cosines with theirs.

    There are `count` to 2 · `count` pairs for each member: who is near somebody may have nearer ones. A row of zeros is
    near nobody.

    Args:
        sketches: [n, k].
        count: of each member's neighbours.
        first: members before this place look for nobody, but may be found.
    """
    n = len(sketches)
    unit = torch.nn.functional.normalize(sketches.float(), dim=1)
    some = (unit.square().sum(1) > 0.5).nonzero()[:, 0]
    found = []
    for rows in torch.split(some[some >= first], ROWS):
        near = unit[rows] @ unit[some].T
        near[rows[:, None] == some] = -torch.inf
        others = some[near.topk(min(count, len(some) - 1), dim=1).indices] if len(some) > 1 else rows[:, None][:, :0]
        pairs = torch.stack([rows[:, None].expand_as(others).flatten(), others.flatten()]).sort(0).values
        found.append(number_of(*pairs))
    return torch.unique(torch.cat(found)) if n and found else torch.zeros(0, dtype=torch.int64)


def sketch_groups(first: torch.Tensor, second: torch.Tensor, *, most: int, seed: int = 0) -> torch.Tensor:
    """Groups of members whose gradients at one point agree, int64 [n], counted from 0 in the order of their members.

    At a point that suits all on average gradients sum to zero, so that those of strangers are opposed on average, but
    a third of them agree by chance: signs tell little. Average linkage of 1 − cosine, cut where its heights have the
    widest gap, needs no number of groups; only cuts into groups of two and more on average are looked at.

    Such a cut there always is. Whether it says anything is asked of the halves: groups of one half's gradients, cut
    into as many, must have larger cosines within than across in the other half's, by more than where its members are
    interchanged at random. Otherwise all are one group.

    Args:
        first, second: [n, k], sketches of the gradients of two halves of each member's records.
        most: groups at most.
        seed: of the interchanges.
    """
    n = len(first)
    if n < 4 or most < 2:
        return torch.zeros(n, dtype=torch.int64)  # one distance has no gap
    both = torch.nn.functional.normalize(first.double(), dim=1) + torch.nn.functional.normalize(second.double(), dim=1)
    tree = _linkage(cosines(both))
    fewest = max(0, n - 1 - min(most, n // 2))  # joints that are made whatever the cut
    cut = n - 1 - fewest - int(np.diff(tree[:, 2])[fewest:].argmax())
    halves = [cosines(one).numpy() for one in (first, second)]
    labels = [_cut(_linkage(torch.from_numpy(one)), cut) for one in halves]
    generator = np.random.default_rng(seed)

    def apart(order: np.ndarray) -> float:
        return sum(_apart(own, other[order][:, order]) for own, other in zip(labels, halves[::-1], strict=True))

    found = apart(np.arange(n))
    as_large = sum(apart(generator.permutation(n)) >= found for _ in range(INTERCHANGES))
    if (1 + as_large) / (1 + INTERCHANGES) > LEVEL:
        return torch.zeros(n, dtype=torch.int64)
    return torch.tensor(numbered(_cut(tree, cut).tolist()))


def _linkage(near: torch.Tensor) -> np.ndarray:
    distances = (1 - near).clamp_min(0).fill_diagonal_(0).numpy()
    tree: np.ndarray = linkage(squareform((distances + distances.T) / 2, checks=False), method="average")
    return tree


def _cut(tree: np.ndarray, groups: int) -> np.ndarray:
    labels: np.ndarray = fcluster(tree, groups, criterion="maxclust")
    return labels


def _apart(labels: np.ndarray, near: np.ndarray) -> float:
    """Mean cosine within groups less that across."""
    same, pair = labels[:, None] == labels, ~np.eye(len(labels), dtype=bool)
    within, across = near[same & pair], near[~same]
    return float(within.mean() if len(within) else 0.0) - float(across.mean() if len(across) else 0.0)


def numbered(labels: Sequence[int]) -> list[int]:
    """Labels counted from 0, in the order in which they first come."""
    names = {label: place for place, label in enumerate(dict.fromkeys(labels))}
    return [names[label] for label in labels]
