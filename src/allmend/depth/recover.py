"""Recovery: a little training of the layers that run side by side, and as much for the model that they come from.

Training on any text lowers the loss on text of its kind, also of a model that lost nothing. So what a folded layer wins
back is told against a control: the sequential model with the same adapters on the same layers, the same windows in the
same order, the same steps. The control is let go of afterwards; what the folded layers learnt is merged into them.

Source: Calvo González et al., "Leveraging the True Depth of LLMs" (arXiv 2502.02790), where paired layers are
fine-tuned; low-rank adapters and the control are ours.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from allmend.data.packing import Row
from allmend.data.windows import Windows
from allmend.depth.architectures import Architecture, architecture_of, layers_of
from allmend.depth.correction import check_fits, measured, row_of
from allmend.depth.measure import Measured, added, perplexity
from allmend.depth.plan import Plan
from allmend.errors import UserError
from allmend.learn.loop import DivergedError, Step
from allmend.learn.objective import log_likelihood, logits_at_sources
from allmend.learn.optimizer import Descent
from allmend.learn.schedule import batches
from allmend.models.adapters import Trainable, add_lora, remove_lora
from allmend.models.tensors import is_finite
from allmend.recipe import Train
from allmend.results import Estimate, Table

Loss = Literal["causal", "kl"]
"""What is learnt: the text, or what the sequential model makes of the text (KL divergence from it)."""

Model = Literal["sequential", "paired"]

Objective = Callable[[nn.Module, Row], torch.Tensor]
"""Sum over a row's targets (nats)."""


@dataclass(frozen=True)
class Training:
    """How folded layers, and the control, are trained.

    Attributes:
        steps: of AdamW, gradients scaled down to a norm of 1.
        batch_size: windows of a step.
        loss: what is learnt.
        rank, alpha: of the low-rank adapters on every projection of a layer.
        learning_rate: at the first step; it falls linearly, and would be 0 at the step after the last.
        seed: of the adapters' start and the order of the windows.
    """

    steps: int
    batch_size: int = 1
    loss: Loss = "causal"
    rank: int = 16
    alpha: float = 32.0
    learning_rate: float = 5e-4
    seed: int = 0


class Trained(Table):
    """Perplexity of a model on the report's windows, before and after its training; intervals are over windows."""

    before: Estimate
    after: Estimate


class Recovery(Table):
    """What training won back, and what it did for a model that had lost nothing.

    Attributes:
        loss, steps, rank, learning_rate, seed: as in `Training`.
        tokens: that went through each model, counted as often as they did.
        paired: the model with folded layers.
        control: the sequential model with as much training. With `kl` it is its own teacher, and stays as it is.
        gap_before: mean loss of the paired model minus the sequential one's (nats per token); n counts windows.
        gap_after: the same of the two after training.
        closed: share of the gap that is gone, 1 − after / before; None where there was none.
        notes: what to know about the figures.
    """

    loss: Loss
    steps: int
    tokens: int
    rank: int
    learning_rate: float
    seed: int
    paired: Trained
    control: Trained
    gap_before: Estimate
    gap_after: Estimate
    closed: float | None
    notes: tuple[str, ...] = ()


def recover(
    paired: Any,
    model: Any,
    plan: Plan,
    windows: Windows,
    *,
    report: Windows,
    training: Training,
    on_step: Callable[[Model, Step], None] = lambda model, step: None,
) -> Recovery:
    """Train the folded layers of a paired model and merge what they learn; train the original as much, as a control.

    The two are trained one after the other, and `model` has all its weights as they were afterwards, to the bit: what
    both share is frozen. Everything follows from the arguments.

    Args:
        paired: from `apply_plan`, in evaluation mode; its folded layers change.
        model: what it was made from, in evaluation mode.
        plan: that was applied.
        windows: text to learn from, which neither search nor report used.
        report: text to measure on.
        training: how.
        on_step: told after every step which model took it: first the sequential one (not with `kl`), then the paired.

    Raises:
        UserError: no layers of the plan are folded; the text to learn from is the report's; a number of `training` is
            out of range or does not fit the layers; training diverged. `paired` is as it was then, too.
    """
    check_fits(paired, model, plan)
    _check(training, windows, report)
    architecture = architecture_of(layers_of(model)[0])
    original = _projections(architecture, [layer for group in plan.together for layer in group])
    folded = _projections(architecture, [place for place, group in enumerate(plan.groups) if len(group) > 1])
    rows = [row_of(window) for window in windows.ids]
    alone = Plan(tuple((layer,) for layer in range(sum(plan.widths))))
    sequential, lossy = measured(model, alone, report), measured(paired, plan, report)
    control = sequential
    objective = text_loss if training.loss == "causal" else divergence_from(model)
    if training.loss == "causal":
        with _adapter(model, original, training) as trainable:
            _train(trainable, rows, training, objective, lambda step: on_step("sequential", step))
            control = measured(trainable.model, alone, report)
    with _adapter(paired, folded, training) as trainable:
        tokens = _train(trainable, rows, training, objective, lambda step: on_step("paired", step))
        merging: Any = trainable.model
        merging.merge_adapter()
    return _recovery(training, tokens, (lossy, measured(paired, plan, report)), (sequential, control))


