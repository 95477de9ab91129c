"""`allmend attribute compare`: methods of influence side by side, judged by retraining."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from allmend.cli.as_json import AsJson, print_json, silent
from allmend.cli.attribute_options import DropOverlap, Template, template_of
from allmend.cli.figures import ABSENT, plain, show_sections
from allmend.cli.progress import counted, shown

if TYPE_CHECKING:
    from allmend.attribution.method_figures import MethodComparison, MethodFigures
    from allmend.results import Estimate

FOLDER = Path("comparison")
"""Where retrainings are kept unless a folder is named."""


def compare(
    model: Annotated[str, typer.Argument(help="The adapter's base: a folder, a Hub name, a GGUF file.")],
    adapter: Annotated[Path, typer.Option(help="A PEFT folder with a LoRA.")],
    train: Annotated[list[Path], typer.Option(help="The records it was trained on; each file counts as a client.")],
    target: Annotated[Path, typer.Option(help="Records whose loss is what matters.")],
    methods: Annotated[
        str, typer.Option(help="Of gfim, exact, datainf, lissa, hessian_free and tracin, with commas between them.")
    ] = "gfim,exact,datainf,lissa,hessian_free",
    retrain: Annotated[int, typer.Option(help="Halves of the records to train on, such as 30; 0 for none.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Of the trainings, when it is highest.")] = 1e-3,
    epochs: Annotated[int, typer.Option(help="Of the trainings.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Records per step of the trainings.")] = 8,
    seed: Annotated[int, typer.Option(help="Of halves and trainings.")] = 0,
    train_first: Annotated[
        bool,
        typer.Option("--train-first", help="Train the adapter to score here, in the same way; --adapter: a shape."),
    ] = False,
    checkpoint: Annotated[
        list[Path] | None, typer.Option(help="An adapter that tracin sums over; may be given several times.")
    ] = None,
    checkpoint_rate: Annotated[
        list[float] | None, typer.Option(help="Its weight, the learning rate that led to it; 1 if absent.")
    ] = None,
    damping: Annotated[float, typer.Option(help="Times the mean eigenvalue of each block.")] = 0.1,
    side: Annotated[str, typer.Option(help="wide or rank, of gfim.")] = "wide",
    modules: Annotated[str | None, typer.Option(help="A regular expression for names of weights.")] = None,
    most_targets: Annotated[int, typer.Option(help="Target records to score for, chosen at random.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=8, help="Longest record, in tokens.")] = 512,
    template: Template = "auto",
    drop_overlap: DropOverlap = False,
    out: Annotated[
        Path | None, typer.Option(help=f"A folder for all of it; `{FOLDER}` if absent and something is trained.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put methods of influence side by side: their agreement, their cost, and what they foretell of retraining.

    Whether methods agree:  allmend attribute compare MODEL --adapter DIR --train north.jsonl --target test.jsonl

    Which is right, by 30 trainings on halves of the records, after one on all of them:

    allmend attribute compare MODEL --adapter DIR --train a.jsonl --target b.jsonl --retrain 30 --train-first --out X

    Stopped half-way, the same command goes on.
    """
    from allmend.attribution.comparison import compare_methods
    from allmend.attribution.comparison_plan import Plan
    from allmend.attribution.retraining import Retraining
    from allmend.attribution.settings import Settings
    from allmend.errors import UserError

    if side not in ("wide", "rank"):
        raise UserError(f"{side!r} is none of wide, rank", where="--side")
    plan = Plan(
        methods=tuple(name for part in methods.split(",") if (name := part.strip().replace("-", "_"))),
        subsets=retrain,
        retraining=Retraining(learning_rate=learning_rate, epochs=epochs, batch_size=batch_size, seed=seed),
        train_first=train_first,
        checkpoints=tuple(checkpoint or ()),
        rates=tuple(checkpoint_rate or ()),
        most_targets=most_targets,
    )
    settings = Settings(
        damping=damping,
        side="wide" if side == "wide" else "rank",
        modules=modules,
        max_tokens=max_tokens,
        template=template_of(template),
        seed=seed,
        drop_overlap=drop_overlap,
    )
    folder = out or (FOLDER if retrain or train_first else None)
    with silent() if as_json else shown(Console(), onward="the same command goes on.") as listen:
        found = compare_methods(
            model, adapter, train=train, target=target, plan=plan, out=folder, settings=settings, listeners=[listen]
        )
    if as_json:
        print_json(found)
        return
    console = Console()
    show_methods(console, found)
    if folder is not None:
        console.print(f"Kept in {escape(str(folder))}", highlight=False, soft_wrap=True)


