"""Membership inference: does a score tell the texts a model was trained on from others of the same source?

All scores are larger for texts that look more like members. Figures are those that Carlini et al., "Membership
Inference Attacks From First Principles", IEEE S&P 2022, ask for: the ROC curve's area and its lower left corner.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from allmend.audit.likelihood import Reading
from allmend.intervals import CONFIDENCE
from allmend.results import Estimate, Membership

SCORES = ("loss", "ratio", "min-k", "min-k++", "zlib")
MIN_K = 0.2
"""Share of a text's tokens, the least likely ones, that Min-K% looks at."""
ONE_IN = {"tpr_at_1": 100, "tpr_at_01": 1000}
"""The false positive rates of the table, inverted: as many non-members are needed for one to be allowed."""
RESAMPLES = 1000

Floats: TypeAlias = NDArray[np.float64]
Counts: TypeAlias = NDArray[np.int64]


def scores(reading: Reading, text: str, *, base: Reading | None = None) -> dict[str, float]:
    """Membership scores of one text.

    - `loss`: mean log-likelihood of its tokens (Yeom et al., CSF 2018).
    - `ratio`: that minus the mean log-likelihood under the base model.
    - `min-k`: mean of the lowest 20 % of log-likelihoods (Shi et al., ICLR 2024).
    - `min-k++`: the same of log-likelihoods standardised by the model's own distribution in each token's place,
      (log p − mean) / deviation (Zhang et al., ICLR 2025).
    - `zlib`: total log-likelihood over the bytes that zlib makes of the text (Carlini et al., USENIX Security 2021).

    Args:
        reading: of the text.
        text: the characters of what was read.
        base: the same text under the base model; None gives no `ratio`.

    Raises:
        ValueError: the reading has no tokens, or `base` is of another text.
    """
    values = reading.log_likelihood
    if not len(values):
        raise ValueError("a text without predicted tokens has no membership score")
    if base is not None and not torch.equal(base.ids, reading.ids):
        raise ValueError("the base model read another text")
    # float32 cannot tell a smaller deviation from none; 0 would make 0 / 0 of a token that is certain
    standardised = (values - reading.mean) / reading.deviation.clamp(min=torch.finfo(torch.float32).eps)
    found = {
        "loss": values.mean().item(),
        "min-k": _lowest(values),
        "min-k++": _lowest(standardised),
        "zlib": values.sum().item() / len(zlib.compress(text.encode())),
    }
    if base is not None:
        found["ratio"] = found["loss"] - base.log_likelihood.mean().item()
    return found


def _lowest(values: torch.Tensor) -> float:
    return values.sort().values[: max(1, int(MIN_K * len(values)))].mean().item()


def auc(members: Sequence[float], non_members: Sequence[float], *, generator: np.random.Generator) -> Estimate:
    """Area under the ROC curve: the share of (member, non-member) pairs in which the member scores higher, ties half.

    n counts both. For the interval see `true_positive_rate`.

    Raises:
        ValueError: there are no members or no non-members.
    """
    truth = [1] * len(members) + [0] * len(non_members)
    if len(set(truth)) < 2:
        raise ValueError(f"{len(members)} members and {len(non_members)} non-members have no ROC curve")
    low, high = _bootstrap(_auc, members, non_members, generator)
    return Estimate(value=roc_auc_score(truth, [*members, *non_members]), low=low, high=high, n=len(truth))


def true_positive_rate(
    members: Sequence[float], non_members: Sequence[float], *, one_in: int, generator: np.random.Generator
) -> Estimate | None:
    """Share of members found at a false positive rate of 1 / `one_in`.

    It is the largest share of members at or above a threshold that at most 1 / `one_in` of the non-members reach,
    without interpolation. n counts members. The interval is the bootstrap's percentiles, members and non-members
    resampled apart. There is none where all resamples agree or a group has one text: it would claim certainty.

    Args:
        members: their scores.
        non_members: their scores.
        one_in: the inverse of the rate, at least 2.
        generator: of the resamples.

    Returns:
        None where there are fewer than `one_in` non-members, so that one of them is more than the rate allows, or no
        members.
    """
    if not members or len(non_members) < one_in:
        return None

    statistic = partial(_true_positive_rate, one_in=one_in)
    once = np.ones((1, len(members)), np.int64), np.ones((1, len(non_members)), np.int64)
    value = statistic(np.sort(members), np.sort(non_members), *once)[0]
    low, high = _bootstrap(statistic, members, non_members, generator)
    return Estimate(value=value, low=low, high=high, n=len(members))


