import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allmend.federation.privacy.secure_sum import FixedPoint


def uniform(seed: int = 0) -> Any:
    return np.random.default_rng(seed).random


@settings(deadline=None)
@given(
    values=st.lists(st.lists(st.floats(-3, 3), min_size=4, max_size=4), min_size=1, max_size=9),
    bits=st.sampled_from([32, 64]),
)
def test_a_sum_of_codes_stands_for_the_sum_of_the_values(values: list[list[float]], bits: Any) -> None:
    code = FixedPoint(clip=3.0, members=len(values), bits=bits)
    coded = [code.encode(np.array(row), uniform(place))[0] for place, row in enumerate(values)]
    total = coded[0].copy()
    for one in coded[1:]:
        total += one
    error = np.abs(code.decode(total) - np.sum(values, axis=0)).max()
    assert error <= len(values) * (code.step + 3e-16 * 3 * len(values))


def test_rounding_has_no_bias_and_stays_between_neighbours() -> None:
    code = FixedPoint(clip=1.0, members=3, levels=10)
    values = np.array([0.0, 0.03, -0.03, 0.1, 0.999, -0.5501])
    drawn = np.stack([code.decode(code.encode(values, uniform(seed))[0]) for seed in range(4000)])
    assert (np.abs(drawn - values) < code.step * (1 + 1e-9)).all()
    assert (np.abs(drawn[:, [0, 3]] - values[[0, 3]]) < 1e-12).all()  # what is on a level stays
    spread = code.step / 2 / math.sqrt(4000)
    assert (np.abs(drawn.mean(0) - values) < 5 * spread).all()


def test_what_is_too_large_is_cut_and_counted() -> None:
    code = FixedPoint(clip=2.0, members=4)
    coded, beyond = code.encode(np.array([1e300, -5.0, 2.0, -2.0, 0.5]), uniform())
    np.testing.assert_allclose(code.decode(coded), [2, -2, 2, -2, 0.5], atol=code.step)
    assert beyond == 2


@pytest.mark.parametrize("bits", [32, 64])
def test_the_largest_sum_does_not_wrap_around(bits: Any) -> None:
    for members in (3, 32, 1000):
        code = FixedPoint(clip=1.0, members=members, bits=bits)
        for sign in (1.0, -1.0):
            coded, _ = code.encode(np.full(3, sign), uniform())
            total = coded.copy()
            for _ in range(members - 1):
                total += coded
            np.testing.assert_allclose(code.decode(total), sign * members, rtol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        FixedPoint(clip=1.0, members=3).encode(np.array([0.0, value]), uniform())


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"clip": 0.0}, "positive number, got 0"),
        ({"clip": math.inf}, "positive number"),
        ({"clip": math.nan}, "positive number"),
        ({"members": 0}, "1 member or more, got 0"),
        ({"levels": 0}, "1 level or more, got 0"),
        ({"levels": 2**30}, "3 members × 1073741824 levels = 3,221,225,472 do not fit 32 bits"),
        ({"levels": 2**53, "clip": 1.0, "bits": 64, "members": 3}, "levels are exact"),
    ],
)
def test_a_sum_that_could_wrap_around_is_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        FixedPoint(**{"clip": 1.0, "members": 3} | settings)
