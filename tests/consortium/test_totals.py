"""Which two totals may stand side by side: those whose difference is nobody's part."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from allmend.consortium.totals import Total, Totals
from allmend.errors import UserError

BLOCKS = Total(("block", "size"), ("east", "north", "south"), None, 32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"groups": ("correction",), "members": ("east", "north")}, ""),
        ({"groups": (), "members": ("east", "north")}, ""),
        ({"members": ("east", "north")}, "south would make the difference"),
        ({"groups": ("correction", "size"), "members": ("east", "north")}, "size were summed over east, north, south"),
        ({"members": ("east", "north", "south", "west")}, "west would make the difference"),
        ({"clip": 0.5}, "no clip before, and now with clip = 0.5"),
        ({"min_records": 33}, "min_records = 32 before, and now with 33"),
    ],
)
def test_what_would_show_somebodys_part_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path, asked = tmp_path / "totals.json", replace(BLOCKS, **changes)
    Totals(path, "fedavg").keep(BLOCKS)
    assert (words in asked.apart(BLOCKS)) if words else (asked.apart(BLOCKS) == "")
    if not words:
        Totals(path, "fedavg").check(asked)
        return
    for refusing in (Totals(path, "fedavg").check, Totals(path, "fedavg").keep):
        with pytest.raises(UserError, match="fedavg"):
            refusing(asked)
    Totals(path, "fedavg", again=True).keep(asked)
    with pytest.raises(UserError):
        Totals(path, "fedavg").check(BLOCKS)  # now there is another beside it


def test_held_out_records_have_no_norm_and_no_fewest() -> None:
    target = replace(BLOCKS, groups=("target",))
    assert replace(target, clip=0.5, min_records=1).apart(target) == ""
    assert "target were summed" in replace(target, members=("east",)).apart(target)


def test_totals_stay_in_mind_and_the_same_stands_once(tmp_path: Path) -> None:
    path = tmp_path / "totals.json"
    for _ in range(2):
        Totals(path, "fedavg").keep(BLOCKS)
        Totals(path, "fedavg").keep(replace(BLOCKS, groups=()))
    assert path.read_text().count("block") == 1
    path.write_text("[1]")
    with pytest.raises(UserError, match="cannot be read"):
        Totals(path, "fedavg").check(BLOCKS)
