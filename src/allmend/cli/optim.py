"""`allmend optim`: does a training need a warmup of the learning rate, and what did a run's steps look like."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from allmend.cli.as_json import AsJson, print_json, silent
from allmend.cli.progress import counted, shown
from allmend.errors import UserError

if TYPE_CHECKING:
    from allmend.events import StepDone
    from allmend.optim.comparison import Method

app = typer.Typer(no_args_is_help=True, help="Optimisers that need no warmup, and the size of a run's steps.")


@app.command()
def compare(
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text to learn: .txt (also .gz), or records as of a client. The terms of ICD-10-CM if absent."
        ),
    ] = None,
    methods: Annotated[str, typer.Option(help="Optimisers, with commas between them.")] = "adamw,radam,lionar",
    warmup: Annotated[str, typer.Option(help="Shares of the steps with a warmup, with commas.")] = "0,0.05,0.25",
    lr: Annotated[
        str, typer.Option(help="Learning rates that differ from the usual ones, such as adamw=2e-3,lionar=0.03.")
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions with other weights and orders.")] = 3,
    steps: Annotated[int, typer.Option(min=10, help="Optimiser steps of each training.")] = 300,
    out: Annotated[Path | None, typer.Option(help="A file for all of it, as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a small model with each optimiser, with and without warmup, and say which need one.

    The model is a Llama of half a million parameters from scratch; a training takes half a minute on a laptop. What it
    shows says little about larger models.

    Three optimisers with three warmups and three seeds (27 trainings):  allmend optim compare

    On your own text, quickly:  allmend optim compare --text notes.txt --warmup 0,0.25 --seeds 1
    """
    from allmend.events import PhaseDone, WorkDone, WorkPlanned
    from allmend.optim import comparison
    from allmend.optim.small_model import Shape, encode
    from allmend.run import write_atomic

    console = Console(quiet=as_json)
    chosen, shares = _methods(methods, lr), _numbers(warmup, "--warmup")
    shape, training = Shape(), comparison.Training(steps=steps)
    try:
        data = encode(_texts(text or []), shape)
    except ValueError as error:
        raise UserError(str(error), where="--text", hint="Name more text.") from None
    console.print(
        f"{data.train.numel():,} tokens to learn from, {data.held_out.numel():,} held out; "
        f"{counted(len(chosen) * len(shares) * seeds, 'training')} of {steps} steps",
        highlight=False,
    )

    def phase(method: "Method", share: float, seed: int) -> str:
        return f"{method}, warmup {share:.0%}, seed {seed}"

    trials = []
    with silent() if as_json else shown(console) as listen:
        planned = [phase(method, share, seed) for seed in range(seeds) for method in chosen for share in shares]
        listen(WorkPlanned(work=dict.fromkeys(planned, float(steps))))
        try:
            for trial in comparison.compare(
                data,
                chosen,
                warmups=shares,
                seeds=range(seeds),
                shape=shape,
                training=training,
                on_step=lambda method, share, seed, step: listen(
                    WorkDone(phase=phase(method, share, seed), share=step / steps)
                ),
            ):
                trials.append(trial)
                name = f"{trial.method}, warmup {trial.warmup:.0%}, seed {trial.seed}"
                listen(PhaseDone(phase=name, seconds=0.0, tokens=0))
        except (ValueError, TypeError) as error:
            raise UserError(str(error), where="allmend optim compare") from None
    found = comparison.rows(trials)
    verdicts = [gap.verdict for gap in comparison.gaps(found)]
    content = {"training": training, "model": shape, "rows": found, "verdicts": verdicts, "trials": trials}
    if out is not None:
        from pydantic_core import to_json

        write_atomic(out, to_json(content, indent=1, inf_nan_mode="null"))
    if as_json:
        print_json(content)
        return
    table = Table("optimiser", "lr", "warmup", "held-out loss (nats)", "first step")
    for row in found:
        losses = row.losses.values()
        table.add_row(
            row.method,
            f"{row.lr:g}",
            f"{row.warmup:.0%}",
            f"{row.loss:.3f} ({min(losses):.3f} to {max(losses):.3f})",
            f"{row.spike:.2f} ×",
        )
    console.print(table)
    console.print("First step: its length over that of later ones.", style="dim")
    for words in verdicts:
        console.print(f"{words}.", highlight=False, soft_wrap=True)


