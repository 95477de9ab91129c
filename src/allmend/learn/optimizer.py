"""A party's optimiser over named parameters; its state travels as tensors: into checkpoints, and on to other calls."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from allmend.learn.updates import UpdateSize, size_of
from allmend.models.tensors import Tensors
from allmend.optim import LionAR, MomentumRamp, UpdateMonitor, build_optimizer
from allmend.optim.signs import SCALARS
from allmend.recipe import Train


@dataclass
class Descent:
    """Takes an optimiser's steps along the gradients that lie in the parameters.

    Attributes:
        model: whose parameters they are.
        parameters: what learns, by name, all on one device.
        settings: which optimiser, and how it begins.
        start: a state that `state` has given; a fresh one when None.
    """

    model: nn.Module
    parameters: Mapping[str, torch.nn.Parameter]
    settings: Train
    start: Tensors | None = None
    _optimizer: torch.optim.Optimizer = field(init=False)
    _foreach: bool | None = field(init=False)
    _monitor: UpdateMonitor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        device = next(iter(self.parameters.values())).device
        # one kernel for many tensors, where the device has such kernels
        self._foreach = None if device.type == "mps" else True
        self._optimizer = _built(self.model, self.parameters, self.settings)
        for key, value in (self.start or {}).items():
            slot, _, name = key.partition("/")
            parameter = self.parameters[name]
            stays = (
                slot in SCALARS and self.settings.optimizer != "adamw"
            )  # whose kernel wants its count beside the rest
            self._optimizer.state[parameter][slot] = value.to("cpu" if stays else parameter.device, copy=True)
        if isinstance(self._optimizer, LionAR):  # what it starts from may have been averaged since
            self._optimizer.refresh_norms()
        if self.settings.log_updates:  # before the ramp, whose learning rate it is to see
            self._monitor = UpdateMonitor(self.model, self._optimizer)
        if self.settings.optimizer_state == "ramp" and self.settings.optimizer not in ("liona", "lionar"):
            MomentumRamp(self._optimizer)

    def clip(self, norm: float) -> float:
        """Scale the gradients down to a norm over all of them; gives the norm before."""
        return torch.nn.utils.clip_grad_norm_(self.parameters.values(), norm, foreach=self._foreach).item()

    def step(self, rate: float) -> UpdateSize | None:
        """Take a step with this learning rate, and forget the gradients; gives its size, where it was looked at."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self.forget()
        return None if self._monitor is None else size_of(self._monitor)

    def forget(self) -> None:
        """Let go of the gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def state(self) -> Tensors:
        """The optimiser's moments and step counts, as `SLOT/PARAMETER`, on the CPU."""
        return {
            f"{slot}/{name}": value.detach().to("cpu", copy=True)
            for name, parameter in self.parameters.items()
            for slot, value in self._optimizer.state[parameter].items()
            if isinstance(value, torch.Tensor)
        }


def _built(model: nn.Module, parameters: Mapping[str, nn.Parameter], settings: Train) -> torch.optim.Optimizer:
    if settings.optimizer == "adamw":
        # one pass over memory instead of a dozen: with millions of parameters, a CPU waits for nothing else
        return torch.optim.AdamW(list(parameters.values()), weight_decay=settings.weight_decay, fused=True)
    options: dict[str, object] = {}
    if settings.optimizer in ("liona", "lionar"):
        # the loop looks at the norm of the gradient, and what is adapted was trained before
        options = {"nonfinite": "pass", "momentum_ramp": "mean" if settings.optimizer_state == "ramp" else "none"}
    if settings.optimizer == "lionar":
        options["norm"] = "fixed"
    return build_optimizer(
        settings.optimizer, model, lr=settings.learning_rate, weight_decay=settings.weight_decay, **options
    )
