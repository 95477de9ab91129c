"""What is printed of a member's own records."""

from io import StringIO

from rich.console import Console

from allmend.cli.own import show_own
from allmend.intervals import mean, share
from allmend.results import OwnRecords, OwnTable


def test_ids_and_names_are_printed_as_they_are() -> None:
    """What a user calls a record or an arm is no markup."""
    out = StringIO()
    row = OwnRecords(
        model="arm[/]",
        completed=share(1, 2),
        completed_by_base=share(0, 2),
        only_by_model=["pmc[/3]", "[bold]x"],
        matched=mean([0.5, 1.0]),
        matched_by_base=mean([0.0, 0.1]),
        likelihood_gain=mean([0.5, 0.6]),
    )
    none = row.model_copy(update={"only_by_model": []})
    show_own(Console(file=out, width=200), OwnTable(records=(row, none), controls=(), rows=()))
    text = out.getvalue()
    assert "arm[/] completes what the base model does not: pmc[/3], [bold]x" in text
    assert "arm[/] completes none of your records" in text
    assert text.count("arm[/]") == 3
