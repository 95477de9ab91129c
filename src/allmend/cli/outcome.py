"""The end of a run on the terminal: the figures that matter, and where everything lies."""

from rich.console import Console
from rich.table import Table

from allmend.results import POOLED, AuditTable, Estimate, UtilityTable
from allmend.run import RunFolder


def show_outcome(console: Console, run: RunFolder) -> None:
    """Print pooled utility, paired differences and the memorisation gap, then the paths of the report and models."""
    if utility := run.read_table("utility", UtilityTable):
        _show_utility(console, utility)
    if audit := run.read_table("audit", AuditTable):
        show_audit(console, audit)
    outcomes = [path for what in ("adapter", "model", "members") for path in run.path.glob(f"arms/*/{what}")]
    for folder in sorted(outcomes):
        console.print(f"Model   {folder}", highlight=False, soft_wrap=True)
    console.print(f"Report  {(run.path / 'report.html').resolve()}", highlight=False, soft_wrap=True)


def _show_utility(console: Console, utility: UtilityTable) -> None:
    table = Table("model", "accuracy", "perplexity", title="Held-out records of all clients")
    for row in utility.rows:
        if row.held_out == POOLED:
            name = f"{row.model} of {row.member}" if row.member else row.model
            table.add_row(name, _share(row.accuracy), _plain(row.perplexity))
    console.print(table)
    for difference in utility.differences:
        if difference.held_out == POOLED:
            other = f"the mean of members' {difference.other}" if difference.other_is_member_mean else difference.other
            console.print(f"{difference.model} against {other}: {_points(difference.accuracy)}", highlight=False)


def show_audit(console: Console, audit: AuditTable) -> None:
    """Print the likelihood gap and exact extraction by model and number of copies."""
    table = Table(
        "model",
        "copies",
        "gap (nats per token)",
        "exact, inserted",
        "exact, controls",
        title="Memorisation of canaries",
    )
    longest = max((row.prefix_tokens for row in audit.extraction), default=0)
    exact = {
        (row.model, row.copies, row.inserted): row.exact for row in audit.extraction if row.prefix_tokens == longest
    }
    for gap in audit.gaps:
        cells = [_count(exact.get((gap.model, gap.copies, inserted))) for inserted in (True, False)]
        table.add_row(gap.model, str(gap.copies), _plain(gap.gap, "+.2f"), *cells)
    console.print(table)
    exact_means = f"Exact: the whole rest of a canary after a prefix of {longest} tokens."
    if not longest:
        exact_means = "No prefix was tried: every canary is shorter."
    elif audit.skipped_prefixes:
        exact_means += f" {audit.skipped_prefixes:,} prefixes were left out: they are longer than their canaries."
    console.print(f"Intervals are 95 %. {exact_means}", highlight=False)


def _share(estimate: Estimate | None) -> str:
    if estimate is None:
        return "no questions"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.0%}"
    return f"{estimate.value:.1%} ({estimate.low:.1%} to {estimate.high:.1%}, n = {estimate.n:,})"


def _points(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{100 * estimate.value:+.1f} points"
    return f"{100 * estimate.value:+.1f} points ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})"


def _plain(estimate: Estimate | None, form: str = ".2f") -> str:
    if estimate is None:
        return "none"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{form}}"
    return f"{estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"


def _count(estimate: Estimate | None) -> str:
    return "none" if estimate is None else f"{round(estimate.value * estimate.n)} of {estimate.n}"
