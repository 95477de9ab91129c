"""Losses of many ways to run a model on the same text, window by window, the hopeless ones no longer than it takes."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from allmend.data.windows import Windows
from allmend.depth.decoder import Decoder
from allmend.depth.plan import Intervention, Plan, Step
from allmend.errors import UserError
from allmend.intervals import mean, paired_difference
from allmend.results import SEQUENTIAL, Estimate

ERRORS = 4.0
"""Standard errors by which a candidate must be behind the best of its rivals to be dropped."""


@dataclass(frozen=True)
class Candidate:
    """A way to run a model.

    Attributes:
        kind: of intervention.
        start, end: of the stretch that it changes.
        change: itself.
        rivals: candidates of the same name compete: one that is clearly behind is dropped early; all of "" are kept.
    """

    kind: str
    start: int
    end: int
    change: Intervention
    rivals: str = ""


@dataclass
class Measured:
    """What a candidate came to so far.

    Attributes:
        steps: what the decoder does.
        losses: of each token (nats), window by window, float32 [tokens − 1].
        seconds: that it took.
        dropped: whether it was left before the end of the text.
    """

    steps: tuple[Step, ...]
    losses: list[np.ndarray] = field(default_factory=list)
    seconds: float = 0.0
    dropped: bool = False

    @property
    def depth(self) -> int:
        """Sequential steps."""
        return len(self.steps)

    @property
    def loss(self) -> float:
        """Mean over tokens (nats): the logarithm of the perplexity."""
        return float(np.mean(np.concatenate(self.losses), dtype=np.float64))

    @property
    def tokens(self) -> int:
        return sum(map(len, self.losses))


def behind(one: Measured, other: Measured) -> tuple[float, float]:
    """By how much `one`'s loss is above `other`'s on the windows of both, and the standard error over tokens."""
    windows = min(len(one.losses), len(other.losses))
    gap = np.concatenate(one.losses[:windows]).astype(np.float64) - np.concatenate(other.losses[:windows])
    return float(gap.mean()), float(gap.std(ddof=1) / np.sqrt(len(gap)))


def added(one: Measured, other: Measured) -> Estimate:
    """`behind` with an interval over windows, whose tokens depend on one another."""
    windows = min(len(one.losses), len(other.losses))
    means = [[float(np.mean(w, dtype=np.float64)) for w in some.losses[:windows]] for some in (one, other)]
    return paired_difference(*means)


def perplexity(one: Measured) -> Estimate:
    """exp of the mean loss, with an interval over windows."""
    log = mean([float(np.mean(window, dtype=np.float64)) for window in one.losses])
    low, high = (None if end is None else float(np.exp(end)) for end in (log.low, log.high))
    return Estimate(value=float(np.exp(one.loss)), low=low, high=high, n=one.tokens)


def sequential(layers: int) -> Candidate:
    """The model as it is."""
    return Candidate(SEQUENTIAL, 0, 0, Plan(tuple((layer,) for layer in range(layers))))


def measure(
    decoder: Decoder,
    windows: Windows,
    candidates: Sequence[Candidate],
    *,
    known: Mapping[Candidate, Measured] | None = None,
    errors: float = ERRORS,
    keep: int = 1,
    after_window: Callable[[int, Mapping[Candidate, Measured]], None] = lambda window, found: None,
    on_candidate: Callable[[float], None] = lambda share: None,
) -> dict[Candidate, Measured]:
    """Measure candidates on all windows, and drop those that fall behind.

    Windows are gone through one after the other, and all candidates with each: a trunk is computed once for all of
    them, and memory does not grow with the text.

    Args:
        decoder: the model.
        windows: the text.
        candidates: in any order, none twice.
        known: what was found before, and what is gone on from.
        errors: standard errors behind the best rival at which a candidate is dropped.
        keep: rivals that are wanted: it is the last of so many best that a candidate must be behind.
        after_window: told the windows done and all that was found so far.
        on_candidate: told the share of the work that is done, as if nobody were dropped from here on.

    Raises:
        UserError: the model as it is has a loss that is no number.
    """
    found = {one: (known or {}).get(one) or Measured(one.change.steps(len(decoder.layers))) for one in candidates}
    _drop(found, errors, keep)  # of what is known
    for place in range(len(windows)):
        left = [one for one, so_far in found.items() if len(so_far.losses) == place and not so_far.dropped]
        if not left:
            continue
        trunk = decoder.trunk(windows.ids[place : place + 1])
        for number, one in enumerate(left):
            so_far = found[one]
            start = time.perf_counter()
            losses = decoder.losses(trunk, so_far.steps, decoder.modules(so_far.steps))
            so_far.losses.append(_finite(one, losses[0].cpu().numpy(), windows))
            so_far.seconds += time.perf_counter() - start
            on_candidate((place + (number + 1) / len(left)) / len(windows))
        _drop(found, errors, keep)
        after_window(place + 1, found)
    return found


def _finite(one: Candidate, losses: np.ndarray, windows: Windows) -> np.ndarray:
    """Losses as they are, and infinite where a change has left no number."""
    if np.isfinite(losses).all():
        return losses
    if one.kind == SEQUENTIAL:
        raise UserError(
            "the model's loss on the text is no number: its weights are damaged, or its precision does not hold them",
            where=windows.source,
            hint="Load it elsewhere and look at its weights, or use another one.",
        )
    found: np.ndarray = np.nan_to_num(losses, nan=np.inf, posinf=np.inf)
    return found


def _drop(found: Mapping[Candidate, Measured], errors: float, keep: int) -> None:
    for rivals in {one.rivals for one in found} - {""}:
        running = [some for one, some in found.items() if one.rivals == rivals and some.losses and not some.dropped]
        if not running:
            continue
        *_, last = sorted(running, key=lambda some: some.loss)[:keep]
        for one in running:
            gap, error = behind(one, last)
            # an infinite loss has no standard error, and is behind all the same
            one.dropped = gap > 0 and not gap <= errors * error
