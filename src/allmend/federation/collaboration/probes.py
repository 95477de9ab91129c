"""Probes of pairs: what two gradients say about each other, their log, and the step by which they move the graph."""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import torch

from allmend.federation.collaboration.graph import Graph, update_graph

PROBED = ("round", "i", "j", "w", "product", "cosine")
"""Columns of the log, float64 [probes, 6]; members by their places in the graph."""

ROUND, WEIGHT, PRODUCT = (PROBED.index(column) for column in ("round", "w", "product"))

VISITS = 4
"""Probes in which a product of the usual size takes a weight from one end to the other, where the step is `auto`."""


def empty_log() -> torch.Tensor:
    return torch.zeros(0, len(PROBED), dtype=torch.float64)


def product_and_cosine(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> tuple[float, float]:
    """⟨g, h⟩, and the cosine; 0 with a gradient of zeros."""
    pairs = list(zip(one, other, strict=True))
    product = sum(float((a.double() * b.double()).sum()) for a, b in pairs)
    squares = [sum(float(part.double().square().sum()) for part in some) for some in (one, other)]
    size = math.sqrt(squares[0] * squares[1])
    return product, product / size if size else 0.0


def usual_step(products: torch.Tensor, members: int) -> float:
    """γ with which the median of the first products crosses [0, 1] in four visits; 0 while there are too few."""
    sizes = [abs(one) for one in products.tolist() if math.isfinite(one) and one]
    return 1 / (VISITS * median(sizes)) if sizes and len(sizes) >= members else 0.0


def replayed(graph: Graph, log: torch.Tensor, step: float) -> tuple[Graph, torch.Tensor]:
    """The graph after all probes of a log, whose visits are counted already, and the log with the weights."""
    visits, log = graph.visits, log.clone()
    for round in dict.fromkeys(log[:, ROUND].tolist()):
        rows = (log[:, ROUND] == round).nonzero()[:, 0]
        places = graph.places(log[rows, 1:3].long().T)
        graph = update_graph(graph, places, log[rows, PRODUCT], step)
        log[rows, WEIGHT] = graph.weights[places].double()
    return replace(graph, visits=visits), log
