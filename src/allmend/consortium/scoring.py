"""Held-out scores as sums: all that a table of the pooled records needs, and no record's own."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Self

from scipy import stats

from allmend import intervals
from allmend.learn.evaluate import Score
from allmend.results import POOLED, Difference, Estimate, Utility

LARGEST = 1e30
"""A sum beyond it is nobody's, and would not leave room for the others'."""


@dataclass(frozen=True, kw_only=True)
class _Losses:
    """Sums over records of losses ℓ (nats) and their tokens t; those of several members add up.

    Attributes:
        records: with a token to score.
        tokens, squared_tokens: Σ t, Σ t².
        nll, squared_nll, product: Σ ℓ, Σ ℓ², Σ ℓ t.
        asked: questions.
    """

    records: float = 0.0
    tokens: float = 0.0
    squared_tokens: float = 0.0
    nll: float = 0.0
    squared_nll: float = 0.0
    product: float = 0.0
    asked: float = 0.0

    @staticmethod
    def _sums(losses: Sequence[tuple[float, int]]) -> dict[str, float]:
        """Of each record's loss and tokens."""
        return {
            "records": float(len(losses)),
            "tokens": float(sum(tokens for _, tokens in losses)),
            "squared_tokens": float(sum(tokens**2 for _, tokens in losses)),
            "nll": math.fsum(loss for loss, _ in losses),
            "squared_nll": math.fsum(loss**2 for loss, _ in losses),
            "product": math.fsum(loss * tokens for loss, tokens in losses),
        }

    def facts(self, prefix: str) -> dict[str, float]:
        """As numbers of a reply."""
        return {f"{prefix}/{field.name}": getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_facts(cls, facts: Mapping[str, float], prefix: str) -> Self:
        """What `facts` made numbers of, summed over members; zeros where nobody sent any."""
        return cls(**{field.name: float(facts.get(f"{prefix}/{field.name}", 0.0)) for field in fields(cls)})

    @property
    def possible(self) -> bool:
        """Whether there can be such records: no negative counts, tokens where there are records, nothing too large."""
        counts = (self.records, self.tokens, self.squared_tokens, self.squared_nll, self.asked)
        small = all(abs(getattr(self, field.name)) < LARGEST for field in fields(self))
        return small and min(counts) >= 0 and (self.tokens > 0) == (self.records > 0)

    def _mean(self) -> Estimate:
        """`intervals.ratio` of the records' losses over their tokens, from their sums."""
        value, n = self.nll / self.tokens, round(self.records)
        residual = self.squared_nll - 2 * value * self.product + value**2 * self.squared_tokens
        if n <= 1 or residual <= intervals.ROUNDING * self.squared_nll:
            return Estimate(value=value, n=round(self.tokens))
        error = math.sqrt(residual * n / (n - 1)) / self.tokens
        half = float(stats.t.ppf(0.5 + intervals.CONFIDENCE / 2, n - 1)) * error
        return Estimate(value=value, low=value - half, high=value + half, n=round(self.tokens))


@dataclass(frozen=True, kw_only=True)
class Moments(_Losses):
    """Sums over held-out records under one model.

    Attributes:
        right: questions answered right.
        chance: Σ 1 / choices.
    """

    right: float = 0.0
    chance: float = 0.0

    @classmethod
    def of(cls, scores: Sequence[Score]) -> "Moments":
        """Of one member's scores."""
        asked = [score for score in scores if score.answer is not None]
        return cls(
            **cls._sums([(score.nll, score.tokens) for score in scores if score.tokens]),
            asked=float(len(asked)),
            right=float(sum(score.right for score in asked)),
            chance=math.fsum(1 / score.choices for score in asked if score.choices),
        )

    @property
    def possible(self) -> bool:
        """The same, with no loss below 0, and no more right than asked."""
        found = (self.nll, self.product, self.right, self.chance)
        return super().possible and min(found) >= 0 and self.right <= self.asked

    def utility(self, model: str) -> Utility:
        """The row of the pooled records, the same as of the scores themselves."""
        return Utility(
            model=model,
            held_out=POOLED,
            perplexity=self._perplexity() if self.tokens else None,
            accuracy=intervals.share(round(self.right), round(self.asked)) if self.asked else None,
            chance=self.chance / self.asked if self.asked else None,
        )

    def _perplexity(self) -> Estimate:
        """`intervals.exp_mean` of the records, from their sums."""
        log = self._mean()
        ends = {side: intervals.exp(end) for side in ("low", "high") if (end := getattr(log, side)) is not None}
        return Estimate(value=intervals.exp(log.value), n=log.n, **ends)


@dataclass(frozen=True, kw_only=True)
class Paired(_Losses):
    """Sums of the differences of two models on the same records: here ℓ is the difference of their losses.

    Attributes:
        total, squared: Σ d and Σ d² of d in {−1, 0, 1}, whether a question is answered right.
    """

    total: float = 0.0
    squared: float = 0.0

    @classmethod
    def of(cls, first: Sequence[Score], second: Sequence[Score]) -> "Paired":
        """Of one member's scores under two models, record by record."""
        pairs = list(zip(first, second, strict=True))
        right = [float(a.right) - float(b.right) for a, b in pairs if a.answer is not None]
        return cls(
            **cls._sums([(a.nll - b.nll, a.tokens) for a, b in pairs if a.tokens]),
            asked=float(len(right)),
            total=sum(right),
            squared=sum(d * d for d in right),
        )

    def difference(self, model: str, other: str) -> Difference | None:
        """The row of the pooled records, the same as of the scores themselves; None without a record."""
        accuracy, loss = self._accuracy(), self._mean() if self.tokens > 0 else None
        if accuracy is None and loss is None:
            return None
        return Difference(model=model, other=other, held_out=POOLED, accuracy=accuracy, log_perplexity=loss)

    def _accuracy(self) -> Estimate | None:
        """`intervals.paired_difference` of the answers, from their sums."""
        n = round(self.asked)
        if n == 0:
            return None
        return intervals.mean_of_sums(self.total, self.squared, n)
