"""The end of a run on the terminal: the figures that matter, and where everything lies."""

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from allmend.cli.figures import count, plain, points, share
from allmend.results import POOLED, AuditTable, UtilityTable, longest_prefix
from allmend.run import RunFolder


def show_outcome(console: Console, run: RunFolder) -> None:
    """Print pooled utility, paired differences and the memorisation gap, then the paths of the report and models."""
    if utility := run.read_table("utility", UtilityTable):
        _show_utility(console, utility)
    if audit := run.read_table("audit", AuditTable):
        show_audit(console, audit)
    outcomes = [path for what in ("adapter", "model", "members") for path in run.path.glob(f"arms/*/{what}")]
    for folder in sorted(outcomes):
        console.print(f"Model   {escape(str(folder))}", highlight=False, soft_wrap=True)
    console.print(f"Report  {escape(str((run.path / 'report.html').resolve()))}", highlight=False, soft_wrap=True)


def _show_utility(console: Console, utility: UtilityTable) -> None:
    table = Table("model", "accuracy", "perplexity", title="Held-out records of all clients")
    for row in utility.rows:
        if row.held_out == POOLED:
            name = f"{row.model} of {row.member}" if row.member else row.model
            table.add_row(name, share(row.accuracy, absent="no questions"), plain(row.perplexity))
    console.print(table)
    for difference in utility.differences:
        if difference.held_out == POOLED:
            other = f"the mean of members' {difference.other}" if difference.other_is_member_mean else difference.other
            found = [points(difference.accuracy)] if difference.accuracy else []
            if difference.log_perplexity:
                found.append(f"log-perplexity {plain(difference.log_perplexity, '+.3f')} nats per token")
            console.print(f"{difference.model} against {other}: {', '.join(found)}", highlight=False)


def show_audit(console: Console, audit: AuditTable) -> None:
    """Print, by model and number of copies, the likelihood gap, exact extraction, exposure and membership."""
    table = Table(
        "model",
        "copies",
        "gap (nats per token)",
        "exact",
        "of controls",
        Column("exposure (bits)", min_width=len("exposure")),  # else 80 columns cut the word
        "AUC",
        "ε ≥",
        title="Memorisation of canaries",
    )
    prefix = longest_prefix(audit.extraction)
    exact = {(row.model, row.copies, row.inserted): row.exact for row in audit.extraction if row.prefix == prefix}
    auc = {
        (row.model, row.copies): row.auc
        for score in ("loss", "ratio")  # the stronger one, where there is a base model to compare with
        for row in audit.membership
        if row.score == score
    }
    bounds = {(row.model, row.copies): row.epsilon for row in audit.epsilon}
    for gap in audit.gaps:
        cell = (gap.model, gap.copies)
        bits = [row.exposure.value for row in audit.exposure if (row.model, row.copies, row.inserted) == (*cell, True)]
        table.add_row(
            gap.model,
            str(gap.copies),
            plain(gap.gap, "+.2f"),
            count(exact.get((*cell, True))),
            count(exact.get((*cell, False))),
            f"{sum(bits) / len(bits):.1f}" if bits else "none",
            plain(auc.get(cell)),
            f"{bounds[cell]:.2f}" if cell in bounds else "none",
        )
    console.print(table)
    words = f"Exact: the whole rest of a canary after a prefix of {prefix}."
    if prefix is None:
        words = "No prefix was tried: every canary is shorter."
    elif audit.skipped_prefixes:
        words += f" {audit.skipped_prefixes:,} prefixes were left out: they are longer than their canaries."
    words += " Exposure of what was never seen is 1.44 bits, AUC 0.5."
    console.print(f"Intervals are 95 %. {words}", highlight=False)
    if audit.design_changed:
        console.print("[yellow]The audit's design was changed after training.[/yellow]", highlight=False)
    for reason in audit.refused:
        console.print(f"Not given: {escape(reason)}.", highlight=False)
