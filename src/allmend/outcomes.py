"""The models of a run, as others would load them."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from allmend.errors import UserError
from allmend.federation.arm import FOLDERS
from allmend.models.adapters import applied
from allmend.models.load import LoadedModel, load_model
from allmend.models.mixture import mixed
from allmend.results import BASE
from allmend.run import RunFolder


@contextlib.contextmanager
def outcome(run: RunFolder, model: LoadedModel, name: str, member: str | None = None) -> Iterator[torch.nn.Module]:
    """A model of the run as others would load it; afterwards the base in memory is as it was.

    It is the base, the base with an adapter or a mixture of experts in place, or the tuned model's folder.

    Args:
        run: finished or not.
        model: its base.
        name: `base` or an arm.
        member: whose own model of the arm; None for the one that all share.

    Raises:
        UserError: it is not here, or cannot be read.
    """
    folder = place_of(run, name, member)
    if name == BASE:
        yield model.model
    elif (folder / FOLDERS["lora"]).is_dir():
        with applied(model.model, folder / FOLDERS["lora"]) as module:
            yield module
    elif (folder / FOLDERS["mixture"]).is_dir():
        with mixed(model, folder / FOLDERS["mixture"]) as mixture:
            yield mixture.model
    elif (folder / FOLDERS["full"]).is_dir():
        yield load_model(str(folder / FOLDERS["full"]), dtype=model.model.dtype, device=model.model.device).model
    else:
        raise UserError(
            f"arm {name!r} has no tuned model yet",
            where=folder,
            hint=f"Finish the run: `allmend tune --resume {run.path}`.",
        )


def place_of(run: RunFolder, arm: str, member: str | None = None) -> Path:
    """Where the model that all clients of an arm share lies, or a member's own, in a folder that tells what it is."""
    return run.arm(arm) if member is None else run.arm(arm) / "members" / member


def members_with_outcome(run: RunFolder, arm: str) -> list[str]:
    """Members of an arm whose own models lie here."""
    here = {path.parent.name for kind in FOLDERS.values() for path in run.arm(arm).glob(f"members/*/{kind}")}
    return sorted(here)


def with_outcome(run: RunFolder, arms: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of the arms that lie here with a tuned model, of all members or of one at least, and the others.

    Raises:
        UserError: there are only others.
    """
    here = [
        name
        for name in arms
        if any((run.arm(name) / kind).is_dir() for kind in ("adapter", "model")) or members_with_outcome(run, name)
    ]
    if not here:
        raise UserError(
            "no tuned model is here yet" if arms else "no arm has a model that all clients share",
            where=run.path / "arms",
            hint=f"Finish the run: `allmend tune --resume {run.path}`. Of a copy, bring the folders `adapter` or "
            "`model` of its arms, or `members`."
            if arms
            else "Compare with an arm whose strategy shares one.",
        )
    return here, [name for name in arms if name not in here]
