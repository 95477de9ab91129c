"""`allmend attribute select`: the records that helped most, and what the choice is worth."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from allmend.cli.as_json import AsJson, print_json, silent
from allmend.cli.attribute_options import Template, template_of
from allmend.cli.figures import plain, show_sections
from allmend.cli.progress import counted, shown

if TYPE_CHECKING:
    from allmend.attribution.trial import Trial


def select(
    scores: Annotated[Path, typer.Argument(help="A folder that `allmend attribute --out` has written.")],
    train: Annotated[list[Path], typer.Option(help="The files that were scored.")],
    out: Annotated[Path, typer.Option(help="A folder for chosen/ and random/.")],
    keep: Annotated[float, typer.Option(help="Share of the records.")] = 0.5,
    target: Annotated[str | None, typer.Option(help="Whose scores count, where there are several.")] = None,
    per_client: Annotated[bool, typer.Option("--per-client", help="The share of each client, not of all.")] = False,
    balance: Annotated[str, typer.Option(help="A field of whose every value the share is kept.")] = "",
    try_on: Annotated[
        Path | None, typer.Option(help="Records that no score has seen: train on each, and compare losses on them.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --try-on: the adapter's base.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="With --try-on: an adapter of the shape to train.")] = None,
    seeds: Annotated[int, typer.Option(help="With --try-on: trainings of each.")] = 3,
    learning_rate: Annotated[float, typer.Option(help="With --try-on.")] = 1e-3,
    epochs: Annotated[int, typer.Option(help="With --try-on: over everything; the others take as many steps.")] = 3,
    batch_size: Annotated[int, typer.Option(help="With --try-on.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=8, help="With --try-on: longest record, in tokens.")] = 512,
    template: Template = "auto",
    as_json: AsJson = False,
) -> None:
    """Keep the records that helped most, and as many random ones to compare with.

    Half of all records:  allmend attribute select found --train north.jsonl --train south.jsonl --out less

    What the choice is worth, by training on it, on random records and on everything, at equal steps:

    allmend attribute select found --train a.jsonl --out less --try-on unseen.jsonl --model MODEL --adapter DIR
    """
    from allmend.attribution import selection
    from allmend.attribution.settings import Settings
    from allmend.errors import UserError

    if try_on is not None and (model is None or adapter is None):
        raise UserError("needs --model and --adapter", where="--try-on", hint="Name those that were scored.")
    settings = Settings(max_tokens=max_tokens, template=template_of(template))
    found = selection.select(
        scores, train=train, keep=keep, out=out, target=target, per_client=per_client, balance=balance
    )
    trial = None
    if try_on is not None:
        from allmend.attribution.retraining import Retraining
        from allmend.attribution.trial import try_selection

        assert model is not None
        assert adapter is not None
        retraining = Retraining(learning_rate=learning_rate, epochs=epochs, batch_size=batch_size)
        with silent() if as_json else shown(Console()) as listen:
            trial = try_selection(
                model,
                adapter,
                found,
                train=train,
                unseen=try_on,
                retraining=retraining,
                seeds=seeds,
                settings=settings,
                listeners=[listen],
            )
    if as_json:
        print_json(found if trial is None else {"selected": found, "trial": trial})
        return
    console = Console()
    rows = [(escape(one.client), f"{one.kept:,} of {one.records:,}", escape(str(one.chosen))) for one in found]
    show_sections(console, "Kept", {"client": 18, "records": 18, "file": 40}, {"": rows})
    console.print(
        f"As many random records lie in {escape(str(out / 'random'))}. Less data are fewer steps in an epoch: to see "
        "what the choice is worth, train on both, and on everything, with the same train.local_steps"
        + (", or name unseen records with --try-on." if trial is None else "."),
        highlight=False,
    )
    if trial is not None:
        show_trial(console, trial)


def show_trial(console: Console, trial: "Trial") -> None:
    """Print the losses after training on each, and what the choice gains over the others."""
    rows = [(name, plain(loss, ".4f")) for name, loss in trial.losses.items()]
    title = (
        f"Loss on {counted(trial.unseen, 'unseen record')}, nats a token, {counted(trial.losses['chosen'].n, 'seed')}"
    )
    show_sections(console, title, {"trained on": 16, "loss": 30}, {"": rows})
    for other, gap in (("random", trial.against_random), ("everything", trial.against_everything)):
        console.print(f"Chosen minus {other}, by record: {plain(gap, '+.4f')}.", highlight=False)
    console.print(
        f"{trial.chosen:,} of {trial.records:,} records were chosen; each training took "
        f"{counted(trial.steps, 'step')}. {trial.verdict}",
        highlight=False,
    )
