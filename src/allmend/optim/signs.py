"""What LionA and LionAR have in common: steps along the signs of a momentum, whose size is controlled."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, cast, get_args

import torch

from allmend.optim.blocks import dot, local
from allmend.optim.closed_forms import compensation, direction_scale, noise_share
from allmend.optim.finite import refuse_sparse, what_is_wrong
from allmend.optim.kernels import Toward, sign_step
from allmend.optim.ramp import RAMPS, Ramp, ramp_factor

Group: TypeAlias = dict[str, Any]

NonFinite: TypeAlias = Literal["raise", "skip", "pass"]


class SignOptimizer(torch.optim.Optimizer):
    """m ← βm + (1−β)g; w ← (1−ηλ)w − η s(β) c_t sign(u), with u = m, or βm + (1−β)g with Nesterov's direction.

    States: `exp_avg` of the parameter's shape in single precision at least, `step`; with `master_weights`, `master`.

    Args:
        params: tensors, groups or named tensors, as of every optimiser of torch.
        defaults: of groups; their keys are `LionA`'s arguments.
        more: further defaults.

    Attributes:
        skipped: steps that were skipped for gradients that were no numbers.

    Raises:
        ValueError: a hyperparameter is out of range, in words that name it, or a parameter is complex.
    """

    skipped: int = 0

    def __init__(
        self,
        params: Any,
        *,
        lr: float | torch.Tensor,
        weight_decay: float,
        beta: float,
        nesterov: bool,
        momentum_ramp: Ramp,
        rrc: bool,
        batch_size: float | None,
        master_weights: bool,
        nonfinite: NonFinite,
        compiled: bool,
        maximize: bool,
        **more: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "beta": beta,
            "nesterov": nesterov,
            "momentum_ramp": momentum_ramp,
            "rrc": rrc,
            "batch_size": batch_size,
            "master_weights": master_weights,
            "nonfinite": nonfinite,
            "compiled": compiled,
            "maximize": maximize,
        }
        super().__init__(params, defaults | more)

    def add_param_group(self, param_group: Group) -> None:
        """As every optimiser's; the new group is checked.

        Raises:
            ValueError: see the class.
        """
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1], len(self.param_groups) - 1)
        except ValueError:
            del self.param_groups[-1]
            raise

    def _check(self, group: Group, number: int) -> None:
        where = f"parameter group {number}"
        if not float(group["lr"]) >= 0:
            raise ValueError(f"{where}: lr must be 0 or more, got {group['lr']}")
        if not group["weight_decay"] >= 0:
            raise ValueError(f"{where}: weight_decay must be 0 or more, got {group['weight_decay']}")
        if not 0 <= group["beta"] < 1:
            raise ValueError(f"{where}: beta must lie in [0, 1), got {group['beta']}")
        for key, known in (("momentum_ramp", RAMPS), ("nonfinite", get_args(NonFinite))):
            if group[key] not in known:
                raise ValueError(f"{where}: {key} must be one of {', '.join(known)}, got {group[key]!r}")
        if group["rrc"] and not (group["batch_size"] or 0) >= 1:
            raise ValueError(
                f"{where}: rrc needs batch_size, the examples in a step over all ranks and accumulation steps, got "
                f"{group['batch_size']}"
            )
        for index, parameter in enumerate(group["params"]):
            if torch.is_complex(parameter):
                raise ValueError(f"{where}: parameter {index} of shape {tuple(parameter.shape)} is complex")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; gives the closure's loss.

        Raises:
            RuntimeError: a gradient is sparse, or holds NaN or infinite values; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        refuse_sparse(self.param_groups)
        if wrong := what_is_wrong(self.param_groups):
            if any(group["nonfinite"] == "raise" for group in self.param_groups):
                raise RuntimeError(wrong)
            self.skipped += 1
            return loss
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: torch.Tensor, gradient: torch.Tensor, group: Group) -> None:
        self._along_signs(parameter, gradient, group)

    def _along_signs(
        self, parameter: torch.Tensor, gradient: torch.Tensor, group: Group, *, decays: bool = True
    ) -> None:
        state = self._state(parameter, group)
        state["step"] += 1
        lr = float(group["lr"])
        sign_step(
            local(state.get("master", parameter)),
            local(state["exp_avg"]),
            local(gradient),
            toward(group),
            keep=1 - lr * group["weight_decay"] if decays else 1.0,
            length=self._length(state, gradient, group),
            lazy=group.get("lazy_rows", False),
            compiled=group["compiled"],
        )
        give_back(parameter, state)

    def _state(self, parameter: torch.Tensor, group: Group) -> dict[str, Any]:
        state = cast(dict[str, Any], self.state[parameter])
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            wide = torch.promote_types(parameter.dtype, torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=wide, memory_format=torch.preserve_format)
            if group["master_weights"] and wide != parameter.dtype:
                state["master"] = parameter.detach().to(wide, copy=True)
        return state

    def _length(self, state: dict[str, Any], gradient: torch.Tensor, group: Group) -> float:
        """η s(β) c_t of the step that comes."""
        scale = direction_scale(group["beta"], nesterov=group["nesterov"])
        return float(group["lr"]) * scale * self._factor(state, gradient, group)

    def _factor(self, state: dict[str, Any], gradient: torch.Tensor, group: Group) -> float:
        """c_t; with RRC compensation, of this tensor."""
        step = int(state["step"])
        factor = ramp_factor(group["momentum_ramp"], group["beta"], step)
        return factor * _compensated(state, gradient, group, step) if group["rrc"] else factor

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimiser's, but that states keep their own types: torch would give them the parameters'."""
        super().load_state_dict(state_dict)
        saved = {
            index: state_dict["state"].get(index, {})
            for group in state_dict["param_groups"]
            for index in group["params"]
        }
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter, state in zip(own, saved.values(), strict=True):
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    self.state[parameter][name] = value.to("cpu" if name in SCALARS else parameter.device, copy=True)


SCALARS = ("step", "grad_square")
"""States that are one number and stay on the CPU."""


def _compensated(state: dict[str, Any], gradient: torch.Tensor, group: Group, step: int) -> float:
    """ρ of `closed_forms.compensation`, with Φ from what momentum and gradients of this tensor show."""
    beta, m = group["beta"], state["exp_avg"]
    g = gradient.to(m.dtype)
    g = -g if group["maximize"] else g
    of_gradient = dot(g, g)
    # ‖βm + (1−β)g‖², before the momentum is there
    of_momentum = beta**2 * dot(m, m) + 2 * beta * (1 - beta) * dot(m, g) + (1 - beta) ** 2 * of_gradient
    mean = state.setdefault("grad_square", torch.zeros((), dtype=torch.float32))
    mean.mul_(beta).add_((1 - beta) * of_gradient)
    if step == 1:  # nothing is known yet: as if all gradients were aligned
        return compensation(float("inf"), group["batch_size"])
    weight, kappa = 1 - beta**step, noise_share(beta, step)
    corrected, total = of_momentum / weight**2, float(mean) / weight
    signal, noise = max(corrected - kappa * total, 0.0), max(total - corrected, 0.0)
    return compensation(signal / noise if noise else float("inf"), group["batch_size"])


def toward(group: Group) -> Toward:
    """Which way a group's steps go."""
    return Toward(group["beta"], group["nesterov"], group["maximize"])


def give_back(parameter: torch.Tensor, state: dict[str, Any]) -> None:
    """Round what was stepped in single precision to the parameter."""
    if "master" in state:
        parameter.copy_(state["master"])
