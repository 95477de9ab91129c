"""The folder of a paired model, and what recovery wins back before it is written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from allmend.data.windows import Windows
from allmend.depth.apply import apply_plan, check_new, save_paired
from allmend.depth.architectures import layers_of, quantised_error
from allmend.depth.correction import CorrectionReport, correct
from allmend.depth.fold import Gain
from allmend.depth.plan import Plan, read_plan
from allmend.depth.recover import Recovery, Training, recover
from allmend.errors import UserError
from allmend.events import Event, WorkPlanned
from allmend.meter import Meter
from allmend.models.load import LoadedModel
from allmend.pairing.folders import tell
from allmend.subjects import load_subject, read_recovery_texts

FITTED, JUDGED = 24, 4
"""Windows that a correction is fitted on, and that it is judged by."""


@dataclass(frozen=True)
class Applied:
    """A folder that was written.

    Attributes:
        out: the folder.
        architecture: class of the model in it.
        depth: its sequential steps, of so many `layers`.
        parameters: it has, and the original.
        correction: what fitting the output projections won back; None where it was not asked for.
        recovery: what training won back, beside the original with as much of it; None without training.
    """

    out: Path
    architecture: str
    depth: int
    layers: int
    parameters: tuple[int, int]
    correction: CorrectionReport | None = None
    recovery: Recovery | None = None


def apply_folder(
    model: str,
    plan: Path,
    out: Path,
    *,
    gain: Gain = "geometric",
    corrected: bool = False,
    training: Training | None = None,
    calibration: Path | None = None,
    report: Path | None = None,
    merge: bool = False,
    device: str | None = None,
    listeners: Sequence[Callable[[Event], None]] = (),
) -> Applied:
    """Write the folder of a model whose groups of layers are one wider layer each.

    Args:
        model: as in a recipe, or a PEFT folder with `merge`.
        plan: a file of `search_folder`, or one written by hand.
        out: a folder that is not there yet, or is empty.
        gain: see `fold_group`.
        corrected: whether the folded layers' output projections are fitted to the original first (`depth.correct`).
        training: of the folded layers before they are written; none when None.
        calibration: text to fit on and learn from, beyond its first tokens, which a search takes; the built-in clinical
            terms when None.
        report: text to measure recovery on; the last third of the other when None.
        merge: whether an adapter may be merged into its base.
        device: as of `load_model`.
        listeners: told how far it is.

    Raises:
        UserError: the plan does not fit the model, the model cannot be folded, the folder is there already, a text is
            too short, or training diverged.
    """
    wanted = read_plan(plan)
    check_new(out)  # before any work
    loaded = load_subject(model, merge=merge, device=device, quantised=quantised_error)
    layers = len(layers_of(loaded.model))
    wanted.check(layers, where=plan)
    changed = apply_plan(loaded.model, wanted, gain=gain)
    correction, recovery = _won_back(
        loaded, changed, wanted, corrected, training, calibration, report, emit=lambda event: tell(listeners, event)
    )
    facts: dict[str, object] = {"model": model, "model_digest": loaded.digest}
    facts |= {"correction": correction.model_dump()} if correction is not None else {}
    facts |= {"recovery": recovery.model_dump()} if recovery is not None else {}
    save_paired(changed, loaded.tokenizer, out, wanted, facts)
    now, before = (sum(p.numel() for p in one.parameters()) for one in (changed, loaded.model))
    return Applied(out, type(changed).__name__, wanted.depth, layers, (now, before), correction, recovery)


def _won_back(
    loaded: LoadedModel,
    changed: Any,
    plan: Plan,
    corrected: bool,
    training: Training | None,
    calibration: Path | None,
    report: Path | None,
    *,
    emit: Callable[[Event], None],
) -> tuple[CorrectionReport | None, Recovery | None]:
    """Fit and train the folded layers of a paired model, in place, as far as it is asked for."""
    lessons = training.steps * training.batch_size if training is not None else 0
    windows = lessons + (FITTED + JUDGED if corrected else 0)
    if not windows:
        return None, None
    learn, unseen = read_recovery_texts(loaded, calibration, report, windows=windows)
    correction = recovery = None
    if corrected:
        fitted, judged, learn = _parts(learn, need=bool(lessons))
        each = fitted.tokens + judged.tokens
        meter = _announced("correct", 2 * len(plan.together) * each, emit)
        correction = correct(changed, loaded.model, plan, fitted, held_out=judged, on_fit=lambda fit: meter.add(each))
        meter.done()
    if training is not None:
        models = 1 if training.loss == "kl" else 2
        counted = _announced("recover", models * lessons * learn.ids.shape[1], emit)
        recovery = recover(
            changed,
            loaded.model,
            plan,
            learn,
            report=unseen,
            training=training,
            on_step=lambda which, step: counted.add(step.tokens),
        )
        counted.done()
    return correction, recovery


def _announced(phase: str, tokens: int, emit: Callable[[Event], None]) -> Meter:
    emit(WorkPlanned(work={phase: float(tokens)}))
    return Meter(emit, phase, tokens)


def _parts(windows: Windows, *, need: bool) -> tuple[Windows, Windows, Windows]:
    """Text to fit on, to judge by, and the rest; all of a short one shrinks.

    Raises:
        UserError: there is not enough of it.
    """
    if len(windows) < (least := 4 if need else 3):
        raise UserError(
            f"the text has {len(windows)} windows of {windows.ids.shape[1]} tokens that no search has used, and a "
            f"correction needs {least} or more",
            where=windows.source,
            hint="Name a longer text with --calibration.",
        )
    judged = min(JUDGED, len(windows) // 4 or 1)
    fitted = min(FITTED, len(windows) - judged - need)
    ends = (0, fitted, fitted + judged, len(windows))
    first, second, rest = (replace(windows, ids=windows.ids[start:end]) for start, end in pairwise(ends))
    return first, second, rest
