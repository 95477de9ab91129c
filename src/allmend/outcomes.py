"""The models of a run, as others would load them."""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from allmend.errors import UserError
from allmend.models.adapters import applied
from allmend.models.load import LoadedModel, load_model
from allmend.results import BASE
from allmend.run import RunFolder


@contextlib.contextmanager
def outcome(run: RunFolder, model: LoadedModel, name: str) -> Iterator[torch.nn.Module]:
    """A model of the run as others would load it: the base, base and adapter, or the tuned model's folder."""
    folder = run.arm(name)
    if name == BASE:
        yield model.model
    elif (folder / "adapter").is_dir():
        with applied(model.model, folder / "adapter") as module:
            yield module
    elif (folder / "model").is_dir():
        yield load_model(str(folder / "model"), dtype=model.model.dtype, device=model.model.device).model
    else:
        raise UserError(
            f"arm {name!r} has no tuned model yet",
            where=folder,
            hint=f"Finish the run: `allmend tune --resume {run.path}`.",
        )


def with_outcome(run: RunFolder, arms: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of the arms that lie here with a tuned model, and the others.

    Raises:
        UserError: there are only others.
    """
    here = [name for name in arms if any((run.arm(name) / kind).is_dir() for kind in ("adapter", "model"))]
    if not here:
        raise UserError(
            "no tuned model is here yet" if arms else "no arm has a model that all clients share",
            where=run.path / "arms",
            hint=f"Finish the run: `allmend tune --resume {run.path}`. Of a copy, bring the folders `adapter` or "
            "`model` of its arms."
            if arms
            else "The audit reads such models only: compare with an arm whose strategy shares one.",
        )
    return here, [name for name in arms if name not in here]
