"""Audited models side by side on the terminal."""

from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from allmend.cli.figures import ABSENT, count, percent, plain, points
from allmend.cli.progress import counted
from allmend.results import ComparedModel, Comparison, Estimate

_WIDTH = 15
"""Columns of a terminal that a model's figures need."""


def show_comparison(console: Console, comparison: Comparison) -> None:
    """Print one column a model, then each one's differences to the first and the verdict."""
    first = comparison.models[0]
    about = "" if first.copies is None else f": canaries with {counted(first.copies, 'copy', 'copies')}"
    measures: dict[str, Callable[[ComparedModel], str]] = {
        "perplexity": lambda model: _stacked(plain(model.perplexity)),
        "accuracy": lambda model: _of_all(model.accuracy),
        "exact": lambda model: _of_all(model.exact),
        "controls": lambda model: _of_all(model.exact_controls),
        "gap": lambda model: _stacked(plain(model.gap)),
        "exposure": lambda model: _stacked(plain(model.exposure)),
        "AUC": lambda model: _stacked(plain(model.auc)),
        "ε": lambda model: ABSENT if model.accounted is None else f"{model.accounted:.2f}",
        "ε measured": _measured,
    }
    measures = {name: show for name, show in measures.items() if any(show(m) != ABSENT for m in comparison.models)}
    console.print(f"\n[bold]Side by side{about}[/bold]", highlight=False)
    together = max(1, (console.width - 12) // (_WIDTH + 2))
    for start in range(0, len(comparison.models), together):
        models = comparison.models[start : start + together]
        heads = (Column(escape(model.label), min_width=_WIDTH, overflow="fold") for model in models)
        table = Table("", *heads, box=box.SIMPLE_HEAD, pad_edge=False)
        for name, show in measures.items():
            table.add_row(name, *(show(model) for model in models))
        console.print(table)
    if first.prefix:
        console.print(
            f"Exact: canaries whose whole rest comes out after {first.prefix}. Gap in nats per token, exposure in "
            f"bits; ε measured of one copy (×1) and of all together. {ABSENT}: not measured, or no guarantee."
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


def _stacked(figure: str) -> str:
    """A figure with its interval on a line of its own."""
    return figure.replace(" (", "\n").removesuffix(")")


def _of_all(estimate: Estimate | None) -> str:
    """A share as a count, and below it the interval."""
    interval = percent(estimate).partition(" (")[2].removesuffix(")")
    return f"{count(estimate)}\n{interval}".strip()


def _measured(model: ComparedModel) -> str:
    """The bound for one record, which is what the accountant's ε is for, and that for all copies together."""
    bounds = [(1, model.measured), (model.copies, model.measured_together)]
    return "\n".join(f"≥ {bound:.2f} (×{copies})" for copies, bound in bounds if bound is not None) or ABSENT
