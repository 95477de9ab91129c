"""LionAR: every neuron turns by the same angle in each step, and its weight's norm does not change by the step.

The idea of controlling the angle of updates is that of Kosson, Messmer, Jaggi ("Analyzing & Reducing the Need for
Learning Rate Warmup in GPT Training", NeurIPS 2024; "Rotational Equilibrium", ICML 2024). Ours are: the step along the
geodesic, which makes angle and norm exact, the schedule of the angle, and the gain that takes the place of a norm.
"""

import math
import warnings
from typing import Any, Literal, get_args

import torch
from torch import nn

from allmend.optim.blocks import local, splits_rows
from allmend.optim.closed_forms import direction_scale
from allmend.optim.groups import parameter_groups
from allmend.optim.kernels import Turn, turn_step
from allmend.optim.ramp import Ramp
from allmend.optim.signs import Group, NonFinite, SignOptimizer, give_back, toward

Norm = Literal["learned", "fixed"]

LEAST_IN_BFLOAT16 = 4e-3
"""Below this angle (radians), rounding to bfloat16 makes something else of a turn: of 0.003 rad comes 1.1 times as
much in a direction whose cosine with the right one is 0.85, of 0.001 rad 0.6 times as much with 0.5."""

MOST_ZERO_ROWS = 0.01
"""Share of zero rows in a matrix from which on it is told: they cannot turn."""


