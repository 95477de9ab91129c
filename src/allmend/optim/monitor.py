"""How large an optimiser's updates are: length, angle, and what they do to representations; for any optimiser of torch.

Length and angle are the first criteria of Kosson, Messmer, Jaggi, "Analyzing & Reducing the Need for Learning Rate
Warmup in GPT Training", NeurIPS 2024. The relative change of a representation is taken here as ‖Δy‖ / ‖y‖ of a layer's
outputs on its own inputs, and of the logits on a batch that stays the same.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from torch import nn

from allmend.optim.blocks import blocks
from allmend.optim.closed_forms import adamw_angle, first_step_spike, lion_angle, sgdm_angle
from allmend.optim.hooked import Hooked

EARLY = 3
"""Steps at the start that are always looked at: what needs a warmup shows there."""

MOST_ROWS = 256
"""Rows of a layer's input on which the change of its output is measured."""

WARMUP = 2.0
"""First steps that are longer than later ones by so much, or turn rows further by it, call for a warmup."""


@dataclass(frozen=True)
class Update:
    """One step's change of one tensor.

    Attributes:
        step: from 1, counted since the monitor began.
        name: of the parameter.
        length: ‖w_{t+1} − w_t‖, decay included.
        without_decay: the same without the shrinking of decoupled weight decay.
        angle: root mean square over rows of the angle between a row before and after (radians); None for vectors.
        largest_angle: of a row.
        norm: ‖w_t‖.
        output_change: ‖ΔW X‖ / ‖W X‖ on the layer's own inputs; None where these were not seen.
    """

    step: int
    name: str
    length: float
    without_decay: float
    angle: float | None
    largest_angle: float | None
    norm: float
    output_change: float | None = None


@dataclass(frozen=True)
class Tensor:
    """A tensor's updates over the run.

    Attributes:
        name: of the parameter.
        first, later: length of the first update, and the median of later ones.
        first_angle, later_angle: the same of angles (radians); None for vectors.
        equilibrium: the angle that this optimiser comes to in noise, where its form is known (`closed_forms`).
        output_change: the largest relative change of the layer's output.
    """

    name: str
    first: float
    later: float
    first_angle: float | None
    later_angle: float | None
    equilibrium: float | None
    output_change: float | None

    @property
    def spike(self) -> float:
        """How many times longer the first update is than later ones."""
        return self.first / self.later if self.later > 0 else math.inf


@dataclass(frozen=True)
class Report:
    """What the updates of a run were like.

    Attributes:
        tensors: by name, in the model's order.
        whole: ‖Δ‖ over all tensors, by step.
        logits: relative change of the logits on the probe, by step; empty without one.
        expected_spike: what bias correction alone makes of the first step, where the optimiser has one.
    """

    tensors: tuple[Tensor, ...]
    whole: dict[int, float]
    logits: dict[int, float] = field(default_factory=dict)
    expected_spike: float | None = None

    @property
    def spike(self) -> float:
        """Length of the first step over the median of later ones, over all tensors."""
        steps = sorted(self.whole)
        later = [self.whole[step] for step in steps[1:]]
        return self.whole[steps[0]] / median(later) if later and median(later) > 0 else math.nan

    @property
    def verdict(self) -> str:
        """Whether the run wants a warmup, in a sentence."""
        if math.isnan(self.spike):
            return "Too few steps were seen to say anything."
        turned = [one for one in self.tensors if one.equilibrium and one.first_angle]
        far = [one for one in turned if (one.first_angle or 0) > WARMUP * (one.equilibrium or math.inf)]
        if self.spike > WARMUP:
            why = f"The first step is {self.spike:.1f} times as long as later ones"
            why += f" (bias correction alone makes it {self.expected_spike:.1f})" if self.expected_spike else ""
            return f"{why}: this run wants a warmup, or a momentum ramp."
        if far:
            return (
                f"The first step turns {len(far)} of {len(turned)} matrices more than {WARMUP:g} times as far as their "
                "equilibrium: this run wants a warmup, or control of angles."
            )
        return "The first steps are no larger than later ones: a warmup has nothing to do here."

    def to_json(self) -> str:
        """As JSON; numbers that are not finite become null."""
        content = asdict(self) | {"spike": self.spike, "verdict": self.verdict}
        return json.dumps(_finite(content), indent=1)


