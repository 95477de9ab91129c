"""Audited models side by side on the terminal."""

from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from allmend.cli.figures import plain, points, share
from allmend.results import ComparedModel, Comparison


def show_comparison(console: Console, comparison: Comparison) -> None:
    """Print one row a model, then each one's differences to the first and the verdict."""
    first = comparison.models[0]
    about = "" if first.copies is None else f"canaries with {first.copies} {'copy' if first.copies == 1 else 'copies'}"
    table = Table("model", title=f"Side by side: {about}" if about else "Side by side", show_lines=True)
    cells: dict[str, Callable[[ComparedModel], str]] = {
        "perplexity": lambda model: plain(model.perplexity),
        "accuracy": lambda model: share(model.accuracy),
        "exact": lambda model: share(model.exact),
        "of controls": lambda model: share(model.exact_controls),
        "gap": lambda model: plain(model.gap),
        "exposure": lambda model: plain(model.exposure),
        "AUC": lambda model: plain(model.auc),
        "ε": lambda model: "none" if model.accounted is None else f"{model.accounted:.2f}",
        "ε measured": _measured,
    }
    if all(model.accuracy is None for model in comparison.models):  # records without choices
        del cells["accuracy"]
    for name in cells:
        table.add_column(name)
    for model in comparison.models:
        table.add_row(escape(model.label), *(show(model) for show in cells.values()))
    console.print(table)
    if first.prefix:
        console.print(
            f"Exact: the whole rest of a canary after {first.prefix}. Gap in nats per token, exposure in bits, "
            "ε measured of one copy (×1) and of all copies together."
        )
    for pair in comparison.pairs:
        console.print(f"[bold]{escape(pair.words)}.[/bold]", highlight=False)
        if pair.gap:
            how = f"paired by canary (n = {pair.gap.n:,})"
            console.print(f"  gap {plain(pair.gap, '+.2f')}, exact {points(pair.exact)}; {how}", highlight=False)
        if pair.log_perplexity:
            accuracy = f", accuracy {points(pair.accuracy)}" if pair.accuracy else ""
            console.print(f"  log-perplexity {plain(pair.log_perplexity, '+.3f')}{accuracy}; paired", highlight=False)
    console.print("Differences are to the first model. Intervals are 95 %; they do not cover other training seeds.")


def _measured(model: ComparedModel) -> str:
    """The bound for one record, which is what the accountant's ε is for, and that for all copies together."""
    bounds = [(1, model.measured), (model.copies, model.measured_together)]
    return "\n".join(f"≥ {bound:.2f} (×{copies})" for copies, bound in bounds if bound is not None) or "none"
