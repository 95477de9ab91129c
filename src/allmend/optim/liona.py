"""LionA: a sign update as long as AdamW's in a noisy run, so that AdamW's learning rate and weight decay carry over.

The idea of controlling the length of updates is that of Kosson, Messmer, Jaggi, "Analyzing & Reducing the Need for
Learning Rate Warmup in GPT Training", NeurIPS 2024; the exact scale is ours (`direction_scale`).
"""

from typing import Any

import torch

from allmend.optim.ramp import Ramp
from allmend.optim.signs import NonFinite, SignOptimizer


class LionA(SignOptimizer):
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
        rrc: whether c_t also has a factor for each tensor that undoes what aligned gradients do to representations
            (`closed_forms.compensation`), from the signal over noise that momentum and gradients show. Gradients that
            are clipped before they come here falsify it. Off by default: no gain was measured.
        batch_size: examples in a step, over all ranks and accumulation steps; `rrc` needs it.
        lazy_rows: rows whose gradient is zero neither move nor decay (an input embedding's rows that did not occur).
        master_weights: whether parameters of less than single precision are kept in single precision besides (4 bytes
            a parameter more), so that small steps are not rounded away.
        nonfinite: what is done when a gradient holds NaN or infinite values: `raise` an error before anything moves,
            `skip` the step and count it in `skipped`, or `pass`, for loops that look themselves.
        compiled: whether steps run as kernels that `torch.compile` makes at the first of them: one pass over memory. On
            a CPU it needs a C++ compiler.
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
        rrc: bool = False,
        batch_size: float | None = None,
        lazy_rows: bool = False,
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
            lazy_rows=lazy_rows,
            master_weights=master_weights,
            nonfinite=nonfinite,
            compiled=compiled,
            maximize=maximize,
        )