@app.command()
def inspect(
    run: Annotated[Path, typer.Argument(help="A run with train.log_updates.")],
    as_json: AsJson = False,
) -> None:
    """Show how large a run's optimiser steps were: first steps against later ones, and matrices that turned far.

    Log them in a run:  allmend tune recipe.toml --log-updates

    Then look:          allmend optim inspect runs/NAME
    """
    from allmend.events import StepDone
    from allmend.run import RunFolder

    found: dict[str, list[StepDone]] = {}
    for event in RunFolder.open(run).history():
        if isinstance(event, StepDone) and event.update is not None:
            found.setdefault(event.arm, []).append(event)
    if not found:
        raise UserError(
            "the sizes of its steps were not logged",
            where=run,
            hint="Run it with train.log_updates = true, or `allmend tune RECIPE.toml --log-updates`.",
        )
    arms = [_arm(arm, events) for arm, events in found.items()]
    if as_json:
        print_json(arms)
        return
    console = Console()
    table = Table("arm", "first step of a round", "largest angle", "matrix", "turned far")
    for one in arms:
        spike, angle = one["first_over_later"], one["largest_angle"]
        table.add_row(
            escape(str(one["arm"])),
            "" if spike is None else f"{spike:.2f} × later ones",
            "" if angle is None else f"{angle:.4f} rad",
            escape(str(one["matrix"])),
            f"{one['far']:,} of {one['matrices']:,}" if one["matrices"] else "",
        )
    console.print(table)
    console.print(
        "Steps are of one client's rounds, over all of them. Turned far: matrices at steps that were looked at which "
        "turned more than three times as far as this optimiser does in equilibrium (known with weight decay only).",
        style="dim",
    )


def _arm(arm: str, events: Sequence["StepDone"]) -> dict[str, object]:
    """An arm's steps in a few numbers."""
    rounds: dict[tuple[str, int], list[StepDone]] = {}
    for event in events:
        rounds.setdefault((event.client, event.round), []).append(event)
    ratios = []
    for some in rounds.values():
        first, *later = [event.update.length for event in some if event.update]
        if later and statistics.median(later) > 0:
            ratios.append(first / statistics.median(later))
    sizes = [event.update for event in events if event.update]
    turned = max((size for size in sizes if size.angle is not None), key=lambda size: size.angle or 0.0, default=None)
    return {
        "arm": arm,
        "first_over_later": statistics.median(ratios) if ratios else None,
        "rounds": len(ratios),
        "largest_angle": turned.angle if turned else None,
        "matrix": turned.farthest if turned else "",
        "far": sum(size.far for size in sizes),
        "matrices": sum(size.matrices for size in sizes),
    }


def _methods(names: str, rates: str) -> list["Method"]:
    from allmend.optim.build import check_name
    from allmend.optim.comparison import LEARNING_RATES, Method

    chosen = [name.strip() for name in names.split(",") if name.strip()]
    if not chosen:
        raise UserError("no optimiser is named", where="--methods")
    own = dict(LEARNING_RATES)
    for pair in filter(None, rates.split(",")):
        name, equals, value = pair.partition("=")
        if not equals or name.strip() not in chosen:
            raise UserError(f"{pair!r} is not OPTIMISER=RATE of an optimiser that is compared", where="--lr")
        (own[name.strip()],) = _numbers(value, "--lr")
    for name in chosen:
        try:
            check_name(name)
        except ValueError as error:
            raise UserError(str(error), where="--methods") from None
    return [Method(name, own[name]) for name in chosen]


def _numbers(words: str, where: str) -> list[float]:
    try:
        found = [float(word) for word in words.split(",")]
    except ValueError:
        raise UserError(f"{words!r} is not a list of numbers", where=where, hint="Such as 0,0.05,0.25.") from None
    if not all(0 <= number < 1e3 for number in found):
        raise UserError(f"{words!r} has a number out of range", where=where)
    return found


def _texts(paths: Sequence[Path]) -> list[str]:
    """Documents: paragraphs of text files, texts of records, or the terms of ICD-10-CM."""
    import gzip
    import random

    from allmend.data.files import read_records
    from allmend.data.icd10cm import category_texts
    from allmend.recipe import Fields

    texts: list[str] = []
    for path in paths:
        if path.suffixes[-2:] == [".txt", ".gz"] or path.suffix == ".txt":
            try:
                data = path.read_bytes()
                data = gzip.decompress(data) if path.suffix == ".gz" else data
                texts += [part.strip() for part in data.decode("utf-8").split("\n\n") if part.strip()]
            except (OSError, UnicodeDecodeError, EOFError) as error:
                raise UserError(f"cannot be read as text: {error}", where=path) from error
        else:
            records, _ = read_records(str(path), fields=Fields(), base=Path())
            texts += ["\n".join(record.texts) for record in records]
    texts = texts if paths else category_texts()
    random.Random(0).shuffle(texts)
    return texts
