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


def sketch_groups(sketches: torch.Tensor) -> torch.Tensor:
    """Groups of members whose gradients at one point agree, int64 [n], counted from 0 in the order of their members.

    At a point that suits all on average gradients sum to zero, so that those of strangers are opposed on average, but
    a third of them agree by chance: signs tell little. Average linkage of 1 − cosine, cut where its heights have the
    widest gap, needs no number of groups.

    Args:
        sketches: [n, k].
    """
    n = len(sketches)
    if n < 3:
        return torch.zeros(n, dtype=torch.int64)  # one distance has no gap
    distances = (1 - cosines(sketches)).clamp_min(0).numpy()
    np.fill_diagonal(distances, 0.0)
    tree = linkage(squareform((distances + distances.T) / 2, checks=False), method="average")
    heights = tree[:, 2]
    gaps = np.diff(heights)
    cut = int(gaps.argmax())
    labels = fcluster(tree, (heights[cut] + heights[cut + 1]) / 2, criterion="distance")
    return torch.tensor(numbered(labels.tolist()))


def numbered(labels: Sequence[int]) -> list[int]:
    """Labels counted from 0, in the order in which they first come."""
    names = {label: place for place, label in enumerate(dict.fromkeys(labels))}
    return [names[label] for label in labels]