def show_methods(console: Console, found: "MethodComparison") -> None:
    """Print what each method is worth and costs, which agree, and how far that can be trusted.

    Args:
        console: where to.
        found: methods side by side.
    """
    judged = found.retraining
    columns = {"method": 20, **({"LDS": 24} if judged else {}), "passes": 7, "seconds": 8}
    rows = [_cells(one, judged=judged is not None) for one in found.methods]
    if judged:
        rows.append(("random", plain(judged.chance), ABSENT, ABSENT))
    title = f"Methods side by side, {found.records:,} records for {counted(found.target_records, 'target record')}"
    show_sections(console, title, columns, {"": rows})
    console.print(
        f"Passes are over the gradients of the training records; one takes {found.pass_seconds:.1f} s. Seconds are a "
        "method's alone, with its passes and the target's.",
        highlight=False,
    )
    if judged:
        _show_judgement(console, found)
    _show_agreement(console, found)
    if not judged:
        console.print("Methods that agree may all be wrong: --retrain says which one foretells.", highlight=False)
    for one in found.methods:
        for note in one.notes:
            console.print(f"{_shown(one.method)}: {escape(note)}", highlight=False)
    for note in found.notes:
        console.print(escape(note), highlight=False)


def _cells(one: "MethodFigures", *, judged: bool) -> tuple[str, ...]:
    worth = (plain(one.lds),) if judged else ()
    passes = ABSENT if one.passes is None else str(one.passes)
    return (_shown(one.method), *worth, passes, ABSENT if one.seconds is None else f"{one.seconds:.1f}")


def _shown(method: str) -> str:
    return "hessian_free / λ" if method == "hessian_free_scaled" else method


def _show_judgement(console: Console, found: "MethodComparison") -> None:
    judged = found.retraining
    assert judged is not None
    console.print(
        f"LDS: whether the summed scores of {judged.subsets} random halves of the records foretell the order of the "
        "target's losses after training on each (Spearman, mean over target records: 1 is wholly, 0 not at all). "
        "Intervals are over target records; other halves would give other figures. Loss: a record is taken for harmful "
        "if its loss per token is high. Random: the middle 95 % of random scores.",
        highlight=False,
    )
    low, high = judged.chance.low or 0.0, judged.chance.high or 0.0
    lds = {_shown(one.method): one.lds.value for one in found.methods if one.lds is not None}
    no_more = [name for name, value in lds.items() if low <= value <= high]
    below = [name for name, value in lds.items() if value < low]
    if no_more:
        console.print(
            f"[yellow]No more than chance may bring with {judged.subsets} trainings[/yellow]: {', '.join(no_more)}.",
            highlight=False,
        )
    if below:
        console.print(f"[yellow]The wrong way round[/yellow]: {', '.join(below)}.", highlight=False)
    losses = f"{min(judged.losses):.3f} to {max(judged.losses):.3f}"
    how = f"learning rate {judged.learning_rate:g}, {counted(judged.epochs, 'epoch')}, batches of {judged.batch_size}"
    told = f"The target's loss is {found.loss:.3f} nats a token under it, {losses} after training on halves."
    if found.trained_here:
        console.print(f"The adapter was trained here, as on the halves ({how}). {told}", highlight=False)
        return
    console.print(
        f"This is fair only if the adapter was trained on these records as on the halves ({how}). {told} "
        "--train-first trains it here.",
        highlight=False,
    )


def _show_agreement(console: Console, found: "MethodComparison") -> None:
    names = [
        one.method for one in found.methods if any(one.method in (pair.first, pair.second) for pair in found.pairs)
    ]
    columns = {"": 20, **{str(number): 5 for number in range(1, len(names))}}
    rows = [
        (
            f"{number} {_shown(name)}",
            *(_correlation(found.agreement(name, other)) for other in names[: number - 1]),
            *[""] * (len(names) - number),
        )
        for number, name in enumerate(names, start=1)
    ]
    show_sections(console, "Agreement (Spearman over records, mean over target records)", columns, {"": rows})
    free, scaled = (found.agreement("datainf", name) for name in ("hessian_free", "hessian_free_scaled"))
    if free is not None and scaled is not None:
        console.print(
            f"DataInf agrees with Hessian-free by {plain(free)}, and by {plain(scaled)} where each block of "
            "Hessian-free is divided by its λ, as DataInf does.",
            highlight=False,
        )


def _correlation(estimate: "Estimate | None") -> str:
    return ABSENT if estimate is None else f"{round(estimate.value, 2) + 0.0:.2f}"  # no -0.00
