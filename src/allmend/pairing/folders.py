"""Scan and search as a user asks for them: a model by name, texts by path, results in a folder."""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from allmend import __version__
from allmend.data.windows import Windows
from allmend.depth.architectures import layers_of, quantised_error
from allmend.depth.choices import choices_of
from allmend.depth.frontier import frontier
from allmend.depth.log import Log
from allmend.depth.measure import Candidate, Measured, behind
from allmend.depth.plan import Plan, write_plan
from allmend.depth.scanning import Kind, scan
from allmend.depth.searching import Result, search
from allmend.errors import UserError
from allmend.events import Event, WorkDone, WorkPlanned
from allmend.models.load import LoadedModel
from allmend.pairing.pages import write_scan_pages, write_search_pages
from allmend.report.page import write_report
from allmend.results import DepthSearch, DepthTable
from allmend.run import RunFolder, write_atomic
from allmend.subjects import arm_of, load_subject, read_calibration, read_texts

QUESTIONS = 96

FOLDER = TABLE = "depth"
"""Where a run keeps the searches of its arms, and the table of their results."""


@dataclass(frozen=True)
class Cell:
    """A stretch of a scan.

    Attributes:
        kind, start, end: what is done to which layers.
        depth: sequential steps that are left.
        added: to the loss (nats a token), and its standard error over tokens.
        tokens: that it was measured on: fewer where it was clearly behind others.
    """

    kind: str
    start: int
    end: int
    depth: int
    added: float
    error: float
    tokens: int


@dataclass(frozen=True)
class Scanned:
    """A scan.

    Attributes:
        model, text: what was scanned, and on what.
        layers: of the model.
        loss: of the model as it is (nats a token).
        cells: all stretches.
        notes: what to know.
    """

    model: str
    text: str
    layers: int
    loss: float
    cells: tuple[Cell, ...]
    notes: tuple[str, ...]


def scan_folder(
    model: str,
    *,
    kinds: Sequence[Kind] = ("pairs", "prune"),
    longest: int = 8,
    calibration: Path | None = None,
    out: Path | None = None,
    merge: bool = False,
    device: str | None = None,
    seed: int = 0,
    listeners: Sequence[Callable[[Event], None]] = (),
) -> Scanned:
    """What every stretch of a model's layers costs when it runs otherwise.

    Args:
        model: as in a recipe, or a PEFT folder with `merge`.
        kinds: of intervention; see `depth.scan`.
        longest: stretch, in layers.
        calibration: text to measure on; the built-in clinical terms when None.
        out: a folder for `scan.parquet`, `scan.svg` and `depth.html`; a scan that was stopped is gone on with.
        merge: whether an adapter may be merged into its base.
        device: as of `load_model`.
        seed: of `shuffle`.
        listeners: told how far it is.

    Raises:
        UserError: the model cannot be rearranged, the text is too short, or the folder is of another scan.
    """
    loaded = load_subject(model, merge=merge, device=device, quantised=quantised_error)
    windows = read_calibration(loaded, calibration)
    log = Log(out / "scan.parquet", _facts(loaded, windows)) if out else None
    tell(listeners, WorkPlanned(work={"scan": 1.0}))
    found = scan(
        loaded.model,
        windows,
        kinds=kinds,
        longest=longest,
        seed=seed,
        log=log,
        on_share=lambda share: tell(listeners, WorkDone(phase="scan", share=share)),
    )
    (_, base), *rest = found.items()
    cells = tuple(_cell(one, measured, base) for one, measured in rest)
    result = Scanned(model, windows.source, base.depth, base.loss, cells, windows.notes)
    if out:
        write_scan_pages(out, result)
    return result


def _cell(one: Candidate, measured: Measured, plain: Measured) -> Cell:
    gap, error = behind(measured, plain)
    return Cell(one.kind, one.start, one.end, measured.depth, gap, error, measured.tokens)


def _facts(loaded: LoadedModel, windows: Windows) -> dict[str, str | int]:
    return {
        "model": loaded.digest,
        "text": windows.digest,
        "windows": len(windows),
        "tokens_of_a_window": windows.ids.shape[1],
        "numbers": str(loaded.model.dtype),
    }


def tell(listeners: Sequence[Callable[[Event], None]], event: Event) -> None:
    for listen in listeners:
        listen(event)