class UpdateMonitor(Hooked):
    """Looks at an optimiser's steps, every so often, through its hooks. Use it as a context, or call `close`.

    A step that is looked at takes a copy of what learns, and passes over each tensor a few times.

    Args:
        model: its parameters' names, and its layers' inputs.
        optimizer: any optimiser of torch over them.
        every: steps between two looks, after the first few.
        probe: gives logits on a batch that stays the same, for the change of what the whole model says. Called before
            and after each step that is looked at, without gradients.
        outputs: whether to look at what layers make of their inputs, too.

    Raises:
        ValueError: `every` is below 1, or the optimiser steps no parameter of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        every: int = 10,
        probe: Callable[[], torch.Tensor] | None = None,
        outputs: bool = False,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be 1 or more, got {every}")
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._names = {id(p): name for name, p in model.named_parameters() if id(p) in own}
        if not self._names:
            raise ValueError("the optimiser steps no parameter of this model")
        self.updates: list[Update] = []
        self.logits: dict[int, float] = {}
        self._optimizer, self._every, self._probe = optimizer, every, probe
        self._step = 0
        self._before: dict[int, torch.Tensor] = {}
        self._inputs: dict[int, torch.Tensor] = {}
        self._said: torch.Tensor | None = None
        super().__init__(optimizer)
        if outputs:
            layers = (module for module in model.modules() if isinstance(module, nn.Linear))
            self._hooks += [m.register_forward_pre_hook(self._keep) for m in layers if id(m.weight) in self._names]

    def close(self) -> None:
        """Take all hooks away; what was seen stays."""
        super().close()
        self._before.clear()
        self._inputs.clear()

    @property
    def newest(self) -> tuple[Update, ...]:
        """The updates of the step that was just taken; empty where it was not looked at."""
        return tuple(one for one in self.updates[-len(self._names) :] if one.step == self._step)

    def equilibrium(self, name: str) -> float | None:
        """The angle (radians) that this optimiser comes to with a matrix, where its form is known."""
        group = next(group for group, parameter in self._parameters() if self._names[id(parameter)] == name)
        return _equilibrium(self._optimizer, group)

    def report(self) -> Report:
        """What was seen so far."""
        by_name: dict[str, list[Update]] = {}
        whole: dict[int, float] = {}
        for one in self.updates:
            by_name.setdefault(one.name, []).append(one)
            whole[one.step] = math.hypot(whole.get(one.step, 0.0), one.length)
        tensors = (self._tensor(by_name[name]) for name in self._names.values() if name in by_name)
        betas = [beta for group in self._optimizer.param_groups if (beta := _bias_corrected(self._optimizer, group))]
        return Report(tuple(tensors), whole, dict(self.logits), first_step_spike(betas[0]) if betas else None)

    def to_csv(self) -> str:
        """Every look at every tensor, as CSV with a header."""
        out = io.StringIO()
        rows = [asdict(one) for one in self.updates]
        writer = csv.DictWriter(out, fieldnames=list(Update.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()

    def _tensor(self, updates: list[Update]) -> Tensor:
        first, later = updates[0], updates[1:] or updates
        angles = [one.angle for one in later if one.angle is not None]
        changes = [one.output_change for one in updates if one.output_change is not None]
        return Tensor(
            name=first.name,
            first=first.length,
            later=median(one.length for one in later),
            first_angle=first.angle,
            later_angle=median(angles) if angles else None,
            equilibrium=self.equilibrium(first.name) if angles else None,
            output_change=max(changes, default=None),
        )

    def _parameters(self) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in self._names:
                    yield group, parameter

    def _due(self, step: int) -> bool:
        return step <= EARLY or step % self._every == 0

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], torch.Tensor) and self._due(self._step + 1):
            rows = inputs[0].detach().flatten(0, -2)
            self._inputs[id(module.weight)] = rows[:: max(1, len(rows) // MOST_ROWS)][:MOST_ROWS].clone()

    @torch.no_grad()
    def _begin(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._step += 1
        if not self._due(self._step):
            return
        self._before = {id(p): p.detach().clone() for _, p in self._parameters() if p.grad is not None}
        self._said = self._probe() if self._probe else None

    @torch.no_grad()
    def _end(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group, parameter in self._parameters() if self._before else ():
            before = self._before.get(id(parameter))
            if before is not None:
                self.updates.append(self._measured(group, parameter, before))
        self._before, self._inputs = {}, {}
        if self._said is not None and self._probe:
            self.logits[self._step] = _relative(self._probe() - self._said, self._said)
            self._said = None

    def _measured(self, group: dict[str, Any], after: torch.Tensor, before: torch.Tensor) -> Update:
        decay = float(group["lr"]) * group.get("weight_decay", 0.0) if _decoupled(self._optimizer, group) else 0.0
        sums = torch.zeros(3, dtype=torch.float64)  # ‖Δ‖², ⟨w, Δ⟩, ‖w‖²
        angles: list[torch.Tensor] = []
        for old, new in blocks(before, after):  # whole tensors would leave the caches
            rows = row_sums(old, new)
            sums += torch.stack([one.sum() for one in rows]).cpu()
            if after.dim() >= 2:
                angles.append(_angles(*rows))
        changed, along, size = sums.tolist()
        undecayed = max(0.0, changed + 2 * decay * along + decay**2 * size)
        output = None
        if id(after) in self._inputs:
            x = self._inputs[id(after)].to(before.dtype)
            output = _relative(x @ (after - before).T, x @ before.T)
        turned = torch.cat(angles) if angles else None
        return Update(
            step=self._step,
            name=self._names[id(after)],
            length=math.sqrt(changed),
            without_decay=math.sqrt(undecayed),
            angle=None if turned is None else turned.square().mean().sqrt().item(),
            largest_angle=None if turned is None else turned.max().item(),
            norm=math.sqrt(size),
            output_change=output,
        )


def angle_between_rows(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Angles (radians, float64) between the rows of two matrices; 0 for rows that are 0 on either side."""
    return _angles(*row_sums(before, after))


