"""AdamW over named parameters, whose state travels as tensors: into checkpoints, and from one call to the next."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from allmend.models.tensors import Tensors


@dataclass
class Descent:
    """Takes AdamW's steps along the gradients that lie in the parameters.

    Attributes:
        parameters: what learns, by name, all on one device.
        weight_decay: decoupled from the gradient.
        start: a state that `state` has given; a fresh one when None.
    """

    parameters: Mapping[str, torch.nn.Parameter]
    weight_decay: float = 0.0
    start: Tensors | None = None
    _adam: torch.optim.AdamW = field(init=False)
    _foreach: bool | None = field(init=False)

    def __post_init__(self) -> None:
        device = next(iter(self.parameters.values())).device
        # one kernel for many tensors, where the device has such kernels
        self._foreach = None if device.type == "mps" else True
        # one pass over memory instead of a dozen: with millions of parameters, a CPU waits for nothing else
        self._adam = torch.optim.AdamW(list(self.parameters.values()), weight_decay=self.weight_decay, fused=True)
        for key, value in (self.start or {}).items():
            slot, _, name = key.partition("/")
            parameter = self.parameters[name]
            self._adam.state[parameter][slot] = value.to(parameter.device, copy=True)

    def clip(self, norm: float) -> float:
        """Scale the gradients down to a norm over all of them; gives the norm before."""
        return torch.nn.utils.clip_grad_norm_(self.parameters.values(), norm, foreach=self._foreach).item()

    def step(self, rate: float) -> None:
        """Take a step with this learning rate, and forget the gradients."""
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        self.forget()

    def forget(self) -> None:
        """Let go of the gradients."""
        self._adam.zero_grad(set_to_none=True)

    def state(self) -> Tensors:
        """AdamW's moments and step counts, as `SLOT/PARAMETER`, on the CPU."""
        return {
            f"{slot}/{name}": value.detach().to("cpu", copy=True)
            for name, parameter in self.parameters.items()
            for slot, value in self._adam.state[parameter].items()
        }
