"""The growth of a momentum that starts at zero, which sign and norm control throw away and a ramp puts back.

c_t = 1 − β^t is the factor that Adam divides by to correct its bias; that removing the correction stands in for warmup
is an observation of Kosson, Messmer, Jaggi, NeurIPS 2024. The form for a random walk is ours.
"""

import math
from typing import Any, Literal, get_args

import torch

from allmend.optim.hooked import Hooked

Ramp = Literal["none", "mean", "random_walk"]
RAMPS = get_args(Ramp)


def ramp_factor(ramp: Ramp, beta: float, step: int) -> float:
    """c_t of step t, from 1: 1, 1 − β^t, or √(1 − β^2t)."""
    if ramp == "none":
        return 1.0
    return 1 - beta**step if ramp == "mean" else math.sqrt(1 - beta ** (2 * step))


class MomentumRamp(Hooked):
    """The ramp for an optimiser that has none, such as AdamW: its learning rate is c_t times its own in step t.

    For Adam's kin, `mean` comes to leaving out the bias correction of the first moment. It works through the
    optimiser's hooks, beside any scheduler, and ends with `close` or the context. An optimiser that begins anew, as in
    every round of a federation, begins its ramp with it: t is the parameters' own step.

    Args:
        optimizer: any of torch's.
        beta: β; the groups' own first moment's (`betas`, `momentum`, `beta`) when None.
        ramp: `mean` or `random_walk`.

    Raises:
        ValueError: the optimiser has no momentum that is known here, and `beta` is None.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, beta: float | None = None, ramp: Ramp = "mean") -> None:
        self._betas = [beta if beta is not None else _momentum(group) for group in optimizer.param_groups]
        self._ramp, self._step = ramp, 0
        self._changed: list[tuple[Any, Any]] = []  # each group's own learning rate, and what it is during the step
        super().__init__(optimizer)

    def _begin(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._end(optimizer)  # a step that was broken off has not come to its end
        taken = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
        # an optimiser without a count of its own is counted here
        self._step = max(taken) + 1 if taken else 1 if not optimizer.state else self._step + 1
        for group, beta in zip(optimizer.param_groups, self._betas, strict=True):
            during = group["lr"] * ramp_factor(self._ramp, beta, self._step)
            self._changed.append((group["lr"], during))
            group["lr"] = during

    def _end(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group, (own, during) in zip(optimizer.param_groups, self._changed, strict=False):
            if group["lr"] is during:  # else a scheduler has changed it since
                group["lr"] = own
        self._changed = []


def _momentum(group: dict[str, Any]) -> float:
    if "betas" in group:
        return float(group["betas"][0])
    for key in ("beta", "momentum"):
        if key in group:
            return float(group[key])
    raise ValueError("this optimiser has no betas, beta or momentum: name one, as MomentumRamp(optimizer, beta=0.9)")