def row_sums(before: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """‖Δ‖², ⟨w, Δ⟩ and ‖w‖² of each row w of a matrix (of each element of a vector) and its change Δ, float64.

    Products are in single precision where the weights are: the difference of two near numbers is exact in it.
    """
    wide = torch.promote_types(before.dtype, torch.float32)
    w = before.to(wide)
    change = after.to(wide) - w
    w, change = (one.flatten(0, -2) if one.dim() >= 2 else one.view(-1, 1) for one in (w, change))
    norms = (torch.linalg.vector_norm(one, dim=-1).double().square() for one in (change, w))
    return next(norms), (w * change).sum(-1).double(), next(norms)


def _angles(changed: torch.Tensor, along: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """atan2(‖w‖ ‖w′‖ sin, ‖w‖ ‖w′‖ cos) of w and w′ = w + Δ: an arc cosine loses what is below 3e-4 in float32."""
    sine = (changed * size - along.square()).clamp_min(0).sqrt()
    zero = (size == 0) | (changed + 2 * along + size <= 0)
    return torch.where(zero, 0.0, torch.atan2(sine, size + along))


def _relative(change: torch.Tensor, of: torch.Tensor) -> float:
    """‖Δy‖ / ‖y‖ over rows that are not 0."""
    rows, base = change.double().flatten(0, -2), of.double().flatten(0, -2)
    kept = base.norm(dim=-1) > 0
    below = base[kept].norm().item()
    return rows[kept].norm().item() / below if below > 0 else math.nan


def _decoupled(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    return type(optimizer).__name__ in ("AdamW", "LionA", "Lion") or bool(group.get("decoupled_weight_decay"))


def _bias_corrected(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> float:
    return float(group["betas"][0]) if type(optimizer).__name__ in ("Adam", "AdamW", "NAdam") else 0.0


def _equilibrium(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> float | None:
    lr, decay = float(group["lr"]), group.get("weight_decay", 0.0)
    match type(optimizer).__name__:
        case "AdamW":
            return adamw_angle(lr, decay, float(group["betas"][0]))
        case "LionA":
            beta = group["beta"]
            return lion_angle(lr, decay, beta**2 if group["nesterov"] else beta, beta)
        case "LionAR" if group["rotational"]:
            return adamw_angle(float(group["peak_lr"]), decay, group["beta"])
        case "SGD":
            return sgdm_angle(lr, decay, group["momentum"])
    return None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value