class LionAR(SignOptimizer):
    """x = w/‖w‖, d the unit tangent part of sign(u) at x: w ← r (x cos θ − d sin θ), for each row w of a matrix.

    θ_t = (η_t/η_peak)^p √(2 η_peak λ) s(β) c_t is the angle that AdamW has in equilibrium, from the first step on; λ
    sets nothing else. r is the row's norm, times a gain that is learned where `norm` is `learned`. What does not rotate
    (vectors, zero rows, rows of one element, groups with `rotational = False`) steps as under `LionA`, vectors without
    decay. States: `exp_avg` of the parameter's shape, and three numbers for each row.

    Args:
        params: tensors, groups or named tensors; `allmend.optim.parameter_groups` makes groups for a model. A group's
            keys are the arguments below, and `rotational`.
        lr: η; its value at construction is η_peak (or `initial_lr` of a group, which schedulers write).
        weight_decay: λ, above 0 where something rotates.
        beta: β, in [0, 1).
        nesterov: whether the newest gradient counts twice.
        momentum_ramp: c_t, as of `LionA`.
        rrc: as of `LionA`.
        batch_size: as of `LionA`.
        norm: `learned` for training from scratch, `fixed` for the norms of a matrix that was trained before.
        schedule_power: p.
        per_neuron: rows turn one by one; else a matrix turns as a whole.
        neuron_dim: 0 where a weight is [out, in], 1 where it is [in, out] (transformers' `Conv1D`).
        master_weights: as of `LionA`; a small turn needs it where parameters are bfloat16.
        nonfinite: as of `LionA`.
        compiled: as of `LionA`; two passes over memory.
        maximize: climb.

    Raises:
        ValueError: as of `LionA`; λ is 0 or the angle is π/2 or more where something rotates; or parameters were
            flattened (FSDP1) or sharded so that no process has whole rows.
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
        rrc: bool = False,
        batch_size: float | None = None,
        norm: Norm = "learned",
        schedule_power: float = 1.0,
        per_neuron: bool = True,
        neuron_dim: int = 0,
        master_weights: bool = False,
        nonfinite: NonFinite = "raise",
        compiled: bool = False,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            weight_decay=weight_decay,
            beta=beta,
            nesterov=nesterov,
            momentum_ramp=momentum_ramp,
            rrc=rrc,
            batch_size=batch_size,
            master_weights=master_weights,
            nonfinite=nonfinite,
            compiled=compiled,
            maximize=maximize,
            rotational=True,
            norm=norm,
            schedule_power=schedule_power,
            per_neuron=per_neuron,
            neuron_dim=neuron_dim,
        )

    @staticmethod
    def suggest_lr(
        model: nn.Module, *, target_angle: float = 0.02, weight_decay: float = 0.1, beta: float = 0.9
    ) -> float:
        """The learning rate at which this model's rows turn by an angle: θ² / (2 λ s(β)²).

        Of AdamW's best learning rate this is a multiple (16 times in the benchmark of the documentation), because the
        angle, not the length, is what it sets.

        Args:
            model: what is to be trained.
            target_angle: θ, radians in a step; 0.02 was best for a small model from scratch.
            weight_decay: λ.
            beta: β.

        Raises:
            ValueError: nothing in the model rotates, or a number is out of range.
        """
        if not any(group["rotational"] for group in parameter_groups(model)):
            raise ValueError(
                "nothing in this model rotates: it has no linear layer that learns, but for LoRA's factors"
            )
        if not (0 < target_angle < math.pi / 2 and weight_decay > 0):
            raise ValueError(
                f"target_angle must lie in (0, π/2) and weight_decay above 0, got {target_angle} and {weight_decay}"
            )
        return target_angle**2 / (2 * weight_decay * direction_scale(beta) ** 2)

    def add_param_group(self, param_group: Group) -> None:
        """As every optimiser's; the new group is checked, and its learning rate is its peak.

        Raises:
            ValueError: see the class.
        """
        lr = param_group.get("initial_lr", param_group.get("lr", self.defaults["lr"]))
        super().add_param_group({"peak_lr": float(lr)} | param_group)

    def _check(self, group: Group, number: int) -> None:
        super()._check(group, number)
        where = f"parameter group {number}"
        for key, known in (("norm", get_args(Norm)), ("schedule_power", (0.5, 1.0)), ("neuron_dim", (0, 1))):
            if group[key] not in known:
                raise ValueError(f"{where}: {key} must be one of {known}, got {group[key]!r}")
        if not group["rotational"]:
            return
        for index, parameter in enumerate(group["params"]):
            if hasattr(parameter, "_fsdp_flattened") or type(parameter).__name__ == "FlatParameter":
                raise ValueError(
                    f"{where}: FSDP1 has flattened parameter {index}, which has no rows any more: shard with "
                    "fully_shard (FSDP2), or set rotational = False"
                )
            if parameter.dim() >= 2 and splits_rows(parameter, group["neuron_dim"]):
                raise ValueError(
                    f"{where}: parameter {index} of shape {tuple(parameter.shape)} is sharded across its rows, so that "
                    "no process has a whole one: shard it by rows (Shard(0)), or set rotational = False"
                )
        if all(parameter.dim() < 2 for parameter in group["params"]):
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

    def angle(self, group: Group) -> float:
        """θ (radians) of a group at its learning rate now, without c_t."""
        share = (float(group["lr"]) / group["peak_lr"]) ** group["schedule_power"] if group["peak_lr"] else 0.0
        return share * _peak_angle(group)

    @torch.no_grad()
    def refresh_norms(self) -> None:
        """Take the norms that rows have now for theirs: call it after weights were averaged, merged or replaced."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state.get(parameter, {})
                if "master" in state:
                    state["master"].copy_(parameter)
                if "row_norm" in state:
                    norms = _norms(_rows(parameter, group))
                    state["row_norm"] = torch.where(state["row_norm"] > 0, norms / state["gain"], 0.0)

    def _update(self, parameter: torch.Tensor, gradient: torch.Tensor, group: Group) -> None:
        if parameter.dim() < 2:
            self._along_signs(parameter, gradient, group, decays=False)
        elif not group["rotational"]:
            self._along_signs(parameter, gradient, group)
        else:
            self._rotate(parameter, gradient, group)

    def _row_state(self, parameter: torch.Tensor, group: Group) -> dict[str, Any]:
        state = self._state(parameter, group)
        if "row_norm" not in state:
            rows = _rows(parameter, group)
            norms = _norms(rows)
            self._tell(parameter, group, local(norms), float(group["lr"]))
            if rows.shape[-1] == 1:  # one number has no direction to turn in
                norms.zero_()
            state["row_norm"] = norms
            state["gain"] = torch.ones_like(norms)
            state["radial_exp_avg"] = torch.zeros_like(norms)
        return state

    def _tell(self, parameter: torch.Tensor, group: Group, norms: torch.Tensor, lr: float) -> None:
        """Warn, once for each matrix, of what makes less of it than it looks."""
        where = f"a matrix of shape {tuple(parameter.shape)}"
        if (zero := float((norms == 0).float().mean())) > MOST_ZERO_ROWS:
            warnings.warn(
                f"{zero:.0%} of the rows of {where} are 0 and cannot turn: they step as under LionA", stacklevel=4
            )
        if lr < 0.5 * group["peak_lr"]:
            warnings.warn(
                f"LionAR begins at a learning rate of {lr:g}, below half its peak of {group['peak_lr']:g}: a warmup "
                "has nothing to do here, because the angle is right from the first step on",
                stacklevel=4,
            )
        theta = self.angle(group)
        if parameter.dtype == torch.bfloat16 and not group["master_weights"] and theta < LEAST_IN_BFLOAT16:
            warnings.warn(
                f"{where} in bfloat16 is to turn by {theta:.1e} rad a step: below {LEAST_IN_BFLOAT16:g} rounding makes "
                "something else of it. Set master_weights, or keep what learns in float32",
                stacklevel=4,
            )

    def _rotate(self, parameter: torch.Tensor, gradient: torch.Tensor, group: Group) -> None:
        state = self._row_state(parameter, group)
        state["step"] += 1
        factor, lr = self._factor(state, gradient, group), float(group["lr"])
        weight = state.get("master", parameter)
        w, m, g = (_rows(local(tensor), group) for tensor in (weight, state["exp_avg"], gradient))
        if lr == 0:
            toward(group).follow(m, g)  # no motion at all, not even that of rounding
            return
        norm, gain, radial = (local(state[name]) for name in ("row_norm", "gain", "radial_exp_avg"))
        turn = Turn(
            angle=self.angle(group) * factor,
            length=lr * direction_scale(group["beta"], nesterov=group["nesterov"]) * factor,
            keep=1 - lr * group["weight_decay"],
            learns_gain=group["norm"] == "learned",
        )
        turn_step(w, m, g, (norm, gain, radial), toward(group), turn, compiled=group["compiled"])
        give_back(parameter, state)


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
