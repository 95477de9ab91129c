"""Influence: which training records, and whose, moved a model towards a target or away from it.

A score above 0 says that training on the record lowers the loss of the target.
"""

from allmend.influence.blocks import FisherBlocks, fisher_blocks
from allmend.influence.gradients import Given, OfRecords, mean_gradient
from allmend.influence.inverses import cholesky, eigen, hyperpower
from allmend.influence.methods import DataInf, Exact, Gfim, HessianFree, Lissa, solve
from allmend.influence.quality import detection, linear_datamodeling_score
from allmend.influence.scores import Scores, influence, score, self_influence

__all__ = [
    "DataInf",
    "Exact",
    "FisherBlocks",
    "Gfim",
    "Given",
    "HessianFree",
    "Lissa",
    "OfRecords",
    "Scores",
    "cholesky",
    "detection",
    "eigen",
    "fisher_blocks",
    "hyperpower",
    "influence",
    "linear_datamodeling_score",
    "mean_gradient",
    "score",
    "self_influence",
    "solve",
]
