"""Tables of results: honest numbers only, and their way to disk and back."""

import math

import pytest
from pydantic import ValidationError

from allmend.results import Difference, Estimate, Utility, UtilityTable


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["value", "low", "high"])
def test_an_estimate_is_finite(name: str, value: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        Estimate(**{"value": 0.5, "low": 0.0, "high": 1.0, "n": 3, name: value})  # type: ignore[arg-type]


def test_a_table_comes_back_bit_for_bit() -> None:
    estimate = Estimate(value=1 / 3, low=-1e-300, high=0.1 + 0.2, n=12)
    table = UtilityTable(
        rows=(
            Utility(model="base", held_out="pooled", perplexity=estimate, by_kind={"a kind": estimate}),
            Utility(model="local", member="north", held_out="south", accuracy=Estimate(value=1.0, n=1)),
        ),
        differences=(Difference(model="a", other="b", held_out="c", accuracy=estimate, other_is_member_mean=True),),
        seed=0,
    )
    assert UtilityTable.model_validate_json(table.model_dump_json()) == table


def test_tables_do_not_change_and_take_nothing_unknown() -> None:
    estimate = Estimate(value=0.5, n=1)
    with pytest.raises(ValidationError, match="frozen"):
        estimate.value = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="extra"):
        Estimate(value=0.5, n=1, spread=0.1)  # type: ignore[call-arg]
