"""What a reader should know of a run before anything else: one figure and one sentence to each question."""

from dataclasses import dataclass

from allmend.results import Estimate


@dataclass(frozen=True)
class Finding:
    """An answer.

    Attributes:
        question: that a reader asks.
        figure: that carries the answer.
        about: what it is a figure of.
        sentence: the answer in words, with interval and n.
    """

    question: str
    figure: str
    about: str
    sentence: str


def verdict(difference: Estimate) -> int:
    """1 or −1 when the interval lies on one side of zero, 0 when it does not or there is none."""
    if difference.low is None or difference.high is None:
        return 0
    return 1 if difference.low > 0 else -1 if difference.high < 0 else 0