# Members' and others' sorted scores [M] and [N], and how often each of them is in each of B resamples, [B, M] and
# [B, N], to the figure of each resample, [B].
_Statistic: TypeAlias = Callable[[Floats, Floats, Counts, Counts], Floats]


def _auc(members: Floats, others: Floats, drawn: Counts, drawn_others: Counts) -> Floats:
    before = _before(drawn_others)
    lower, not_higher = (before[:, np.searchsorted(others, members, side)] for side in ("left", "right"))
    wins = np.einsum("bm,bm->b", drawn, lower + not_higher) / 2
    return np.asarray(wins / (len(members) * len(others)))


def _true_positive_rate(members: Floats, others: Floats, drawn: Counts, drawn_others: Counts, *, one_in: int) -> Floats:
    # the highest of the others at or above whom there are too many; what scores higher is found
    at_or_above = len(others) - _before(drawn_others)[:, :-1]
    bar = (at_or_above > len(others) // one_in).sum(1) - 1
    missed = np.searchsorted(members, others, "right")[bar]
    found = len(members) - np.take_along_axis(_before(drawn), missed[:, None], 1)[:, 0]
    return np.asarray(found / len(members))


def _before(drawn: Counts) -> Counts:
    """How many are drawn of those before each place, [B, N] to [B, N + 1]."""
    return np.pad(drawn.cumsum(1), ((0, 0), (1, 0)))


def _bootstrap(
    statistic: _Statistic, members: Sequence[float], others: Sequence[float], generator: np.random.Generator
) -> tuple[float | None, float | None]:
    if len(members) == 1 or len(others) == 1:
        return None, None  # resamples of one text do not vary, and would claim that texts do not
    sorted_members, sorted_others = np.sort(members), np.sort(others)
    block = max(1, 2**21 // (len(members) + len(others)))  # keeps memory within some 100 MB
    found: list[Floats] = []
    for start in range(0, RESAMPLES, block):
        size = min(block, RESAMPLES - start)
        drawn, drawn_others = (_resample(len(group), size, generator) for group in (members, others))
        found.append(statistic(sorted_members, sorted_others, drawn, drawn_others))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail]).tolist()
    return (low, high) if low < high else (None, None)


def _resample(n: int, size: int, generator: np.random.Generator) -> Counts:
    """How often each of n is drawn in n draws with replacement, for `size` resamples: [size, n]."""
    drawn = generator.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
    return np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)


def membership_rows(
    model: str,
    *,
    records: str,
    copies: int | None,
    members: Sequence[Mapping[str, float]],
    non_members: Sequence[Mapping[str, float]],
    seed: int,
) -> list[Membership]:
    """The audit table's rows for one group of texts: one for each score that its texts have.

    Args:
        model: its name.
        records: what the texts are, `canaries` or `records of NAME`.
        copies: of the canaries; None for records.
        members: the scores of each text that was trained on.
        non_members: the scores of each that was not.
        seed: of the bootstrap; every score meets the same resamples.

    Returns:
        No rows where there are no members or no non-members.
    """
    if not members or not non_members:
        return []
    rows = []
    for score in (score for score in SCORES if score in members[0]):
        groups = [text[score] for text in members], [text[score] for text in non_members]
        rates: dict[str, Any] = {
            field: true_positive_rate(*groups, one_in=one_in, generator=np.random.default_rng(seed))
            for field, one_in in ONE_IN.items()
        }
        area = auc(*groups, generator=np.random.default_rng(seed))
        rows.append(Membership(model=model, records=records, copies=copies, score=score, auc=area, **rates))
    return rows


def refusals(*, records: str, copies: int | None, members: int, non_members: int) -> list[str]:
    """Why figures are missing from `membership_rows` of a group of so many texts, in words."""
    group = records if copies is None else f"{records} with {copies} {'copy' if copies == 1 else 'copies'}"
    if not members or not non_members:
        return [f"membership of {group}: needs members and non-members, and there are {members} and {non_members}"]
    return [
        f"membership of {group}: the true positive rate at {100 / one_in:g} % false positives needs {one_in:,} "
        f"non-members, of which one may be taken for a member, and there are {non_members:,}"
        for one_in in ONE_IN.values()
        if non_members < one_in
    ]
