"""How figures are written."""

import math

import pytest

from allmend.report import numbers
from allmend.results import Estimate


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (2481.4, "2,481"),
        (31.42, "31.4"),
        (2.309, "2.31"),
        (0.0042, "0.0042"),
        (-0.5, "−0.50"),
        (-0.0, "0.00"),
        (0, "0.00"),
        (math.nan, "–"),
        (math.inf, "–"),
    ],
)
def test_number(value: float, shown: str) -> None:
    assert numbers.number(value) == shown


@pytest.mark.parametrize(
    ("value", "plain", "signed"),
    [(2.3141, "2.314", "+2.314"), (-0.0126, "−0.013", "−0.013"), (0.0001, "0.000", "0.000"), (math.nan, "–", "–")],
)
def test_losses_to_a_thousandth(value: float, plain: str, signed: str) -> None:
    assert numbers.thousandths(value) == plain
    assert numbers.signed_thousandths(value) == signed


def test_shares_and_points() -> None:
    assert numbers.percent(0.5512) == "55.1\u202f%"
    assert numbers.points(0.2) == "+20.0"
    assert numbers.points(-0.064) == "−6.4"
    assert numbers.points(-0.0001) == "0.0"
    assert numbers.signed(0.8) == "+0.80"


@pytest.mark.parametrize(
    ("value", "shown"), [(1e-5, "10⁻⁵"), (3e-6, "3 × 10⁻⁶"), (2.5e-10, "2.5 × 10⁻¹⁰"), (1.0, "10⁰"), (0.0, "0")]
)
def test_power(value: float, shown: str) -> None:
    assert numbers.power(value) == shown


@pytest.mark.parametrize(
    ("octets", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_846_272, "1.85 MB"), (999_900, "1 MB"), (44_310_528, "44.3 MB")],
)
def test_size(octets: int, shown: str) -> None:
    assert numbers.size(octets).replace("\u202f", " ") == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.84, "0.84 s"), (41.2, "41 s"), (59.7, "1 min 00 s"), (252, "4 min 12 s"), (3780, "1 h 03 min")],
)
def test_duration(seconds: float, shown: str) -> None:
    assert numbers.duration(seconds).replace("\u202f", " ") == shown


def test_evidence_is_honest_without_interval() -> None:
    assert numbers.evidence(Estimate(value=0.5, n=3), numbers.hundredths) == "no interval, n\xa0=\xa03"
