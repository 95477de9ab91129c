"""Depth: which layers of a decoder can run side by side, what that costs, and the model in which they do."""

from allmend.depth.apply import apply_plan, save_paired
from allmend.depth.fold import fold_group
from allmend.depth.interventions import intervene
from allmend.depth.plan import Drop, Plan, Prune, Shuffle, Stretch, pairs_plan, read_plan, stretch_plan, write_plan

__all__ = [
    "Drop",
    "Plan",
    "Prune",
    "Shuffle",
    "Stretch",
    "apply_plan",
    "fold_group",
    "intervene",
    "pairs_plan",
    "read_plan",
    "save_paired",
    "stretch_plan",
    "write_plan",
]
