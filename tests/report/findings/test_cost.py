"""What left each member, and what it cost."""

from pathlib import Path

from allmend.events import RoundDone, read_events
from allmend.report import numbers
from allmend.report.evidence import read_evidence
from allmend.report.findings.cost import cost, left
from allmend.results import PrivacyTable


def rounds_of(run: Path, arm: str) -> list[RoundDone]:
    return [event for event in read_events(run / "events.jsonl") if isinstance(event, RoundDone) and event.arm == arm]


def test_what_leaves_is_the_largest_of_what_members_sent_and_says_whether_it_was_hidden(run: Path) -> None:
    largest = max(octets for one in rounds_of(run, "fedavg") for octets in one.received.values())
    finding = left(read_evidence(run), "fedavg")
    assert finding is not None
    assert finding.figure == numbers.size(largest)
    assert "Whoever sums the changes could see each." in finding.sentence
    words = ("secure aggregation: changes cut to ±1, summed as integers over 3 members or more",)
    (run / "results/privacy.json").write_text(PrivacyTable(layers={"fedavg": words}).model_dump_json())
    finding = left(read_evidence(run), "fedavg")
    assert finding is not None
    assert "Changes are summed behind masks." in finding.sentence


def test_where_nothing_travels_nothing_left(run: Path) -> None:
    assert left(read_evidence(run), "local") is None
    assert left(read_evidence(run), "no such arm") is None
    assert cost(read_evidence(run), "no such arm") is None


def test_the_cost_is_that_of_all_rounds(run: Path) -> None:
    rounds = rounds_of(run, "fedavg")
    finding = cost(read_evidence(run), "fedavg")
    assert finding is not None
    assert finding.figure == numbers.duration(sum(one.seconds for one in rounds))
    assert f"{numbers.count(sum(one.tokens for one in rounds))} tokens" in finding.sentence
