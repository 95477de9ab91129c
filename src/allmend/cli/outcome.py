"""The end of a run on the terminal: the figures that matter, and where everything lies."""

from rich.console import Console
from rich.markup import escape

from allmend.cli.attribute_members import show_by_member
from allmend.cli.audited_members import show_members_models
from allmend.cli.figures import ABSENT, count, percent, plain, points, show_sections
from allmend.cli.progress import counted
from allmend.results import POOLED, AuditTable, InfluenceByMember, UtilityTable, longest_prefix
from allmend.run import RunFolder


def show_outcome(console: Console, run: RunFolder) -> None:
    """Print pooled utility, paired differences and the memorisation gap, then the paths of the report and models."""
    if utility := run.read_table("utility", UtilityTable):
        _show_utility(console, utility)
    if audit := run.read_table("audit", AuditTable):
        show_audit(console, audit)
    if influence := run.read_table("influence", InfluenceByMember):
        show_by_member(console, influence)
    outcomes = [path for what in ("adapter", "model", "members") for path in run.path.glob(f"arms/*/{what}")]
    for folder in sorted(outcomes):
        console.print(f"Model   {escape(str(folder))}", highlight=False, soft_wrap=True)
    console.print(f"Report  {escape(str((run.path / 'report.html').resolve()))}", highlight=False, soft_wrap=True)


def _show_utility(console: Console, utility: UtilityTable) -> None:
    rows = [row for row in utility.rows if row.held_out == POOLED]
    if all(row.accuracy is None and row.perplexity is None for row in rows):
        console.print("No record is held out, so that nothing is known of what the models can do.", highlight=False)
        return
    asked = max((row.accuracy.n for row in rows if row.accuracy), default=0)
    columns = {"": 30} | ({"accuracy": 24} if asked else {}) | {"perplexity": 22}
    sections: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        figures = (percent(row.accuracy), plain(row.perplexity)) if asked else (plain(row.perplexity),)
        heading = f"{row.model}, each client's own" if row.member else ""
        sections.setdefault(heading, []).append((row.member or row.model, *figures))
    about = f" ({counted(asked, 'question')})" if asked else ""
    show_sections(console, f"Held-out records of all clients{about}", columns, sections)
    for difference in utility.differences:
        if difference.held_out == POOLED:
            other = f"the mean of members' {difference.other}" if difference.other_is_member_mean else difference.other
            found = [points(difference.accuracy)] if difference.accuracy else []
            if difference.log_perplexity:
                found.append(f"log-perplexity {plain(difference.log_perplexity, '+.3f')} nats per token")
            console.print(f"{difference.model} against {other}: {', '.join(found)}", highlight=False)


def show_audit(console: Console, whole: AuditTable) -> None:
    """Print, by model and number of copies, the likelihood gap, exact extraction, exposure and membership."""
    audit = whole.of(None)
    columns = {"": 4, "gap, nats per token": 22, "exact": 8, "controls": 8, "exposure": 8, "AUC": 19, "ε ≥": 5}
    sections: dict[str, list[tuple[str, ...]]] = {}
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
        sections.setdefault(gap.model, []).append(
            (
                f"×{gap.copies}",
                plain(gap.gap, "+.2f"),
                count(exact.get((*cell, True))),
                count(exact.get((*cell, False))),
                f"{sum(bits) / len(bits):.1f}" if bits else ABSENT,
                plain(auc.get(cell)),
                f"{bounds[cell]:.2f}" if cell in bounds else ABSENT,
            )
        )
    title = f"Memorisation of canaries ({audit.canaries:,} planted, {audit.controls:,} controls)"
    show_sections(console, title, columns, sections)
    words = f"Exact: the whole rest of a canary after a prefix of {prefix}."
    if prefix is None:
        words = "No prefix was tried: every canary is shorter."
    elif audit.skipped_prefixes:
        words += f" {audit.skipped_prefixes:,} prefixes were left out: they are longer than their canaries."
    words += " ×10: planted ten times." if any(gap.copies == 10 for gap in audit.gaps) else ""
    words += " Exposure in bits; of what was never seen it is 1.44. AUC: a canary's loss, over the base model's where "
    words += "there is one, tells planted from controls; 0.5 is chance."
    words += f" {ABSENT}: not measured." if any(ABSENT in row for rows in sections.values() for row in rows) else ""
    console.print(f"Intervals are 95 %. {words}", highlight=False)
    if whole.ranks:
        show_members_models(console, whole)
    if audit.design_changed:
        console.print("[yellow]The audit's design was changed after training.[/yellow]", highlight=False)
    for reason in audit.refused:
        console.print(f"Not given: {escape(reason)}.", highlight=False)
