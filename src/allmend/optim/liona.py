"""LionA: a sign update as long as AdamW's in a noisy run, so that AdamW's learning rate and weight decay carry over.

The idea of controlling the length of updates is that of Kosson, Messmer, Jaggi, "Analyzing & Reducing the Need for
Learning Rate Warmup in GPT Training", NeurIPS 2024; the exact scale is ours (`direction_scale`).
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, cast

import torch

from allmend.optim.closed_forms import direction_scale
from allmend.optim.ramp import RAMPS, Ramp, ramp_factor

Group: TypeAlias = dict[str, Any]

BLOCK = 1 << 18
"""Elements that are updated together: few enough that a block and its scratch stay in a CPU's cache."""


class LionA(torch.optim.Optimizer):
    """m ← βm + (1−β)g; w ← (1−ηλ)w − η s(β) c_t sign(u), with u = m, or βm + (1−β)g with Nesterov's direction.

    With λ = 0 each step has the length η s(β) c_t √n exactly, for n elements with a gradient. One state of the
    parameters' shape, `exp_avg`, in single precision at least, whatever the parameters are.

    Args:
        params: tensors, groups or named tensors, as of every optimiser of torch.
        lr: η, as for AdamW.
        weight_decay: λ, decoupled from the gradient.
        beta: β, in [0, 1).
        nesterov: whether the newest gradient counts twice.
        momentum_ramp: c_t: `none` for 1, `mean` for 1 − β^t, `random_walk` for √(1 − β^2t). A momentum that starts at 0
            grows so; a sign throws that away, and the ramp puts it back. It is a warmup of about 2 / (1 − β) steps.
        lazy_rows: rows whose gradient is zero neither move nor decay (an input embedding's rows that did not occur).
        maximize: climb.

    Raises:
        ValueError: a hyperparameter is out of range, in words that name it, or a parameter is complex.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float | torch.Tensor = 1e-3,
        weight_decay: float = 0.1,
        beta: float = 0.9,
        nesterov: bool = False,
        momentum_ramp: Ramp = "none",
        lazy_rows: bool = False,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "beta": beta,
            "nesterov": nesterov,
            "momentum_ramp": momentum_ramp,
            "lazy_rows": lazy_rows,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

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
        if group["momentum_ramp"] not in RAMPS:
            known = ", ".join(RAMPS)
            raise ValueError(f"{where}: momentum_ramp must be one of {known}, got {group['momentum_ramp']!r}")
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
        self._check_gradients()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _check_gradients(self) -> None:
        found = [
            (number, index, parameter.grad)
            for number, group in enumerate(self.param_groups)
            for index, parameter in enumerate(group["params"])
            if parameter.grad is not None
        ]
        for number, index, gradient in found:
            if gradient.is_sparse:
                raise RuntimeError(f"{_name(number, index, gradient)} is sparse, which sign updates cannot use")
        norms: dict[torch.device, list[torch.Tensor]] = {}
        for *_, gradient in found:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            norms.setdefault(gradient.device, []).append(_whole(torch.linalg.vector_norm(gradient, dtype=wide)))
        # one answer for all that lie on a device, which is waited for with each
        if all(torch.stack([norm.float() for norm in some]).isfinite().all() for some in norms.values()):
            return
        for number, index, gradient in found:  # a norm may overflow where no number does
            if not _whole(gradient.isfinite().all()):
                raise RuntimeError(
                    f"{_name(number, index, gradient)} holds NaN or infinite values, which would stay in the momentum"
                )

    def _state(self, parameter: torch.Tensor) -> dict[str, Any]:
        state = cast(dict[str, Any], self.state[parameter])
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            wide = torch.promote_types(parameter.dtype, torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=wide, memory_format=torch.preserve_format)
        return state

    def _update(self, parameter: torch.Tensor, gradient: torch.Tensor, group: Group) -> None:
        state = self._state(parameter)
        state["step"] += 1
        beta, lr = group["beta"], float(group["lr"])
        scale = direction_scale(beta, nesterov=group["nesterov"])
        scale *= ramp_factor(group["momentum_ramp"], beta, int(state["step"]))
        keep, length = 1 - lr * group["weight_decay"], lr * scale
        sign = -1.0 if group["maximize"] else 1.0
        for w, m, g in blocks(parameter, state["exp_avg"], gradient):
            moving = _moving_rows(g) if group["lazy_rows"] else None
            m.lerp_(g.to(m.dtype) * sign if sign < 0 else g.to(m.dtype), 1 - beta)
            u = m.lerp(g.to(m.dtype) * sign, 1 - beta) if group["nesterov"] else m
            direction = torch.sign(u)
            if moving is not None:
                w.copy_(torch.where(moving, w * keep - direction * length, w))
                continue
            if keep != 1:
                w.mul_(keep)
            w.add_(direction.to(w.dtype), alpha=-length)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimiser's, but that the momentum keeps its own type: torch would give it the parameter's."""
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
                    self.state[parameter][name] = value.to("cpu" if name == "step" else parameter.device, copy=True)


def _name(group: int, index: int, gradient: torch.Tensor) -> str:
    return f"the gradient of parameter {index} of group {group}, shape {tuple(gradient.shape)},"


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Of a tensor that is spread over processes, what they all see."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _moving_rows(gradient: torch.Tensor) -> torch.Tensor:
    if gradient.dim() < 2:
        return gradient != 0
    return (gradient != 0).flatten(1).any(1).view(-1, *[1] * (gradient.dim() - 1))


def blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same rows (of the first dimension) of several tensors, a few at a time where they are on a CPU."""
    first = tensors[0]
    if first.device.type != "cpu" or first.dim() == 0 or first.numel() <= BLOCK:
        yield tensors
        return
    rows = max(1, BLOCK * first.shape[0] // first.numel())
    yield from zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)
