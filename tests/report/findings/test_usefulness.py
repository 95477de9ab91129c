"""Whom it helped: members are counted by what is shown of each, not by point estimates."""

from pathlib import Path

import pytest

from allmend.report.evidence import read_evidence
from allmend.report.findings import verdict
from allmend.report.findings.usefulness import by_member
from allmend.results import BASE, POOLED, Estimate, UtilityTable


def rewrite(run: Path, bounds: dict[str, tuple[float, float, float]], *, questions: bool = True) -> None:
    """Give fedavg these differences to the base model by client."""
    path = run / "results/utility.json"
    table = UtilityTable.model_validate_json(path.read_bytes())
    found = []
    for one in table.differences:
        if one.other == BASE and one.model == "fedavg" and one.held_out != POOLED:
            value, low, high = bounds[one.held_out]
            difference = Estimate(value=value, low=low, high=high, n=60)
            changes = {"accuracy": difference} if questions else {"accuracy": None, "log_perplexity": difference}
            one = one.model_copy(update=changes)
        found.append(one)
    path.write_text(table.model_copy(update={"differences": tuple(found)}).model_dump_json())


UP, LEVEL, DOWN = (0.3, 0.1, 0.5), (0.1, -0.1, 0.3), (-0.2, -0.3, -0.1)


@pytest.mark.parametrize("questions", [True, False])
def test_members_with_a_shown_gain_are_counted(run: Path, questions: bool) -> None:
    clients = ["injuries", "musculoskeletal", "eye-and-ear", "mental-health"]
    sides = [UP, LEVEL, DOWN, UP]
    if not questions:  # of perplexity, less is better
        sides = [(-value, -high, -low) for value, low, high in sides]
    rewrite(run, dict(zip(clients, sides, strict=True)), questions=questions)
    finding = by_member(read_evidence(run), "fedavg")
    assert finding is not None
    assert finding.figure == "2 of 4"
    assert "for 2 of 4, and worse for 1 (n = 60 each)" in finding.sentence
    assert "least for eye-and-ear" in finding.sentence
    assert ("questions" in finding.sentence) is questions


def test_of_one_member_there_is_nothing_to_count(run: Path) -> None:
    path = run / "results/utility.json"
    table = UtilityTable.model_validate_json(path.read_bytes())
    pooled = tuple(one for one in table.differences if one.held_out in (POOLED, "injuries"))
    path.write_text(table.model_copy(update={"differences": pooled}).model_dump_json())
    assert by_member(read_evidence(run), "fedavg") is None


def test_a_verdict_needs_the_whole_interval_on_one_side() -> None:
    for low, high, said in ((0.1, 0.2, 1), (-0.2, -0.1, -1), (-0.1, 0.1, 0), (0.0, 0.1, 0), (None, 0.1, 0)):
        assert verdict(Estimate(value=0.05, low=low, high=high, n=9)) == said
