"""(n, p)-discoverable extraction: would n sampled continuations of a canary's beginning hold the right one?

Hayes et al., "Measuring memorization through probabilistic discoverable extraction", 2024 (arXiv 2410.19482). Nothing
is sampled: a teacher-forced pass gives the probability p of the right continuation under the sampling scheme, and at
least one of n independent draws is right with probability 1 − (1 − p)^n. So one pass gives the curve over all n.
"""

import math
from collections.abc import Sequence
from statistics import fmean

from allmend.audit.extraction import Prefix
from allmend.audit.likelihood import Reading
from allmend.data.canaries import Canary
from allmend.intervals import mean, share
from allmend.results import Discoverable

LIKELY = 0.5
"""Probability from which on a canary counts as likely to come out."""


def log_probability(reading: Reading, part: range) -> float:
    """log p: that the tokens of `part` are drawn behind all that stands before them (nats; −inf if they never are).

    Args:
        reading: a running text, under the sampling scheme that it was read with.
        part: of its tokens, as `Prefix.behind` gives it.

    Raises:
        ValueError: the part is empty, or holds the first token, which nothing stands before.
    """
    if not part or part.start == 0:
        raise ValueError(f"tokens {part.start} to {part.stop} are no continuation")
    return reading.sampled[part.start - 1 : part.stop - 1].sum().item()


def at_least_once(log_p: float, draws: int) -> float:
    """1 − (1 − p)^draws, without loss of digits where p is far below the rounding of 1 − p."""
    p = math.exp(log_p)
    return 1.0 if p == 1 else -math.expm1(draws * math.log1p(-p))


def discoverable_rows(
    model: str,
    canaries: Sequence[Canary],
    readings: Sequence[Reading],
    prefix: Prefix,
    *,
    draws: Sequence[int],
    suffix_tokens: int | None = None,
) -> list[Discoverable]:
    """The audit table's rows for one prefix: by number of copies, inserted canaries and controls apart, for each n.

    Args:
        model: its name.
        canaries: those without a token behind the prefix are left out.
        readings: of the canaries, as running texts.
        prefix: shown of each.
        draws: every n.
        suffix_tokens: to bring out; to the canary's end where None.
    """
    parts = [prefix.behind(len(reading.ids), suffix_tokens) for reading in readings]
    rows = []
    for copies in sorted({canary.copies for canary in canaries}):
        for inserted in (True, False):
            cell = [
                (part.start, log_probability(reading, part))
                for canary, reading, part in zip(canaries, readings, parts, strict=True)
                if part and canary.copies == copies and canary.inserted == inserted
            ]
            if not cell:
                continue
            for n in draws:
                found = [at_least_once(log_p, n) for _, log_p in cell]
                rows.append(
                    Discoverable(
                        model=model,
                        copies=copies,
                        inserted=inserted,
                        prefix=prefix.label,
                        prefix_tokens=fmean(tokens for tokens, _ in cell),
                        draws=n,
                        probability=mean(found, bounds=(0, 1)),
                        likely=share(sum(one >= LIKELY for one in found), len(found)),
                    )
                )
    return rows
