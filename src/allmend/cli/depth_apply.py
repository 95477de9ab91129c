"""`allmend depth apply`: the folder of a model whose groups of layers are one wider layer each."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from allmend.cli.as_json import AsJson, print_json, silent
from allmend.cli.depth_options import Device, Merge, Model
from allmend.cli.figures import plain
from allmend.cli.progress import shown

if TYPE_CHECKING:
    from allmend.depth.recover import Recovery
    from allmend.pairing.applied import Applied


def apply(
    model: Model,
    plan: Annotated[Path, typer.Option(help="plan.json of `allmend depth search`, or one of your own.")],
    out: Annotated[Path, typer.Option(help="A folder that is not there yet.")],
    correct: Annotated[
        bool,
        typer.Option("--correct", help="Fit the folded layers' last projections to the original."),
    ] = False,
    recover: Annotated[
        int, typer.Option(min=0, help="Steps of training the folded layers, beside the original as a control.")
    ] = 0,
    recover_loss: Annotated[
        str, typer.Option(help="causal: learn the text; kl: what the original makes of it.")
    ] = "causal",
    learning_rate: Annotated[float, typer.Option(help="With --recover; it falls linearly.")] = 5e-4,
    seed: Annotated[int, typer.Option(help="With --recover.")] = 0,
    calibration: Annotated[
        Path | None,
        typer.Option(help="For --correct and --recover; the built-in clinical terms if absent."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="With --recover: text to measure it on; the last third of the other if absent.")
    ] = None,
    merge: Merge = False,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Fold a plan into a model folder that loads with from_pretrained.

    What a search has found:  allmend depth apply MODEL --plan found/plan.json --out paired

    And win some of the loss back:  allmend depth apply MODEL --plan found/plan.json --out paired --correct
    """
    from allmend.depth.recover import Training
    from allmend.errors import UserError
    from allmend.pairing.applied import apply_folder

    if recover_loss not in ("causal", "kl"):
        raise UserError(f"{recover_loss!r} is none of causal and kl", where="--recover-loss")
    training = None
    if recover:
        loss = "kl" if recover_loss == "kl" else "causal"
        training = Training(steps=recover, loss=loss, learning_rate=learning_rate, seed=seed)  # type: ignore[arg-type]
    with silent() if as_json else shown(Console()) as listen:
        found = apply_folder(
            model,
            plan,
            out,
            corrected=correct,
            training=training,
            calibration=calibration,
            report=report,
            merge=merge,
            device=device or None,
            listeners=[listen],
        )
    if as_json:
        print_json(found)
        return
    show_applied(Console(), found)


def show_applied(console: Console, found: "Applied") -> None:
    """Print what was written, what training won back, and how it loads."""
    now, before = found.parameters
    console.print(
        f"{found.architecture}: {found.depth} steps instead of {found.layers}, {now:,} parameters instead of "
        f"{before:,}.",
        highlight=False,
    )
    if found.correction is not None:
        one = found.correction
        console.print(
            f"Correction: {plain(one.gap_before, '+.3f')} nats a token above the original before and "
            f"{plain(one.gap_after, '+.3f')} after it, on text that it was not fitted on.",
            highlight=False,
        )
        for note in one.notes:
            console.print(escape(note), highlight=False, soft_wrap=True)
    if found.recovery is not None:
        show_recovery(console, found.recovery)
    console.print(
        "It loads with AutoModelForCausalLM.from_pretrained: after `import allmend`, or with trust_remote_code=True.",
        highlight=False,
    )
    console.print(f"Model   {escape(str(found.out.resolve()))}", highlight=False, soft_wrap=True)


def show_recovery(console: Console, found: "Recovery") -> None:
    """Print perplexities before and after training, of the paired model and of the control."""
    for name, one in (("Paired", found.paired), ("As it is", found.control)):
        console.print(
            f"{name + ':':10}perplexity {plain(one.before)} before and {plain(one.after)} after {found.steps} steps.",
            highlight=False,
        )
    closed = "" if found.closed is None else f": {100 * found.closed:.0f} % of it is closed"
    console.print(
        f"The gap between them was {plain(found.gap_before, '+.3f')} nats a token and is "
        f"{plain(found.gap_after, '+.3f')}{closed}.",
        highlight=False,
    )
    for note in found.notes:
        console.print(escape(note), highlight=False, soft_wrap=True)
