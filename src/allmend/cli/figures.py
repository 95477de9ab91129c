"""Estimates in words, for the terminal."""

from allmend.results import Estimate


def share(estimate: Estimate | None, *, absent: str = "none") -> str:
    """`54 % (48 to 60 %, n = 240)`."""
    if estimate is None:
        return absent
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.0%}"
    return f"{estimate.value:.1%} ({estimate.low:.1%} to {estimate.high:.1%}, n = {estimate.n:,})"


def points(estimate: Estimate | None) -> str:
    """A difference of shares: `+18.3 points (+11.4 to +25.3)`."""
    if estimate is None:
        return "none"
    if estimate.low is None or estimate.high is None:
        return f"{100 * estimate.value:+.1f} points"
    return f"{100 * estimate.value:+.1f} points ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})"


def plain(estimate: Estimate | None, form: str = ".2f") -> str:
    """`0.95 (0.45 to 1.46)`."""
    if estimate is None:
        return "none"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{form}}"
    return f"{estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"


def count(estimate: Estimate | None) -> str:
    """A share as a count: `3 of 16`."""
    return "none" if estimate is None else f"{round(estimate.value * estimate.n)} of {estimate.n}"
