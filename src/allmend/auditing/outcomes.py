"""The models of a run, as others would load them."""

import contextlib
from collections.abc import Iterator

import torch

from allmend.errors import UserError
from allmend.federation.strategies import STRATEGIES
from allmend.models.adapters import applied
from allmend.models.load import LoadedModel, load_model
from allmend.recipe import Recipe
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


def audited(recipe: Recipe) -> list[str]:
    """Arms that are audited, as far as the recipe alone tells."""
    if recipe.audit.models is not None:
        return list(recipe.audit.models)
    return [arm.name for arm in recipe.arms().values() if STRATEGIES[arm.strategy.name].shares]
