"""`allmend attribute`: the ends of the list, clients, how sure it is; for programs, JSON."""

import json
from pathlib import Path

import pytest
from tests.cli.conftest import Allmend

ADAPTER = "runs/tiny/arms/fedavg/adapter"
GIVEN = ("--adapter", ADAPTER, "--train", "north.jsonl", "--train", "south.jsonl", "--target", "north.jsonl")


@pytest.fixture
def run(allmend: Allmend, workplace: Path) -> Path:
    assert allmend("tune", "recipe.toml").code == 0
    return workplace


def test_records_clients_and_their_sureness_are_shown(allmend: Allmend, run: Path) -> None:
    shown = allmend("attribute", "model", *GIVEN, "--out", "found")
    assert (shown.code, shown.err) == (0, "")
    text = " ".join(shown.out.split())
    for words in (
        "Most helpful",
        "Most harmful",
        "By client",
        "training on the record lowers the target's loss",
        "Damping 0.1",
        "halves of the target records",
        "Written to found",
    ):
        assert words in text
    assert max(map(len, shown.out.splitlines())) <= 120
    assert Path("found/influence.parquet").exists()
    found = json.loads(allmend("attribute", "run", "model", *GIVEN, "--json").out)
    assert {row["client"] for row in found["rows"]} == {"north", "south"}
    assert found["table"]["method"] == "gfim"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--method", "magic"), "there is no method 'magic'"),
        (("--targets", "some"), "'some' is none of mean, each and group:FIELD"),
        (("--side", "tall"), "'tall' is none of wide, rank"),
        (("--damping", "0"), "damping must be above 0"),
        (("--targets", "group:nothing"), "no label to group them by"),
    ],
)
def test_what_cannot_be_is_told(words: tuple[str, ...], told: str, allmend: Allmend, run: Path) -> None:
    shown = allmend("attribute", "model", *GIVEN, *words)
    assert shown.code == 2
    assert told in shown.err
