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
        log = _ratio(self.records, self.tokens, self.squared_tokens, self.nll, self.squared_nll, self.product)
        ends = {side: intervals.exp(end) for side in ("low", "high") if (end := getattr(log, side)) is not None}
        return Estimate(value=intervals.exp(log.value), n=log.n, **ends)


@dataclass(frozen=True)
class Paired:
    """Sums of the differences of two models on the same records; those of several members add up.

    Attributes:
        asked, total, squared: questions, and Σ d and Σ d² of d in {−1, 0, 1}, whether it is answered right.
        records, tokens, squared_tokens: as in `Moments`.
        nll, squared_nll, product: Σ δ, Σ δ² and Σ δ t of the difference δ of the losses (nats).
    """

    asked: float = 0.0
    total: float = 0.0
    squared: float = 0.0
    records: float = 0.0
    tokens: float = 0.0
    squared_tokens: float = 0.0
    nll: float = 0.0
    squared_nll: float = 0.0
    product: float = 0.0

    @classmethod
    def of(cls, first: Sequence[Score], second: Sequence[Score]) -> "Paired":
        """Of one member's scores under two models, record by record."""
        pairs = list(zip(first, second, strict=True))
        right = [float(a.right) - float(b.right) for a, b in pairs if a.answer is not None]
        losses = [(a.nll - b.nll, a.tokens) for a, b in pairs if a.tokens]
        return cls(
            asked=float(len(right)),
            total=sum(right),
            squared=sum(d * d for d in right),
            records=float(len(losses)),
            tokens=float(sum(tokens for _, tokens in losses)),
            squared_tokens=float(sum(tokens**2 for _, tokens in losses)),
            nll=math.fsum(loss for loss, _ in losses),
            squared_nll=math.fsum(loss**2 for loss, _ in losses),
            product=math.fsum(loss * tokens for loss, tokens in losses),
        )

    def facts(self, prefix: str) -> dict[str, float]:
        """As numbers of a reply."""
        return {f"{prefix}/{field.name}": getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_facts(cls, facts: Mapping[str, float], prefix: str) -> "Paired":
        """What `facts` made numbers of, summed over members."""
        return cls(**{field.name: float(facts.get(f"{prefix}/{field.name}", 0.0)) for field in fields(cls)})

    def difference(self, model: str, other: str) -> Difference | None:
        """The row of the pooled records, the same as of the scores themselves; None without a record."""
        accuracy, loss = self._accuracy(), None
        if self.tokens > 0:
            sums = (self.nll, self.squared_nll, self.product)
            loss = _ratio(self.records, self.tokens, self.squared_tokens, *sums)
        if accuracy is None and loss is None:
            return None
        return Difference(model=model, other=other, held_out=POOLED, accuracy=accuracy, log_perplexity=loss)

    def _accuracy(self) -> Estimate | None:
        """`intervals.paired_difference` of the answers, from their sums."""
        n = round(self.asked)
        if n == 0:
            return None
        mean = self.total / n
        spread = max(0.0, self.squared - n * mean * mean)
        if n == 1 or spread <= 1e-9:
            return Estimate(value=mean, n=n)
        half = float(stats.t.ppf(0.5 + intervals.CONFIDENCE / 2, n - 1)) * math.sqrt(spread / (n - 1) / n)
        return Estimate(value=mean, low=mean - half, high=mean + half, n=n)


def _ratio(
    records: float, tokens: float, squared_tokens: float, total: float, squared: float, product: float
) -> Estimate:
    """`intervals.ratio` of the records' sums s over their tokens t, from Σ t, Σ t², Σ s, Σ s² and Σ s t."""
    value, n = total / tokens, round(records)
    residual = squared - 2 * value * product + value**2 * squared_tokens
    if n <= 1 or residual <= intervals.ROUNDING * squared:
        return Estimate(value=value, n=round(tokens))
    error = math.sqrt(residual * n / (n - 1)) / tokens
    half = float(stats.t.ppf(0.5 + intervals.CONFIDENCE / 2, n - 1)) * error
    return Estimate(value=value, low=value - half, high=value + half, n=round(tokens))
