"""Tables of results: honest numbers only, and their way to disk and back."""

import math
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import ValidationError

from allmend.results import (
    AuditTable,
    Budget,
    Comparison,
    Difference,
    Estimate,
    Extraction,
    OwnTable,
    PrivacyTable,
    Table,
    Utility,
    UtilityTable,
    longest_prefix,
)
from allmend.run import RunFolder


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


def test_the_longest_prefix_is_one_that_no_fewer_canaries_were_long_enough_for() -> None:
    def row(prefix: str, tokens: float, n: int = 20) -> Extraction:
        none = Estimate(value=0.0, n=n)
        figures = dict.fromkeys(("exact", "matched", "bleu", "approximate"), none)
        return Extraction(model="arm", copies=1, inserted=True, prefix=prefix, prefix_tokens=tokens, **figures)

    rows = [row(f"{tokens} tokens", tokens) for tokens in (10, 30, 20)]
    assert longest_prefix(rows) == "30 tokens"
    assert longest_prefix([*rows, row("100 tokens", 100, n=3)]) == "30 tokens"
    assert longest_prefix([*rows, row("100 tokens", 100, n=3), row("75 %", 49.6)]) == "75 %"
    assert longest_prefix([]) is None


ESTIMATE = Estimate(value=0.25, low=0.1, high=0.4, n=7)


def test_the_tables_of_the_audit_and_of_privacy_come_back(tmp_path: Path) -> None:
    """Every field set: what a table holds survives its way to disk."""
    tables: list[Table] = [
        filled(AuditTable),
        filled(PrivacyTable),
        filled(Comparison),
        filled(OwnTable),
    ]
    for table in tables:
        again = type(table).model_validate_json(table.model_dump_json())
        assert again == table
        run = RunFolder(tmp_path)
        run.write_table("table", table)
        assert run.read_table("table", type(table)) == table
        assert all(not isinstance(value, tuple | dict) or value for _, value in table)  # nothing was left empty


def filled(kind: Any) -> Any:
    """A value of an annotation, with every field given."""
    if kind is Estimate:
        return ESTIMATE
    if isinstance(kind, type) and issubclass(kind, Table):
        return kind(**{name: filled(field.annotation) for name, field in kind.model_fields.items()})
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return inner[0]
    if origin in (tuple, list):
        return origin([filled(inner[0])])
    if origin is dict:
        return {filled(inner[0]): filled(inner[1])}
    if inner:  # a union with None
        return filled(next(one for one in inner if one is not type(None)))
    return {str: "ä", int: 3, float: 0.1 + 0.2, bool: True}[kind]


def test_a_budget_is_finite() -> None:
    whole = filled(Budget).model_dump()
    for name in ("epsilon", "delta", "clip", "noise_multiplier"):
        for value in (math.inf, math.nan):
            with pytest.raises(ValidationError, match="finite"):
                Budget(**{**whole, name: value})
    assert Budget(**{**whole, "epsilon": None}).epsilon is None
