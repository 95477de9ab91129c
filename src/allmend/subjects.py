"""What stages that change a model work on: the model, merged with its adapter where there is one, and two texts."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from allmend.check import source_of
from allmend.data.icd10cm import category_texts
from allmend.data.windows import Windows, check_apart, read_text, windows_after, windows_of
from allmend.errors import UserError
from allmend.models.adapters import applied, check_adapter
from allmend.models.load import LoadedModel, load_model
from allmend.models.sources import resolve
from allmend.outcomes import with_outcome
from allmend.prepare import differs, read_frozen
from allmend.run import RunFolder, run_and_arm

SEARCH, REPORT = (32, 256), (16, 512)
"""Windows and their tokens."""

BUILT_IN = "the built-in clinical terms"


@dataclass(frozen=True)
class Texts:
    """Text to search on, and text to report on."""

    search: Windows
    report: Windows


def load_subject(
    source: str,
    *,
    merge: bool = False,
    device: str | None = None,
    quantised: Callable[[Path], UserError] | None = None,
) -> LoadedModel:
    """A model to change; of a PEFT folder the base with the adapter merged into it.

    Args:
        source: a model as in a recipe, a PEFT folder, or the model of a run, `RUN` or `RUN:ARM`.
        merge: whether a PEFT folder may be merged; that of a run always is.
        device: as of `load_model`.
        quantised: what to say of a folder of quantised weights, before anything is loaded; when absent, it is loaded.

    Raises:
        UserError: the source is an adapter and may not be merged, or cannot be loaded.
    """
    if found := arm_of(source):
        return _of_run(source, *found, device)
    folder = Path(source).expanduser()
    if not (folder / "adapter_config.json").is_file():
        if quantised is not None and _is_quantised(place := resolve(source)):
            raise quantised(place)  # loading it would ask for its library first
        return load_model(source, device=device)
    if not merge:
        raise UserError(
            "is an adapter: its layers are those of its base, and the adapter's matrices beside them",
            where=source,
            hint="Add --merge to have it merged into its base first.",
        )
    check_adapter(folder)
    try:
        base = json.loads((folder / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"does not name its base model: {error}", where=folder / "adapter_config.json") from error
    return _merged(source, load_model(str(base), device=device), folder)


def arm_of(source: str) -> tuple[RunFolder, str] | None:
    """The run that a model is named by, and its arm; None of a model that is named otherwise.

    Raises:
        UserError: the run cannot be read, or has no such arm.
    """
    run, arm = run_and_arm(source)
    if not run.marker.is_file():
        return None
    run = RunFolder.open(run.path)
    recipe = read_frozen(run)
    arm = arm or recipe.strategy.name
    if arm not in recipe.arms():
        raise UserError(f"has no arm {arm!r}", where=run.path, hint=f"It has {', '.join(recipe.arms())}.")
    return run, arm


def _of_run(source: str, run: RunFolder, arm: str, device: str | None) -> LoadedModel:
    """The model that all members of an arm share."""
    with_outcome(run, [arm])  # before anything is loaded
    folder = run.arm(arm)
    if not (folder / "adapter").is_dir():
        return load_model(str(folder / "model"), device=device)
    loaded = load_model(source_of(read_frozen(run), Path(str(run.facts["base"]))), device=device)
    if loaded.digest != run.facts.get("model"):
        raise differs("the base model", run)
    return _merged(source, loaded, folder / "adapter")


def _merged(source: str, loaded: LoadedModel, folder: Path) -> LoadedModel:
    """A base with an adapter merged into it."""
    with applied(loaded.model, folder) as wrapped:
        whole: Any = wrapped
        whole.merge_adapter()
        # `unload`, at the end, puts the layers back as they are now: merged
    own = (folder / "adapter_model.safetensors").read_bytes()
    digest = hashlib.sha256(loaded.digest.encode() + hashlib.sha256(own).digest()).hexdigest()
    return replace(loaded, source=source, digest=digest)


def _is_quantised(folder: Path) -> bool:
    try:
        return "quantization_config" in json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False  # loading it says what is wrong


def read_calibration(loaded: LoadedModel, calibration: Path | None, *, search: tuple[int, int] = SEARCH) -> Windows:
    """Text to measure on, where nothing is reported afterwards; arguments and errors as of `read_texts`."""
    text, name = _text(calibration)
    return windows_of(text, loaded.tokenizer, length=search[1], most=search[0], source=name)


def _text(calibration: Path | None) -> tuple[str, str]:
    """A text, and what it is called."""
    if calibration is None:
        return "\n".join(category_texts()), BUILT_IN
    return read_text(calibration), str(calibration)


def read_texts(
    loaded: LoadedModel,
    calibration: Path | None,
    report: Path | None,
    *,
    search: tuple[int, int] = SEARCH,
    reported: tuple[int, int] = REPORT,
) -> Texts:
    """The two texts, none of which has anything of the other.

    Args:
        loaded: whose tokenizer cuts them.
        calibration: to search on; the built-in clinical terms when None.
        report: to report on; what the search leaves of its own text when None.
        search, reported: windows at most, and tokens of one.

    Raises:
        UserError: a file cannot be read, is too short, or both are the same.
    """
    text, name = _text(calibration)
    cut = loaded.tokenizer
    if report is not None:
        found = Texts(
            windows_of(text, cut, length=search[1], most=search[0], source=name),
            windows_of(read_text(report), cut, length=reported[1], most=reported[0], source=str(report)),
        )
        check_apart(found.search, found.report)
        return found
    begin, end = _split(text)
    return Texts(
        windows_of(begin, cut, length=search[1], most=search[0], source=f"{name}, first two thirds"),
        windows_of(end, cut, length=reported[1], most=reported[0], source=f"{name}, last third", least=1),
    )


def _split(text: str) -> tuple[str, str]:
    """What is searched on or learnt from, and the last third, which is reported on."""
    at = len(text) * 2 // 3
    return text[:at], text[at:]


def read_recovery_texts(
    loaded: LoadedModel, calibration: Path | None, report: Path | None, *, windows: int
) -> tuple[Windows, Windows]:
    """Text to learn from, without the first tokens, which a search has used, and text to report on.

    Args:
        loaded: whose tokenizer cuts them.
        calibration, report: as of `read_texts`.
        windows: to learn from, at most.

    Raises:
        UserError: a file cannot be read, is too short, or both are the same.
    """
    text, name = _text(calibration)
    begin, end = (text, read_text(report)) if report is not None else _split(text)
    learn = windows_after(
        begin, loaded.tokenizer, after=SEARCH[0] * SEARCH[1], length=REPORT[1], most=windows, source=name
    )
    named = f"{name}, last third" if report is None else str(report)
    unseen = windows_of(end, loaded.tokenizer, length=REPORT[1], most=REPORT[0], source=named, least=1)
    check_apart(learn, unseen)
    return learn, unseen
