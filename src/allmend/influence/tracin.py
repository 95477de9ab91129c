"""TracIn: the dot products of a record's and a target's gradients, summed over checkpoints of the training.

Source: Pruthi, Liu, Kale, Sundararajan, "Estimating Training Data Influence by Tracing Gradient Descent", NeurIPS 2020,
section 3.2 (TracInCP).
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from allmend.influence.gradients import Source
from allmend.influence.methods import HessianFree, Solved
from allmend.influence.scores import Scores, influence


def tracin(
    checkpoints: Iterable[tuple[Source, Source]],
    rates: Sequence[float] | None = None,
    *,
    groups: Sequence[Collection[str]] | None = None,
) -> Scores:
    """Σ_c η_c ⟨v_c, g_{c,i}⟩ for each record i and target; with one checkpoint and η = 1, Hessian-free.

    Args:
        checkpoints: gradients of the training records and of the target's, at each checkpoint c; gone through in turn,
            so that one model in memory may serve all.
        rates: η_c, the learning rate that led to each checkpoint; 1 each when None.
        groups: as of `influence`.

    Returns:
        Scores without directions, of which there would be one for each checkpoint; losses are those at the last.

    Raises:
        ValueError: there is no checkpoint, there are more or fewer rates, or checkpoints are of other records.
    """
    weighted = ((1.0, pair) for pair in checkpoints) if rates is None else zip(rates, checkpoints, strict=True)
    total: Scores | None = None
    count = 0
    for rate, (train, target) in weighted:
        found = influence(train, target, HessianFree(), groups=groups)
        count += 1
        if total is None:
            total = replace(found, values=rate * found.values)
            continue
        if total.values.shape != found.values.shape:
            raise ValueError(
                f"checkpoint {count} has scores {list(found.values.shape)}, not {list(total.values.shape)}"
            )
        total = replace(found, values=total.values + rate * found.values)
    if total is None:
        raise ValueError("there is no checkpoint")
    notes = ("of a single checkpoint this is hessian_free",) if count == 1 else ()
    return replace(total, method="tracin", solved=Solved({}, {}, notes=notes))
