"""Optimisers side by side, each with and without warmup, on a small model from scratch: does a method need one?"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import mean
from typing import Any

import torch

from allmend.optim.build import build_optimizer
from allmend.optim.monitor import Report, UpdateMonitor
from allmend.optim.ramp import MomentumRamp
from allmend.optim.schedule import trapezoidal_schedule
from allmend.optim.small_model import Sequences, Shape, held_out_loss, loss_of, make_model

LOOK = 8
"""Steps between two looks at the size of updates."""

GAP = 0.03
"""Nats by which the loss without a warmup must lie above that with one before one speaks of a need."""


LEARNING_RATES = {
    "adamw": 4e-3,
    "radam": 4e-3,
    "sgd": 0.1,
    "lion": 4e-4,
    "liona": 4e-3,
    "lionar": 3.2e-2,
    "muon": 4e-3,
    "schedulefree": 4e-3,
}
"""Where one begins to look with the small model."""


@dataclass(frozen=True)
class Method:
    """An optimiser and its settings.

    Attributes:
        name: of `build_optimizer`.
        lr: at its peak.
        options: the optimiser's own.
        ramp: whether `MomentumRamp` shortens the first steps.
        label: in tables; the name when empty.
    """

    name: str
    lr: float
    options: dict[str, Any] = field(default_factory=dict)
    ramp: bool = False
    label: str = ""

    def __str__(self) -> str:
        return self.label or self.name


@dataclass(frozen=True)
class Training:
    """How all of them train.

    Attributes:
        steps: optimiser steps.
        cooldown: share of the steps over which the learning rate falls to 0.
        clip_norm: of gradients; infinite for none.
        weight_decay: of matrices.
        outputs: whether the change of layers' outputs is looked at, too.
    """

    steps: int = 300
    cooldown: float = 0.5
    clip_norm: float = 1.0
    weight_decay: float = 0.1
    outputs: bool = False


@dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        method, lr, warmup, seed: what was tried; `warmup` is a share of the steps.
        loss: on held-out sequences at the end (nats a token); infinite where training came to numbers that are none.
        curve: training loss of each step (nats a token).
        report: of the sizes of updates.
        attention: ‖Δ‖ over attention's query, key and value matrices, by step that was looked at.
    """

    method: str
    lr: float
    warmup: float
    seed: int
    loss: float
    curve: tuple[float, ...]
    report: Report
    attention: dict[int, float]


def train_once(
    data: Sequences,
    method: Method,
    *,
    warmup: float,
    seed: int,
    shape: Shape,
    training: Training,
    on_step: Callable[[int], None] = lambda step: None,
) -> Trial:
    """Train the small model once and measure it.

    Args:
        data: of `small_model.encode`.
        method: the optimiser.
        warmup: share of the steps over which the learning rate rises.
        seed: of weights and of the order of sequences.
        shape: of the model.
        training: how.
        on_step: told the number of each step, from 1.

    Raises:
        ValueError: the optimiser or an option is not there, or warmup and cooldown are longer than the whole.
    """
    model = make_model(shape, seed)
    optimizer = build_optimizer(
        method.name, model, lr=method.lr, weight_decay=training.weight_decay, **_defaults(method)
    )
    schedule = trapezoidal_schedule(
        optimizer,
        steps=training.steps,
        warmup=round(warmup * training.steps),
        cooldown=round(training.cooldown * training.steps),
    )
    curve = []
    order = _batches(len(data.train), shape.batch, training.steps, seed)
    with (
        UpdateMonitor(model, optimizer, every=LOOK, outputs=training.outputs) as monitor,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "LionAR begins at")  # with a warmup is one of the ways that are tried
        if method.ramp:
            MomentumRamp(optimizer)
        _mode(optimizer, "train")
        for batch in order:
            loss = loss_of(model, data.train[batch])
            curve.append(loss.item())
            if not math.isfinite(curve[-1]):
                break
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            on_step(len(curve))
        _mode(optimizer, "eval")
        last = held_out_loss(model, data.held_out, shape.batch)
        found = last if math.isfinite(last) and math.isfinite(curve[-1]) else math.inf
        return Trial(
            str(method), method.lr, warmup, seed, found, tuple(curve), monitor.report(), _of_attention(monitor)
        )


