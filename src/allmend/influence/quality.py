"""How good scores are: what share of wrong records they find, and whether they foretell what retraining does."""

from collections.abc import Sequence

import numpy as np
from scipy import stats
from sklearn.metrics import roc_auc_score

from allmend.intervals import share
from allmend.results import Estimate, Table

DRAWS = 2000
"""Bootstrap samples."""

DEPTHS = (0.1, 0.2, 0.3)
"""Shares of the list down to which recall is told."""

FEWEST = 3
"""Models over which a correlation can be taken."""


class Detection(Table):
    """How well a measure finds wrong records.

    Attributes:
        auc: area under the ROC curve: the probability that a wrong record stands above a right one.
        recall: share of the wrong records in the first 10, 20 and 30 % of the list.
    """

    auc: Estimate
    recall: dict[float, Estimate]


def detection(measure: Sequence[float], wrong: Sequence[bool], *, seed: int = 0) -> Detection:
    """AUC with a bootstrap interval over records of each kind, and recall with Wilson's.

    Args:
        measure: of each record, higher for more suspicious.
        wrong: whether it is.
        seed: of the bootstrap.

    Raises:
        ValueError: all are wrong, or none.
    """
    values, labels = np.asarray(measure, dtype=float), np.asarray(wrong, dtype=bool)
    if labels.all() or not labels.any():
        raise ValueError("all records are wrong, or none: there is nothing to tell apart")
    low, high = np.quantile(_resampled(values, labels, seed), [0.025, 0.975])
    value = float(roc_auc_score(labels, values))
    order = np.argsort(-values, kind="stable")
    recall = {}
    for depth in DEPTHS:
        head = order[: round(depth * len(values))]
        recall[depth] = share(int(labels[head].sum()), int(labels.sum()))
    return Detection(auc=Estimate(value=value, low=float(low), high=float(high), n=len(values)), recall=recall)


def difference(first: Sequence[float], second: Sequence[float], wrong: Sequence[bool], *, seed: int = 0) -> Estimate:
    """AUC of the first minus that of the second, paired: the same bootstrap samples for both."""
    labels = np.asarray(wrong, dtype=bool)
    pair = [np.asarray(one, dtype=float) for one in (first, second)]
    a, b = (_resampled(values, labels, seed) for values in pair)
    low, high = np.quantile(a - b, [0.025, 0.975])
    value = float(roc_auc_score(labels, pair[0]) - roc_auc_score(labels, pair[1]))
    return Estimate(value=value, low=float(low), high=float(high), n=len(labels))


def _resampled(values: "np.ndarray", labels: "np.ndarray", seed: int) -> "np.ndarray":
    """The AUC of each bootstrap sample of wrong and of right records [DRAWS], from the ranks in it."""
    generator = np.random.default_rng(seed)
    wrong, right = (generator.choice(values[kind], (DRAWS, int(kind.sum()))) for kind in (labels, ~labels))
    ranks = stats.rankdata(np.concatenate([wrong, right], axis=1), axis=1)
    n, m = wrong.shape[1], right.shape[1]
    found: np.ndarray = (ranks[:, :n].sum(1) - n * (n + 1) / 2) / (n * m)
    return found


def linear_datamodeling_score(
    scores: "np.ndarray", subsets: Sequence[Sequence[int]], losses: "np.ndarray", *, seed: int = 0
) -> Estimate:
    """LDS: does the sum of a subset's scores foretell the loss of a model trained on it? (Park et al., TRAK, 2023)

    Spearman's correlation, over subsets, of Σ scores with minus the target's loss; the mean over targets. Its interval
    is over targets, which share the models: it does not cover that other subsets could have been drawn.

    Args:
        scores: [n, q] of n records for q targets.
        subsets: the records that each of m models was trained on.
        losses: [m, q] of the targets under each model.
        seed: of the bootstrap.

    Raises:
        ValueError: there are fewer than three models.
    """
    _check_enough(subsets)
    sums = np.stack([np.asarray(scores)[list(some)].sum(0) for some in subsets])  # [m, q]
    return bootstrap_mean(spearman(sums, -np.asarray(losses)), seed=seed)


def chance_lds(records: int, subsets: Sequence[Sequence[int]], losses: "np.ndarray", *, seed: int = 0) -> Estimate:
    """LDS of random scores: the mean, and the middle 95 % of all draws; n counts the draws.

    In a draw a record has the same score for all targets, since the scores of real methods are much alike for similar
    targets: an LDS within these bounds is what chance may bring with so few models.

    Args:
        records: n.
        subsets, losses: as of `linear_datamodeling_score`.
        seed: of the scores.

    Raises:
        ValueError: there are fewer than three models.
    """
    _check_enough(subsets)
    within = np.zeros((len(subsets), records))
    for row, some in enumerate(subsets):
        within[row, list(some)] = 1
    drawn = np.random.default_rng(seed).normal(size=(records, DRAWS))
    sums, found = within @ drawn, np.asarray(losses)
    by_target = [spearman(sums, -np.broadcast_to(found[:, [q]], sums.shape)) for q in range(found.shape[1])]
    values = np.mean(by_target, axis=0)
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(value=float(values.mean()), low=float(low), high=float(high), n=DRAWS)


def _check_enough(subsets: Sequence[Sequence[int]]) -> None:
    if len(subsets) < FEWEST:
        raise ValueError(f"a correlation over {len(subsets)} models says nothing: train three or more")


def spearman(first: "np.ndarray", second: "np.ndarray") -> "np.ndarray":
    """Spearman's correlation of two matrices [m, q] column by column, [q]; 0 where a column is the same throughout."""
    a, b = (stats.rankdata(one, axis=0) for one in (np.asarray(first), np.asarray(second)))
    a, b = a - a.mean(0), b - b.mean(0)
    size = np.sqrt((a * a).sum(0) * (b * b).sum(0))
    found: np.ndarray = (a * b).sum(0) / np.where(size > 0, size, 1.0)
    return found


def bootstrap_mean(values: "np.ndarray", *, seed: int = 0) -> Estimate:
    """The mean with a bootstrap interval; without one for a single value, or for values that do not differ."""
    value, n = float(values.mean()), len(values)
    if n == 1 or values.min() == values.max():
        return Estimate(value=value, n=n)
    drawn = np.random.default_rng(seed).choice(values, (DRAWS, n)).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(value=value, low=float(low), high=float(high), n=n)
