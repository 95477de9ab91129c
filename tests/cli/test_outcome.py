"""What is printed at the end of a run or an audit."""

from io import StringIO
from pathlib import Path

from rich.console import Console

from allmend.cli.outcome import show_audit, show_outcome
from allmend.intervals import share
from allmend.report.base_rate import outcomes
from allmend.results import AuditTable, Estimate, Extraction, LikelihoodGap
from allmend.run import RunFolder


def test_exact_is_of_the_prefix_that_the_report_shows() -> None:
    """A prefix that few canaries are longer than says nothing of the others."""
    plain = Estimate(value=0.1, n=16)
    rows = tuple(
        Extraction(
            model="fedavg",
            copies=1,
            inserted=inserted,
            prefix=f"{tokens} tokens",
            prefix_tokens=tokens,
            exact=share(out, n),
            matched=plain,
            bleu=plain,
            approximate=plain,
        )
        for tokens, out, n in ((20, 3, 16), (50, 1, 2))
        for inserted in (True, False)
    )
    gap = LikelihoodGap(model="fedavg", copies=1, inserted=plain, control=plain, gap=plain)
    audit = AuditTable(extraction=rows, gaps=(gap,), canaries=16, controls=16, seed=0)
    out = StringIO()
    show_audit(Console(file=out, width=200), audit)
    (outcome,) = outcomes(audit, "fedavg")
    assert outcome.planted.prefix == "20 tokens"
    assert "after a prefix of 20 tokens" in out.getvalue()
    assert "3 of 16" in out.getvalue()
    assert "1 of 2" not in out.getvalue()


def test_folders_and_reasons_are_printed_as_they_are(tmp_path: Path) -> None:
    """What a user calls a folder is no markup."""
    run = RunFolder(tmp_path / "a[bold]" / "[")
    (run.arm("fedavg") / "adapter").mkdir(parents=True)
    run.write_table(
        "audit", AuditTable(extraction=(), gaps=(), refused=("of [/3] none",), canaries=1, controls=1, seed=0)
    )
    out = StringIO()
    show_outcome(Console(file=out, width=200), run)
    assert f"Model   {run.arm('fedavg') / 'adapter'}\n" in out.getvalue()
    assert f"Report  {(run.path / 'report.html').resolve()}\n" in out.getvalue()
    assert "Not given: of [/3] none." in out.getvalue()
