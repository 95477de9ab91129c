"""`allmend depth search`: the best way to run a model at each depth."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from allmend.cli.as_json import AsJson, print_json, silent
from allmend.cli.depth_options import Calibration, Device, Merge, Model
from allmend.cli.figures import ABSENT, plain, show_sections
from allmend.cli.progress import shown

if TYPE_CHECKING:
    from allmend.results import DepthLine, DepthSearch


def search(
    model: Model,
    pairs: Annotated[int | None, typer.Option(min=1, help="Pairs to come to; a step less for each.")] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Steps to come down to.")] = None,
    max_loss: Annotated[
        float | None, typer.Option(min=0, help="What may be added to the loss, nats a token (0.10: 10 % perplexity).")
    ] = None,
    free: Annotated[bool, typer.Option("--free", help="Pairs anywhere, not in one stretch.")] = False,
    kind: Annotated[
        str, typer.Option(help="What a stretch is, for comparison: pairs, triples, parallel, merge, prune …")
    ] = "pairs",
    calibration: Calibration = None,
    report: Annotated[
        Path | None, typer.Option(help="Text to report on; what the search leaves of its own if absent.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A folder for plan.json, search.json, loss_by_depth.svg, depth.html; a stopped one goes on. Of a run, "
            "RUN/depth/ARM if absent."
        ),
    ] = None,
    untimed: Annotated[bool, typer.Option("--untimed", help="Do not time decoding at each depth.")] = False,
    merge: Merge = False,
    device: Device = "",
    as_json: AsJson = False,
) -> None:
    """Find the layers that can run side by side, and say what each depth costs on text not used in the search.

    As far as 0.10 nats a token allow:  allmend depth search MODEL --max-loss 0.10 --free --out found

    Down to 24 steps:  allmend depth search MODEL --depth 24 --calibration valid.txt --report test.txt --out found

    In the model that a run has tuned, for its report:  allmend depth search RUN:fedavg --pairs 4 --free
    """
    from allmend.errors import UserError
    from allmend.pairing.folders import kept_in, search_folder
    from allmend.pairing.pages import PAGE

    if free and kind != "pairs":
        raise UserError("pairs anywhere are pairs", where="--kind", hint="Leave out --kind, or --free.")
    out = kept_in(model, out)
    with silent() if as_json else shown(Console()) as listen:
        found = search_folder(
            model,
            kind="free" if free else kind,  # type: ignore[arg-type]  # checked there
            depth=depth,
            pairs=pairs,
            max_loss=max_loss,
            calibration=calibration,
            report=report,
            out=out,
            merge=merge,
            device=device or None,
            timed=not untimed,
            listeners=[listen],
        )
    if as_json:
        print_json(found)
    else:
        show_search(Console(), found)
        if out is not None:
            written = {"Plan": out / "plan.json", "Report": out / PAGE}
            for name, path in written.items():
                if path.is_file():
                    Console().print(f"{name:8}{escape(str(path.resolve()))}", highlight=False, soft_wrap=True)
        if found.arm:
            Console().print("The run's report shows it, too.", highlight=False)
    if not found.reached:
        cheapest = found.frontier.lines[1]
        loss = "more" if cheapest.searched is None else f"{cheapest.searched.value:.3f}"
        raise UserError(
            f"no depth keeps within {max_loss:g} nats a token: even {cheapest.depth} steps add {loss} on the text of "
            "the search",
            where="--max-loss",
            hint="Allow more, or try --free.",
        )


def _speed(line: "DepthLine") -> str:
    if line.speed is None:
        return ABSENT
    foretold = f" ({line.foretold.median:.2f})" if line.foretold else ""
    return f"{line.speed.median:.2f}{foretold}"


def show_search(console: Console, found: "DepthSearch") -> None:
    """Print a line for each depth."""
    from allmend.depth.frontier import RUNS
    from allmend.report.depth_figures import changed_layers

    columns = {"perplexity": 22, "added, nats a token": 25, "choices right": 10, "speed here": 16}
    sections = {
        f"{line.depth} steps: {changed_layers(line)}": [
            (
                plain(line.perplexity),
                ABSENT if line.added is None else plain(line.added, "+.3f"),
                ABSENT if line.accuracy is None else f"{100 * line.accuracy.value:.0f} %",
                _speed(line),
            )
        ]
        for line in found.frontier.lines
    }
    show_sections(console, "What each depth costs", columns, sections)
    front = found.frontier
    speed = (
        f" Speed: tokens a second of greedy decoding over those of the model as it is, median of {RUNS} runs in turns, "
        f"in brackets what layers timed alone foretell ({front.machine})."
        if front.machine
        else ""
    )
    console.print(
        f"On {escape(front.reported_on)} ({front.report_tokens:,} tokens), which the search has not seen; it searched "
        f"{escape(front.searched_on)} ({front.search_tokens:,}). Intervals of 95 % over windows; {front.questions} "
        f"choices. Perplexity falls apart before choices do.{speed}",
        style="dim",
        highlight=False,
    )
    for note in front.notes:
        console.print(escape(note), highlight=False, soft_wrap=True)
