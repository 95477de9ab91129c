"""An optimiser by name, over a model's parameters in groups: ours, torch's, and two of packages that may be there."""

import difflib
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from allmend.optim.groups import parameter_groups
from allmend.optim.liona import LionA
from allmend.optim.lionar import LionAR
from allmend.optim.together import Together

Builder = Callable[..., torch.optim.Optimizer]


def build_optimizer(
    name: str, model: nn.Module, *, lr: float, weight_decay: float = 0.1, **options: Any
) -> torch.optim.Optimizer:
    """An optimiser over what learns in a model; vectors have no weight decay.

    Args:
        name: `adamw`, `radam`, `sgd`, `liona`, `lionar`, `muon` (for the weights of linear layers; AdamW for the rest);
            `lion` and `schedulefree` (AdamW) are those of the packages `lion-pytorch` and `schedulefree`.
        model: any module.
        lr: of all groups.
        weight_decay: of matrices.
        options: the optimiser's own.

    Raises:
        ValueError: there is no such optimiser, its package is missing, or nothing in the model learns.
        TypeError: it has no such option.
    """
    check_name(name)
    return BUILDERS[name](model, lr=lr, weight_decay=weight_decay, **options)


def check_name(name: str) -> None:
    """Raise unless there is such an optimiser.

    Raises:
        ValueError: there is none; the message has the nearest name.
    """
    if name not in BUILDERS:
        near = difflib.get_close_matches(name, BUILDERS, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"there is no optimiser {name!r} (there are {', '.join(BUILDERS)}){meant}")


def _plain(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    groups = parameter_groups(model, rotational="none", weight_decay=weight_decay)
    return [{key: group[key] for key in ("params", "weight_decay")} for group in groups]


def _adamw(model: nn.Module, *, lr: float, weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_plain(model, weight_decay), lr=lr, **options)


def _radam(model: nn.Module, *, lr: float, weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.RAdam(_plain(model, weight_decay), lr=lr, decoupled_weight_decay=True, **options)


def _sgd(model: nn.Module, *, lr: float, weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(_plain(model, weight_decay), lr=lr, **{"momentum": 0.9} | options)


def _liona(model: nn.Module, *, lr: float, weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    return LionA(_plain(model, weight_decay), lr=lr, **options)


def _lionar(model: nn.Module, *, lr: float, weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    return LionAR(parameter_groups(model, weight_decay=weight_decay), lr=lr, **options)


def _muon(model: nn.Module, *, lr: float, weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    groups = parameter_groups(model, weight_decay=weight_decay)
    matrices = [parameter for group in groups if group["rotational"] for _, parameter in group["params"]]
    still = (group for group in groups if not group["rotational"])
    rest = [{key: group[key] for key in ("params", "weight_decay")} for group in still]
    # of the size of AdamW's updates, so that one learning rate serves both
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, **{"adjust_lr_fn": "match_rms_adamw"} | options)
    return Together(muon, torch.optim.AdamW(rest, lr=lr)) if rest else muon


def _lion(model: nn.Module, *, lr: float, weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    found: torch.optim.Optimizer = _of("lion_pytorch", "Lion")(_plain(model, weight_decay), lr=lr, **options)
    return found


def _schedulefree(model: nn.Module, *, lr: float, weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    adamw = _of("schedulefree", "AdamWScheduleFree")
    found: torch.optim.Optimizer = adamw(_plain(model, weight_decay), lr=lr, **options)
    return found


def _of(package: str, name: str) -> Any:
    """An optimiser of a package that may be there."""
    if find_spec(package) is None:
        raise ValueError(f"{package} is not installed: `pip install {package.replace('_', '-')}`")
    return getattr(import_module(package), name)


BUILDERS: dict[str, Builder] = {
    "adamw": _adamw,
    "radam": _radam,
    "lion": _lion,
    "sgd": _sgd,
    "liona": _liona,
    "lionar": _lionar,
    "muon": _muon,
    "schedulefree": _schedulefree,
}
