"""`allmend attribute inverse`: which inverse is fastest here, and how approximations come to the exact one."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from allmend.cli.as_json import AsJson, print_json, silent
from allmend.cli.figures import ABSENT, show_sections
from allmend.cli.progress import counted, shown

if TYPE_CHECKING:
    from allmend.influence.convergence import Convergence
    from allmend.influence.inverse_table import Timing

SIMULATED = 512
"""Size of the simulation where none is named."""


def inverse(
    size: Annotated[
        list[int] | None, typer.Option(min=2, help="d of matrices d × d to time; the simulation takes the first.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Matrices at a time, one for each size.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps; the first that is there if absent.")] = "",
    seed: Annotated[int, typer.Option(help="Of matrices and vectors.")] = 0,
    out: Annotated[Path | None, typer.Option(help="An HTML file for a page with plots and times.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time every inverse on this machine, and follow the approximate ones to the exact one.

    What it finds decides `--inverse auto` of `allmend attribute` on this device from then on, if the usual sizes are
    timed.

    The usual sizes, in about two minutes:  allmend attribute inverse

    Your own, quickly, with a page:  allmend attribute inverse --size 576 --batch 8 --out inverses.html
    """
    import torch

    from allmend.attribution.pages import ABOUT_TIMES, write_inverse_page
    from allmend.errors import UserError
    from allmend.events import WorkDone, WorkPlanned
    from allmend.influence.convergence import simulate
    from allmend.influence.fastest_inverse import device_name, remember
    from allmend.influence.inverse_table import SIZES, fastest_of, time_inverses, verdict
    from allmend.models.load import usable_device
    from allmend.run import check_place

    sizes = size or []
    batches = batch or [1] * len(sizes)
    if len(batches) != len(sizes):
        raise UserError(
            f"{counted(len(batches), 'batch', 'batches')} for {counted(len(sizes), 'size')}",
            where="--batch",
            hint="Name one for each --size, or none.",
        )
    place = usable_device(device or None)
    if out is not None:
        check_place(out)
    chosen = list(zip(batches, sizes, strict=True)) or list(SIZES)
    phase, work = "time inverses", [float(b * d**3) for b, d in chosen]
    console, timings = Console(), []
    with silent() if as_json else shown(console) as listen:
        listen(WorkPlanned(work={phase: sum(work)}))
        simulated = simulate(sizes[0] if sizes else SIMULATED, seed=seed)
        for timing in time_inverses(chosen, device=place, seed=seed):
            timings.append(timing)
            listen(WorkDone(phase=phase, share=sum(work[: len(timings)]) / sum(work)))
    words = verdict(timings, lasting=not sizes)
    machine = {
        "device": device_name(place),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": "float32",
    }
    kept = None
    if not sizes:  # a single size says nothing of the others
        kept = remember(place, fastest_of(timings), [one.model_dump() for one in timings])
    if out is not None:
        write_inverse_page(out, simulated, timings, verdict=words, machine=machine)
    if as_json:
        print_json({"simulation": simulated, "timings": timings, "verdict": words, "machine": machine})
        return
    show_simulation(console, simulated)
    show_timings(console, timings)
    console.print(
        f"{escape(device_name(place))}, {counted(torch.get_num_threads(), 'thread')}, torch {torch.__version__}, "
        f"single precision. {ABOUT_TIMES}",
        style="dim",
        highlight=False,
    )
    console.print(words, highlight=False)
    if kept is not None:
        console.print(f"Kept in {escape(str(kept))}", highlight=False, soft_wrap=True)
    if out is not None:
        console.print(f"Report  {escape(str(out.resolve()))}", highlight=False, soft_wrap=True)


def show_simulation(console: Console, found: "Convergence") -> None:
    """Print residuals and errors by step."""
    from allmend.attribution.pages import about_simulation

    columns = {"step": 5} | {f"residual {order}": 10 for order in found.residual}
    columns |= {f"error {order}": 9 for order in found.error} | {"LiSSA": 6}
    rows = []
    for step in range(len(found.lissa)):
        cells = [
            f"{one[step]:.1e}" if step < len(one) else ""
            for table in (found.residual, found.error)
            for one in table.values()
        ]
        rows.append((str(step), *cells, f"{found.lissa[step]:.2f}"))
    title = f"Approximate inverses of one matrix, {found.size} × {found.size}, condition {found.condition:.0f}"
    show_sections(console, title, columns, {"": rows})
    console.print(about_simulation(found), style="dim", highlight=False)


def show_timings(console: Console, timings: "Sequence[Timing]") -> None:
    """Print medians, ranges and errors of each inverse, size by size."""
    from allmend.attribution.pages import WAYS, in_steps

    columns = {"inverse": 34, "ms": 9, "range": 20, "error": 9}
    sections = {
        f"{one.batch} × {one.size}, condition {one.condition:.0f}": [
            (
                in_steps(way, one),
                *_milliseconds(one.seconds[way]),
                f"{one.error[way]:.0e}" if way in one.error else ABSENT,
            )
            for way in WAYS
        ]
        for one in timings
    }
    show_sections(console, "Milliseconds of each inverse", columns, sections)


def _milliseconds(seconds: Sequence[float]) -> tuple[str, str]:
    if not seconds:
        return "gave up", ABSENT
    low, middle, high = (
        f"{one:,.0f}" if one >= 1000 else f"{one:.3g}"
        for one in (1e3 * pick(seconds) for pick in (min, statistics.median, max))
    )
    return middle, f"{low} to {high}"
