"""Audited models side by side on the terminal."""

from rich.console import Console
from rich.table import Table

from allmend.cli.figures import plain, points, share
from allmend.results import Comparison


def show_comparison(console: Console, comparison: Comparison) -> None:
    """Print one row a model, then each one's differences to the first and the verdict."""
    first = comparison.models[0]
    about = "" if first.copies is None else f"canaries with {first.copies} {'copy' if first.copies == 1 else 'copies'}"
    table = Table("model", title=f"Side by side: {about}" if about else "Side by side", show_lines=True)
    for name in ("perplexity", "accuracy", "exact", "of controls", "gap", "exposure", "AUC", "ε", "ε measured"):
        table.add_column(name)
    for model in comparison.models:
        table.add_row(
            model.label,
            plain(model.perplexity),
            share(model.accuracy),
            share(model.exact),
            share(model.exact_controls),
            plain(model.gap),
            plain(model.exposure),
            plain(model.auc),
            "none" if model.accounted is None else f"{model.accounted:.2f}",
            "none" if model.measured is None else f"≥ {model.measured:.2f}",
        )
    console.print(table)
    if first.prefix:
        console.print(
            f"Exact: the whole rest of a canary after {first.prefix}. Gap in nats per token, exposure in bits."
        )
    for pair in comparison.pairs:
        console.print(f"[bold]{pair.words[0].upper()}{pair.words[1:]}.[/bold]", highlight=False)
        how = "paired by canary" if pair.paired else "not paired: other canaries"
        if pair.gap:
            console.print(f"  gap {plain(pair.gap, '+.2f')}, exact {points(pair.exact)}; {how}", highlight=False)
        if pair.log_perplexity:
            accuracy = f", accuracy {points(pair.accuracy)}" if pair.accuracy else ""
            console.print(f"  log-perplexity {plain(pair.log_perplexity, '+.3f')}{accuracy}; paired", highlight=False)
    console.print("Differences are to the first model. Intervals are 95 %; they do not cover other training seeds.")