def _check(training: Training, windows: Windows, report: Windows) -> None:
    if windows.digest == report.digest:
        raise UserError(
            f"the text to report on is that of the recovery ({windows.source})",
            where=report.source,
            hint="Name another one: what was learnt by heart is not won back.",
        )
    for name in ("steps", "batch_size", "rank", "alpha", "learning_rate"):
        if not (value := getattr(training, name)) > 0:
            raise UserError(f"{name} of the recovery is {value} and must be above 0")


def _projections(architecture: Architecture, layers: Sequence[int]) -> list[str]:
    """Names in the model of all matrices of some layers."""
    branches = (architecture.attention, architecture.perceptron)
    names = [name for branch in branches for name in (*(one for one, _ in branch.inputs), branch.output)]
    return [f"model.layers.{layer}.{name}" for layer in layers for name in names]


@contextlib.contextmanager
def _adapter(model: Any, names: Sequence[str], training: Training) -> Iterator[Trainable]:
    """A model with fresh adapters on the matrices of these names; afterwards they are gone, and nothing is frozen."""
    learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trainable = add_lora(model, rank=training.rank, alpha=training.alpha, targets=names, seed=training.seed)
    try:
        yield trainable
    finally:
        remove_lora(trainable)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learns[name])


def text_loss(model: nn.Module, row: Row) -> torch.Tensor:
    """−Σ log p(target) of a row (nats)."""
    return -log_likelihood(model, row).sum()


def divergence_from(teacher: Any) -> Objective:
    """Σ KL(teacher ‖ model) over the targets of a row (nats)."""

    def divergence(model: nn.Module, row: Row) -> torch.Tensor:
        with torch.no_grad():
            expected = logits_at_sources(teacher, row).log_softmax(-1)
        found = logits_at_sources(model, row).log_softmax(-1)
        return nn.functional.kl_div(found, expected, reduction="sum", log_target=True)

    return divergence


def _train(
    trainable: Trainable,
    rows: Sequence[Row],
    training: Training,
    objective: Objective,
    on_step: Callable[[Step], None],
) -> int:
    """Train adapters in place, with a learning rate that falls linearly; gives the tokens that went through."""
    settings = Train(learning_rate=training.learning_rate)
    parameters = trainable.parameters()
    device = next(iter(parameters.values())).device
    descent = Descent(trainable.model, parameters, settings)
    stream = batches(len(rows), training.batch_size, seed=training.seed, first=0)
    guessing = math.log(trainable.model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    start, tokens = math.inf, 0
    for number in range(training.steps):
        rate = training.learning_rate * (1 - number / training.steps)
        batch = [rows[place] for place in next(stream)]
        targets = sum(row.targets.numel() for row in batch)
        loss = 0.0
        for row in batch:
            part = objective(trainable.model, row.to(device)) / targets
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
            del part  # its graph would stay through the next row's pass
        norm = descent.clip(settings.clip_norm)
        start = min(start, loss)
        # a loss that rose by more than a model that knows nothing has does not come back in a few steps
        if not (math.isfinite(norm) and loss <= start + guessing):
            raise _diverged(number + 1, f"loss {loss:.4g} after {start:.4g}, gradient norm {norm:.4g}", rate)
        descent.step(rate)
        tokens += (seen := sum(row.tokens for row in batch))
        on_step(Step(number + 1, loss, rate, norm, seen, targets))
    if not all(map(is_finite, trainable.state().values())):  # the last step's loss came before its update
        raise _diverged(training.steps, "parameters are no longer finite", rate)
    return tokens


def _diverged(step: int, what: str, rate: float) -> DivergedError:
    return DivergedError(
        f"recovery diverged at step {step}: {what}, learning rate {rate:.3g}", hint="Choose a lower learning rate."
    )


def _recovery(
    training: Training,
    tokens: int,
    paired: tuple[Measured, Measured],
    control: tuple[Measured, Measured],
) -> Recovery:
    before, after = (added(one, other) for one, other in zip(paired, control, strict=True))
    notes = []
    if before.low is None:
        notes.append("one window to report on gives no interval")
    elif before.low <= 0:
        notes.append("the gap before training is within its own error: the share closed says little")
    if after.value > before.value:
        notes.append("training widened the gap")
    return Recovery(
        loss=training.loss,
        steps=training.steps,
        tokens=tokens,
        rank=training.rank,
        learning_rate=training.learning_rate,
        seed=training.seed,
        paired=Trained(before=perplexity(paired[0]), after=perplexity(paired[1])),
        control=Trained(before=perplexity(control[0]), after=perplexity(control[1])),
        gap_before=before,
        gap_after=after,
        closed=1 - after.value / before.value if before.value > 0 else None,
        notes=tuple(notes),
    )
