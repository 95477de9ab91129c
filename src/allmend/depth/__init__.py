"""Depth: which layers of a decoder can run side by side, what that costs, and the model in which they do."""

from allmend.data.windows import Windows, read_text, windows_of
from allmend.depth.additive import best_pairs
from allmend.depth.apply import apply_plan, save_paired
from allmend.depth.fold import fold_group
from allmend.depth.interventions import intervene
from allmend.depth.plan import Drop, Plan, Prune, Shuffle, Stretch, pairs_plan, read_plan, stretch_plan, write_plan
from allmend.depth.scanning import scan
from allmend.depth.searching import Result, pair_costs, search
from allmend.depth.tensor_parallel import tensor_parallel_plan

__all__ = [
    "Drop",
    "Plan",
    "Prune",
    "Result",
    "Shuffle",
    "Stretch",
    "Windows",
    "apply_plan",
    "best_pairs",
    "fold_group",
    "intervene",
    "pair_costs",
    "pairs_plan",
    "read_plan",
    "read_text",
    "save_paired",
    "scan",
    "search",
    "stretch_plan",
    "tensor_parallel_plan",
    "windows_of",
    "write_plan",
]
