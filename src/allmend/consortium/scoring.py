"""Held-out scores as sums: all that a table of the pooled records needs, and no record's own."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from scipy import stats

from allmend import intervals
from allmend.learn.evaluate import Score
from allmend.results import POOLED, Difference, Estimate, Utility


@dataclass(frozen=True)
class Moments:
    """Sums over held-out records under one model; those of several members add up.

    Attributes:
        records: with a token to score.
        tokens, squared_tokens: Σ t, Σ t².
        nll, squared_nll: Σ ℓ, Σ ℓ² (nats).
        product: Σ ℓ t.
        asked, right: questions, and those answered right.
        chance: Σ 1 / choices.
    """

    records: float = 0.0
    tokens: float = 0.0
    squared_tokens: float = 0.0
    nll: float = 0.0
    squared_nll: float = 0.0
    product: float = 0.0
    asked: float = 0.0
    right: float = 0.0
    chance: float = 0.0

    @classmethod
    def of(cls, scores: Sequence[Score]) -> "Moments":
        """Of one member's scores."""
        learnt = [score for score in scores if score.tokens]
        asked = [score for score in scores if score.answer is not None]
        return cls(
            records=float(len(learnt)),
            tokens=float(sum(score.tokens for score in learnt)),
            squared_tokens=float(sum(score.tokens**2 for score in learnt)),
            nll=math.fsum(score.nll for score in learnt),
            squared_nll=math.fsum(score.nll**2 for score in learnt),
            product=math.fsum(score.nll * score.tokens for score in learnt),
            asked=float(len(asked)),
            right=float(sum(score.right for score in asked)),
            chance=math.fsum(1 / score.choices for score in asked if score.choices),
        )

    def facts(self, prefix: str) -> dict[str, float]:
        """As numbers of a reply."""
        return {f"{prefix}/{field.name}": getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_facts(cls, facts: Mapping[str, float], prefix: str) -> "Moments":
        """What `facts` made numbers of, summed over members; zeros where nobody sent any."""
        return cls(**{field.name: float(facts.get(f"{prefix}/{field.name}", 0.0)) for field in fields(cls)})

    @property
    def possible(self) -> bool:
        """Whether there can be such records: nothing negative, and no more right than asked."""
        found = [getattr(self, field.name) for field in fields(self)]
        return min(found) >= 0 and self.right <= self.asked and (self.tokens > 0) == (self.records > 0)

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
        log, n = self.nll / self.tokens, round(self.records)
        value, total = intervals.exp(log), round(self.tokens)
        if n == 1:
            return Estimate(value=value, n=total)
        residual = max(0.0, self.squared_nll - 2 * log * self.product + log**2 * self.squared_tokens)
        error = math.sqrt(residual * n / (n - 1)) / self.tokens
        half = float(stats.t.ppf(0.5 + intervals.CONFIDENCE / 2, n - 1)) * error
        return Estimate(value=value, low=intervals.exp(log - half), high=intervals.exp(log + half), n=total)


@dataclass(frozen=True)
class Paired:
    """Sums of the differences of two models' answers to the same questions: of d in {−1, 0, 1}, Σ d and Σ d²."""

    asked: float = 0.0
    total: float = 0.0
    squared: float = 0.0

    @classmethod
    def of(cls, first: Sequence[Score], second: Sequence[Score]) -> "Paired":
        """Of one member's scores under two models, record by record."""
        pairs = [(a, b) for a, b in zip(first, second, strict=True) if a.answer is not None]
        differences = [float(a.right) - float(b.right) for a, b in pairs]
        return cls(float(len(pairs)), sum(differences), sum(d * d for d in differences))

    def facts(self, prefix: str) -> dict[str, float]:
        """As numbers of a reply."""
        return {f"{prefix}/{field.name}": getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_facts(cls, facts: Mapping[str, float], prefix: str) -> "Paired":
        """What `facts` made numbers of, summed over members."""
        return cls(**{field.name: float(facts.get(f"{prefix}/{field.name}", 0.0)) for field in fields(cls)})

    def difference(self, model: str, other: str) -> Difference | None:
        """The row of the pooled questions, the same as of the answers themselves; None without a question."""
        n = round(self.asked)
        if n == 0:
            return None
        mean = self.total / n
        spread = max(0.0, self.squared - n * mean * mean)
        found = Estimate(value=mean, n=n)
        if n > 1 and spread > 1e-9:
            half = float(stats.t.ppf(0.5 + intervals.CONFIDENCE / 2, n - 1)) * math.sqrt(spread / (n - 1) / n)
            found = Estimate(value=mean, low=mean - half, high=mean + half, n=n)
        return Difference(model=model, other=other, held_out=POOLED, accuracy=found)
