"""What others do to be less deep: leave out single layers, by what they change or by the loss that is left.

Sources: Men et al., "ShortGPT" (arXiv 2403.03853) for block influence; leaving out one layer after the other by loss is
how Kim et al., "Shortened LLaMA" (arXiv 2402.02834), rank blocks, measured anew after each.
"""

from collections.abc import Sequence

import torch

from allmend.depth.measure import Candidate
from allmend.depth.plan import Drop
from allmend.depth.searching import Result, Search


def block_influence(search: Search) -> torch.Tensor:
    """Of each layer, 1 − cos(its input, its output), the mean over the tokens of the search."""
    layers = len(search.decoder.layers)
    sums, tokens = torch.zeros(layers, dtype=torch.float64), 0
    for window in search.windows.ids:
        states = search.decoder.trunk(window[None]).states
        for layer in range(layers):
            one, other = states[layer][0], states[layer + 1][0]
            sums[layer] += (1 - torch.nn.functional.cosine_similarity(one, other, dim=-1).double()).sum()
        tokens += window.numel()
    return sums / tokens


def by_block_influence(search: Search, depths: Sequence[int]) -> dict[int, Result]:
    """At each depth, the layers that change least left out."""
    order = block_influence(search).argsort().tolist()
    found = {}
    for depth in depths:
        one = _without(order[: search.layers - depth])
        found[depth] = search.result("block influence", one, search.measured([one], "block influence")[one])
    return found


def by_loss(search: Search, depths: Sequence[int]) -> dict[int, Result]:
    """At each depth, layers left out one after the other, each time the one without which the loss is least."""
    found, gone = {}, list[int]()
    while search.layers - len(gone) > min(depths):
        rivals = f"greedy, {len(gone)} gone"
        some = [_without([*gone, layer], layer, rivals) for layer in range(search.layers) if layer not in gone]
        measured = search.measured(some, rivals)
        best = min((one for one in some if not measured[one].dropped), key=lambda one: measured[one].loss)
        gone.append(best.start)
        found[search.layers - len(gone)] = search.result("greedy", best, measured[best])
    return {depth: found[depth] for depth in depths}


def _without(layers: Sequence[int], last: int = 0, rivals: str = "") -> Candidate:
    return Candidate("drop", last, last + 1, Drop(frozenset(layers)), rivals)
