"""LionAR: every neuron turns by the same angle in each step, and its weight's norm does not change by the step.

The idea of controlling the angle of updates is that of Kosson, Messmer, Jaggi ("Analyzing & Reducing the Need for
Learning Rate Warmup in GPT Training", NeurIPS 2024; "Rotational Equilibrium", ICML 2024). Ours are: the step along the
geodesic, which makes angle and norm exact, the schedule of the angle, and the gain that takes the place of a norm.
"""

import math
from typing import Any, Literal, get_args

import torch

from allmend.optim.closed_forms import direction_scale
from allmend.optim.liona import Group, LionA, blocks
from allmend.optim.ramp import Ramp, ramp_factor

Norm = Literal["learned", "fixed"]

LEAST_GAIN = 0.05
"""A gain does not fall below, since a row of norm 0 has no direction."""

LEAST_TANGENT = 1e-6
"""Over √C: a direction that is closer than that to the weight's own turns it nowhere."""


class LionAR(LionA):
    """x = w/‖w‖, d the unit tangent part of sign(u) at x: w ← r (x cos θ − d sin θ), for each row w of a matrix.

    θ_t = (η_t/η_peak)^p √(2 η_peak λ) s(β) c_t is the angle that AdamW has in equilibrium, from the first step on; λ
    sets nothing else. r is the row's norm, times a gain that is learned where `norm` is `learned`. What does not rotate
    (vectors, zero rows, rows of one element, groups with `rotational = False`) steps as under `LionA`, vectors without
    decay. States: `exp_avg` of the parameter's shape, and four numbers for each row.

    Args:
        params: tensors, groups or named tensors; `allmend.optim.parameter_groups` makes groups for a model. A group's
            keys are the arguments below, and `rotational`.
        lr: η; its value at construction is η_peak (or `initial_lr` of a group, which schedulers write).
        weight_decay: λ, above 0 where something rotates.
        beta: β, in [0, 1).
        nesterov: whether the newest gradient counts twice.
        momentum_ramp: c_t, as of `LionA`.
        norm: `learned` for training from scratch, `fixed` for the norms of a matrix that was trained before.
        schedule_power: p.
        per_neuron: rows turn one by one; else a matrix turns as a whole.
        neuron_dim: 0 where a weight is [out, in], 1 where it is [in, out] (transformers' `Conv1D`).
        maximize: climb.

    Raises:
        ValueError: as of `LionA`; λ is 0 or the angle is π/2 or more where something rotates.
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
        norm: Norm = "learned",
        schedule_power: float = 1.0,
        per_neuron: bool = True,
        neuron_dim: int = 0,
        maximize: bool = False,
    ) -> None:
        self._own_defaults = {
            "rotational": True,
            "norm": norm,
            "schedule_power": schedule_power,
            "per_neuron": per_neuron,
            "neuron_dim": neuron_dim,
        }
        super().__init__(
            params,
            lr=lr,
            weight_decay=weight_decay,
            beta=beta,
            nesterov=nesterov,
            momentum_ramp=momentum_ramp,
            maximize=maximize,
        )

    def add_param_group(self, param_group: Group) -> None:
        """As every optimiser's; the new group is checked, and its learning rate is its peak.

        Raises:
            ValueError: see the class.
        """
        group = self._own_defaults | param_group
        group.setdefault("peak_lr", float(group.get("initial_lr", group.get("lr", self.defaults["lr"]))))
        super().add_param_group(group)

    def _check(self, group: Group, number: int) -> None:
        super()._check(group, number)
        where = f"parameter group {number}"
        for key, known in (("norm", get_args(Norm)), ("schedule_power", (0.5, 1.0)), ("neuron_dim", (0, 1))):
            if group[key] not in known:
                raise ValueError(f"{where}: {key} must be one of {known}, got {group[key]!r}")
        if not group["rotational"] or all(parameter.dim() < 2 for parameter in group["params"]):
            return
        if group["weight_decay"] == 0:
            raise ValueError(
                f"{where}: with weight_decay = 0 the angle of its matrices is 0 and they would never turn; set it, or "
                "rotational = False"
            )
        angle = _peak_angle(group)
        if angle >= math.pi / 2:
            raise ValueError(
                f"{where}: lr = {group['peak_lr']} and weight_decay = {group['weight_decay']} make an angle of "
                f"{angle:.2f} rad a step, a quarter turn or more: lower one of them"
            )

    def angle(self, group: Group, step: int) -> float:
        """θ (radians) of a group at a step, from 1, at the group's learning rate now."""
        share = (float(group["lr"]) / group["peak_lr"]) ** group["schedule_power"] if group["peak_lr"] else 0.0
        return share * _peak_angle(group) * ramp_factor(group["momentum_ramp"], group["beta"], step)

    @torch.no_grad()
    def refresh_norms(self) -> None:
        """Take the norms that rows have now for theirs: call it after weights were averaged, merged or replaced."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state.get(parameter, {})
                if "row_norm" in state:
                    norms = _norms(_rows(parameter, group))
                    state["row_norm"] = torch.where(state["row_norm"] > 0, norms / state["gain"], 0.0)

    def _update(self, parameter: torch.Tensor, gradient: torch.Tensor, group: Group) -> None:
        if parameter.dim() < 2:
            super()._update(parameter, gradient, group | {"weight_decay": 0.0})
        elif not group["rotational"]:
            super()._update(parameter, gradient, group)
        else:
            self._rotate(parameter, gradient, group)

    def _row_state(self, parameter: torch.Tensor, group: Group) -> dict[str, Any]:
        state = self._state(parameter)
        if "row_norm" not in state:
            rows = _rows(parameter, group)
            norms = _norms(rows)
            if rows.shape[-1] == 1:  # one number has no direction to turn in
                norms.zero_()
            state["row_norm"] = norms
            state["gain"] = torch.ones_like(norms)
            state["radial_exp_avg"] = torch.zeros_like(norms)
        return state

    def _rotate(self, parameter: torch.Tensor, gradient: torch.Tensor, group: Group) -> None:
        state = self._row_state(parameter, group)
        state["step"] += 1
        step, beta = int(state["step"]), group["beta"]
        theta = self.angle(group, step)
        ramp = ramp_factor(group["momentum_ramp"], beta, step)
        length = float(group["lr"]) * direction_scale(beta, nesterov=group["nesterov"]) * ramp
        matrices = (_rows(parameter, group), _rows(state["exp_avg"], group), _rows(gradient, group))
        of_rows = (state["row_norm"], state["gain"], state["radial_exp_avg"])
        for w, m, g, norm, gain, radial in blocks(*matrices, *of_rows):
            g = -g.to(m.dtype) if group["maximize"] else g.to(m.dtype)
            now = w.to(m.dtype)
            size = _norms(now)
            m.lerp_(g, 1 - beta)
            s = torch.sign(m.lerp(g, 1 - beta) if group["nesterov"] else m)
            turns = norm > 0
            safe = torch.where(size > 0, size, 1.0)
            along = (s * now).sum(-1, keepdim=True) / safe
            count = s.square().sum(-1, keepdim=True)
            tangent = (count - along.square()).clamp_min_(0).sqrt_()
            moves = turns & (size > 0) & (tangent > LEAST_TANGENT * math.sqrt(w.shape[-1]))
            tangent = torch.where(moves, tangent, 1.0)
            if group["norm"] == "learned":
                radial.lerp_((g * now).sum(-1, keepdim=True) / safe, 1 - beta)
                gain.sub_(torch.sign(radial) * turns * length).clamp_min_(LEAST_GAIN)
            radius = norm * gain
            sine = torch.where(moves, radius * math.sin(theta) / tangent, 0.0)
            cosine = torch.where(moves, radius * math.cos(theta), radius)
            keep = (cosine + sine * along) / safe
            # what cannot turn steps as LionA does
            keep = torch.where(turns, keep, 1 - float(group["lr"]) * group["weight_decay"])
            sine = torch.where(turns, sine, length)
            w.copy_(now * keep - s * sine)


def _peak_angle(group: Group) -> float:
    scale = direction_scale(group["beta"], nesterov=group["nesterov"])
    return math.sqrt(2 * group["peak_lr"] * group["weight_decay"]) * scale


def _rows(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """The tensor with a neuron's elements in its last dimension."""
    if not group["per_neuron"]:
        return tensor.view(1, -1)
    return tensor.mT if group["neuron_dim"] == 1 else tensor


def _norms(rows: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    found: torch.Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=wide)
    return found