def compare(
    data: Sequences,
    methods: Sequence[Method],
    *,
    warmups: Sequence[float],
    seeds: Sequence[int],
    shape: Shape,
    training: Training,
    on_step: Callable[[Method, float, int, int], None] = lambda method, warmup, seed, step: None,
) -> Iterator[Trial]:
    """Every method with every warmup and seed, one after the other; the same weights and batches for one seed.

    Args:
        data: of `small_model.encode`.
        methods: the optimisers.
        warmups: shares of the steps.
        seeds: of weights and of the order of sequences.
        shape: of the model.
        training: how.
        on_step: told the method, the warmup, the seed and the step, from 1.

    Raises:
        ValueError: as `train_once`.
    """
    for seed in seeds:
        for method in methods:
            for warmup in warmups:
                yield train_once(
                    data,
                    method,
                    warmup=warmup,
                    seed=seed,
                    shape=shape,
                    training=training,
                    on_step=partial(on_step, method, warmup, seed),
                )


@dataclass(frozen=True)
class Row:
    """A method with one warmup, over seeds.

    Attributes:
        method, lr, warmup: what was tried.
        losses: held-out loss by seed.
        spike: length of the first update over that of later ones, mean over seeds.
    """

    method: str
    lr: float
    warmup: float
    losses: dict[int, float]
    spike: float

    @property
    def loss(self) -> float:
        """Mean over seeds."""
        return mean(self.losses.values())


def rows(trials: Iterable[Trial]) -> list[Row]:
    """The trials by method, learning rate and warmup."""
    cells: dict[tuple[str, float, float], list[Trial]] = {}
    for trial in trials:
        cells.setdefault((trial.method, trial.lr, trial.warmup), []).append(trial)
    return [
        Row(*key, {trial.seed: trial.loss for trial in some}, mean(trial.report.spike for trial in some))
        for key, some in cells.items()
    ]


@dataclass(frozen=True)
class Gap:
    """What a method loses without a warmup.

    Attributes:
        method, lr: of which.
        warmup: the best that was tried.
        by_seed: loss without a warmup minus loss with the best one (nats).
    """

    method: str
    lr: float
    warmup: float
    by_seed: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """In a sentence; seeds that disagree leave it open."""
        low, high = min(self.by_seed), max(self.by_seed)
        span = f"{mean(self.by_seed):+.3f} nats ({low:+.3f} to {high:+.3f} over {len(self.by_seed)} seeds)"
        if low > GAP:
            return f"{self.method} needs a warmup: without one {span} against {self.warmup:.0%}"
        if high <= GAP:
            return f"{self.method} needs no warmup: without one {span} against {self.warmup:.0%}"
        return f"{self.method}: not decided, without a warmup {span} against {self.warmup:.0%}"


def gaps(found: Sequence[Row]) -> list[Gap]:
    """For each method that was tried without a warmup and with some: against the best of these."""
    made = []
    for key in dict.fromkeys((row.method, row.lr) for row in found):
        some = {row.warmup: row for row in found if (row.method, row.lr) == key}
        without = some.pop(0.0, None)
        if without is None or not some:
            continue
        best = min(some.values(), key=lambda row: row.loss)
        made.append(Gap(*key, best.warmup, tuple(without.losses[seed] - best.losses[seed] for seed in without.losses)))
    return made


def _defaults(method: Method) -> dict[str, Any]:
    """What language models are trained with, where the method does not say otherwise."""
    betas = {"betas": (0.9, 0.95)} if method.name in ("adamw", "radam") else {}
    return betas | method.options


def _batches(sequences: int, size: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    order = torch.randperm(sequences, generator=generator)
    while len(order) < steps * size:
        order = torch.cat([order, torch.randperm(sequences, generator=generator)])
    return iter(torch.split(order[: steps * size], size))


def _of_attention(monitor: UpdateMonitor) -> dict[int, float]:
    found: dict[int, float] = {}
    for one in monitor.updates:
        if any(part in one.name for part in ("q_proj", "k_proj", "v_proj")):
            found[one.step] = math.hypot(found.get(one.step, 0.0), one.length)
    return found


def _mode(optimizer: Any, name: str) -> None:
    """Schedule-free optimisers hold other weights in training than they are measured by."""
    if callable(change := getattr(optimizer, name, None)):
        change()
