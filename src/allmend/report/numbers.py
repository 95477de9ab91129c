"""Figures as a reader wants them: rounded to what they carry, with units, a real minus sign, unbroken."""

import math
from collections.abc import Callable
from datetime import UTC, datetime

from allmend.results import Estimate

THIN = "\u202f"
"""Narrow no-break space, between a figure and its unit."""
NONE = "–"
"""Stands where there is no figure, or one that is not finite."""

Format = Callable[[float], str]


def _signed(text: str) -> str:
    if text.lstrip("-0.,") == "":  # a rounded zero has no sign
        return text.lstrip("-")
    return text.replace("-", "−")


def number(value: float) -> str:
    """A plain figure with about three significant digits: 2,481, 31.4, 2.31, 0.0042."""
    if not math.isfinite(value):
        return NONE
    size = abs(value)
    if size >= 100:
        return _signed(f"{value:,.0f}")
    if size >= 10:
        return _signed(f"{value:.1f}")
    if size >= 0.01 or size == 0:
        return _signed(f"{value:.2f}")
    return _signed(f"{value:.1e}" if size < 1e-4 else f"{value:.2g}")


def tick(value: float) -> str:
    """A figure on an axis: as short as it can be without loss."""
    return _signed(f"{value:,.6g}" if abs(value) < 1e6 else f"{value:.3g}")


def percent(share: float, digits: int = 1) -> str:
    """A share in [0, 1] as a percentage: 0.5512 → 55.1 %."""
    return _signed(f"{100 * share:.{digits}f}") + THIN + "%" if math.isfinite(share) else NONE


def hundredths(share: float, digits: int = 1) -> str:
    """A share as a percentage without its sign, for the ends of an interval."""
    return _signed(f"{100 * share:.{digits}f}") if math.isfinite(share) else NONE


def points(difference: float, digits: int = 1) -> str:
    """A difference of two shares in percentage points, with its sign: 0.2 → +20.0."""
    if not math.isfinite(difference):
        return NONE
    text = f"{100 * difference:+.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else _signed(text)


def signed(value: float) -> str:
    """`number` with a plus sign for what is above zero."""
    text = number(value)
    return f"+{text}" if value > 0 and text.strip("0.") else text


def thousandths(value: float) -> str:
    """A loss in nats per token, of which differences of a hundredth count: 2.314."""
    return _signed(f"{value:.3f}") if math.isfinite(value) else NONE


def signed_thousandths(value: float) -> str:
    """`thousandths` with a plus sign for what is above zero."""
    text = thousandths(value)
    return f"+{text}" if value > 0 and text.strip("0.") else text


def power(value: float) -> str:
    """A small figure as a power of ten: 0.00001 → 10⁻⁵, 0.000003 → 3 × 10⁻⁶."""
    if value == 0:
        return "0"
    digits, _, exponent = f"{value:.1e}".partition("e")
    raised = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return raised if float(digits) == 1 else f"{digits.removesuffix('.0')} × {raised}"


def chance(p: float) -> str:
    """A p-value: 0.034, 3 × 10⁻⁵."""
    return power(p) if p < 0.001 else number(p)


def count(value: float) -> str:
    """A whole number with separated thousands: 460,800."""
    return f"{value:,.0f}"


def out_of(part: float, whole: float) -> str:
    """A part of what was counted: 3 of 16."""
    return f"{count(part)} of {count(whole)}"


def counted(value: int, noun: str, plural: str | None = None) -> str:
    """A count with its noun: 1 copy, 3 copies."""
    return f"{count(value)} {noun if value == 1 else plural or noun + 's'}"


def size(octets: float) -> str:
    """A number of bytes in decimal units: 1.84 MB."""
    if octets < 1000:
        return f"{octets:.0f}{THIN}B"
    for unit in ("kB", "MB", "GB", "TB"):
        octets /= 1000
        if octets < 999.5 or unit == "TB":
            break
    return f"{octets:.3g}{THIN}{unit}" if octets < 999.5 else f"{octets:,.0f}{THIN}{unit}"


def duration(seconds: float) -> str:
    """A length of time: 0.84 s, 41 s, 4 min 12 s, 1 h 03 min."""
    if not math.isfinite(seconds):
        return NONE
    if seconds < 10:
        return f"{seconds:.2g}{THIN}s"
    if round(seconds) < 60:
        return f"{seconds:.0f}{THIN}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{THIN}min {rest:02d}{THIN}s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours}{THIN}h {minutes:02d}{THIN}min"


def moment(time: float) -> str:
    """Seconds since the epoch as a date and time of day in UTC."""
    at = datetime.fromtimestamp(time, UTC)
    return f"{at.day} {at:%B %Y, %H:%M} UTC"


def has_interval(estimate: Estimate) -> bool:
    """Whether both ends of the 95 % interval are there and finite."""
    return all(end is not None and math.isfinite(end) for end in (estimate.low, estimate.high))


def interval(estimate: Estimate, form: Format) -> str:
    """The 95 % interval in words, `48.1 to 61.7`, or an empty text when there is none."""
    if estimate.low is None or estimate.high is None or not has_interval(estimate):
        return ""
    return f"{form(estimate.low)} to {form(estimate.high)}"


def sample(estimate: Estimate) -> str:
    """The sample size, unbroken: n = 240."""
    return f"n\u00a0=\u00a0{count(estimate.n)}"


def evidence(estimate: Estimate, form: Format) -> str:
    """What stands behind a figure: `95 % interval 14 to 26, n = 240`."""
    ends = interval(estimate, form)
    behind = f"95{THIN}% interval {ends}" if ends else "no interval"
    return f"{behind}, {sample(estimate)}"