def search_folder(
    model: str,
    *,
    kind: Kind | Literal["free"] = "pairs",
    depth: int | None = None,
    pairs: int | None = None,
    max_loss: float | None = None,
    calibration: Path | None = None,
    report: Path | None = None,
    out: Path | None = None,
    merge: bool = False,
    device: str | None = None,
    questions: int = QUESTIONS,
    timed: bool = True,
    listeners: Sequence[Callable[[Event], None]] = (),
) -> DepthSearch:
    """The best way to run a model at each depth, and what that costs on text that was not searched on.

    Args:
        model: as in a recipe, a PEFT folder with `merge`, or `RUN` or `RUN:ARM`, whose report then shows the search.
        kind: `free` for pairs anywhere, or a kind of scan for the best stretch.
        depth: sequential steps to come down to; one of this, `pairs` and `max_loss` is given.
        pairs: steps less than layers.
        max_loss: what may be added to the loss (nats a token).
        calibration: text to search on; the built-in clinical terms when None.
        report: text to report on; what the search leaves of its own when None.
        out: a folder for `plan.json`, `search.parquet`, `search.json`, `loss_by_depth.svg` and `depth.html`; a search
            that was stopped is gone on with. Of a run, `RUN/depth/ARM` when None.
        merge: whether an adapter may be merged into its base.
        device: as of `load_model`.
        questions: choices to ask of the text to report on.
        timed: whether decoding is timed at each depth.
        listeners: told how far it is.

    Raises:
        UserError: none of `depth`, `pairs` and `max_loss` is given, or several are; the depth cannot be reached; the
            model cannot be rearranged; a text is too short; or the folder is of another search.
    """
    if [depth, pairs, max_loss].count(None) != 2:
        raise UserError(
            "a search needs one end",
            where="--depth, --pairs or --max-loss",
            hint="Name one: the steps to come down to (--depth 24), the pairs (--pairs 6), or what may be added to the "
            "loss (--max-loss 0.10).",
        )
    if max_loss is not None and not math.isfinite(max_loss):
        raise UserError(f"{max_loss} is no loss", where="--max-loss", hint="Name a number, such as 0.10.")
    whose, out = arm_of(model), kept_in(model, out)
    with whose[0].lock() if whose else contextlib.nullcontext():
        loaded = load_subject(model, merge=merge, device=device, quantised=quantised_error)
        texts = read_texts(loaded, calibration, report)
        log = Log(out / "search.parquet", _facts(loaded, texts.search)) if out else None

        def step(words: str, share: float) -> None:
            tell(listeners, WorkPlanned(work={words: 1.0}))
            tell(listeners, WorkDone(phase=words, share=share))

        least = depth if pairs is None else len(layers_of(loaded.model)) - pairs
        results = search(loaded.model, texts.search, kind=kind, depth=least, max_loss=max_loss, log=log, on_step=step)
        step("report", 0.0)
        front = frontier(
            loaded.model,
            results,
            texts.search,
            texts.report,
            choices_of(texts.report, questions),
            timed=timed,
            on_line=lambda share: step("report", share),
        )
        within = [one for one in results if max_loss is None or one.added.value <= max_loss]
        chosen = within[-1] if within else results[0]
        found = DepthSearch(
            model=model,
            arm=whose[1] if whose else "",
            weights=loaded.digest,
            frontier=front,
            chosen=tuple(step.layers for step in chosen.measured.steps),
            reached=bool(within),
        )
        if out:
            _write_search(out, found, chosen)
        if whose:
            _keep(whose[0], found)
    return found


def kept_in(model: str, out: Path | None) -> Path | None:
    """Where a search is written: the folder that is named, or that of the arm whose model is searched.

    Raises:
        UserError: the run cannot be read, or has no such arm.
    """
    if out is None and (whose := arm_of(model)):
        run, arm = whose
        return run.path / FOLDER / arm
    return out


def _write_search(out: Path, found: DepthSearch, chosen: Result) -> None:
    """Plan, figures and pages."""
    if isinstance(chosen.candidate.change, Plan):
        facts: dict[str, object] = {
            "model": found.model,
            "model_digest": found.weights,
            "kind": chosen.kind,
            "added_on_search_text": chosen.added.value,
            "allmend": __version__,
        }
        write_plan(out / "plan.json", chosen.plan, facts)
    write_atomic(out / "search.json", (found.model_dump_json(indent=1) + "\n").encode())
    write_search_pages(out, found)


def _keep(run: RunFolder, found: DepthSearch) -> None:
    """Put a search among a run's results, in the place of an earlier one of the same arm."""
    before = run.read_table(TABLE, DepthTable)
    others = [one for one in (before.searches if before else ()) if one.arm != found.arm]
    run.write_table(TABLE, DepthTable(searches=(*others, found)))
    write_report(run.path)
