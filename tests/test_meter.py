"""The meter of a phase: shares that rise to one, told sparingly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allmend.events import Event, PhaseDone, WorkDone
from allmend.meter import Meter


@given(st.lists(st.integers(1, 1000), max_size=300), st.floats(0, 1e5))
def test_shares_rise_in_steps_of_a_hundredth_and_end_at_most_at_one(parts: list[int], expected: float) -> None:
    told: list[Event] = []
    meter = Meter(told.append, "evaluate base", expected)
    for part in parts:
        meter.add(part)
    meter.done()
    shares = [event.share for event in told if isinstance(event, WorkDone)]
    assert all(later - earlier > 0.0099 for earlier, later in zip([0.0, *shares], shares, strict=False))
    assert all(share <= 1 for share in shares)
    assert len(shares) <= 100
    (end,) = (event for event in told if isinstance(event, PhaseDone))
    assert told[-1] == end
    assert (end.phase, end.tokens) == ("evaluate base", sum(parts))
    assert end.seconds >= 0


def test_a_share_is_of_the_expected_tokens() -> None:
    told: list[Event] = []
    meter = Meter(told.append, "p", 200.0)
    for tokens in (1, 49, 150, 100):
        meter.add(tokens)
    assert [event.share for event in told if isinstance(event, WorkDone)] == pytest.approx([0.25, 1.0])
