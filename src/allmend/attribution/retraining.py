"""Retraining, the judge of influence: the same adapter again on random halves of the records, and the target's losses.

Every training begins at the same fresh parameters and takes the same settings; half and order of the records have a
seed of their own each. So that losses differ by what was in the half, and by the order.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from allmend.data.chat import Encoded
from allmend.data.packing import pack
from allmend.errors import UserError
from allmend.learn.loop import DivergedError, Step, train
from allmend.learn.objective import log_likelihood
from allmend.learn.schedule import learning_rate
from allmend.models.adapters import Trainable
from allmend.models.tensors import Tensors
from allmend.recipe import Train


@dataclass(frozen=True, kw_only=True)
class Retraining:
    """How an adapter is trained: AdamW with a cosine schedule.

    Attributes:
        learning_rate: when it is highest.
        epochs: passes over the records.
        batch_size: records per optimiser step.
        tokens_per_pass: that go through the model at once.
        seed: of the first parameters, of halves and of orders.

    Raises:
        UserError: a number is out of its range.
    """

    learning_rate: float = 1e-3
    epochs: int = 3
    batch_size: int = 8
    tokens_per_pass: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UserError(f"must be a number above 0, got {self.learning_rate}", where="--learning-rate")
        for name, value in (("--epochs", self.epochs), ("--batch-size", self.batch_size)):
            if value < 1:
                raise UserError(f"must be 1 or more, got {value}", where=name)

    @property
    def settings(self) -> Train:
        """For the training loop."""
        return Train(learning_rate=self.learning_rate, batch_size=self.batch_size, tokens_per_pass=self.tokens_per_pass)

    def steps(self, records: int) -> int:
        """Optimiser steps over so many records."""
        return self.epochs * math.ceil(records / self.batch_size)


def fresh(trainable: Trainable, *, seed: int) -> Tensors:
    """The parameters with which a LoRA of this shape begins: A Kaiming-uniform with a = √5, B zero (see `add_lora`)."""
    generator = torch.Generator().manual_seed(seed)
    found: Tensors = {}
    for name, parameter in trainable.parameters().items():
        found[name] = torch.zeros(parameter.shape)
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(found[name], a=math.sqrt(5), generator=generator)
    return found


def retrain(
    trainable: Trainable,
    records: Sequence[Encoded],
    retraining: Retraining,
    *,
    seed: int,
    steps: int | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Tensors:
    """Train from fresh parameters, in place; gives the parameters at the end.

    Args:
        trainable: model and adapter.
        records: to train on.
        retraining: how.
        seed: of the records' order and of dropout.
        steps: of the optimiser, where they are not to follow from the number of records.
        on_step: told after every step.

    Raises:
        UserError: training diverged, or no record has a token to learn from.
    """
    *_, last = checkpoints(trainable, records, retraining, seed=seed, shares=(1.0,), steps=steps, on_step=on_step)
    return last


def checkpoints(
    trainable: Trainable,
    records: Sequence[Encoded],
    retraining: Retraining,
    *,
    seed: int,
    shares: Sequence[float],
    steps: int | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> list[Tensors]:
    """As `retrain`; gives the parameters when these shares of all steps are done, which is no other training.

    Args:
        trainable, records, retraining, seed, steps, on_step: as of `retrain`.
        shares: of the steps, increasing, up to 1.

    Raises:
        UserError: as of `retrain`.
    """
    trainable.load(fresh(trainable, seed=retraining.seed))
    found: list[Tensors] = []
    optimizer: Tensors | None = None
    total = steps or retraining.steps(len(records))
    for first, last in _stretches(total, shares):
        try:
            outcome = train(
                trainable,
                records,
                retraining.settings,
                steps=last - first,
                first_step=first,
                schedule_step=first,
                total_steps=total,
                seed=seed,
                optimizer=optimizer,
                on_step=on_step,
            )
        except DivergedError as error:
            raise UserError(error.what, hint="Lower --learning-rate.") from None
        optimizer = outcome.optimizer
        found.append(outcome.tensors)
    return found


def checkpoint_rates(records: int, retraining: Retraining, shares: Sequence[float]) -> list[float]:
    """Sum of the learning rates of the steps between each checkpoint and the one before: the η of TracIn."""
    total = retraining.steps(records)
    return [
        math.fsum(learning_rate(step, total, retraining.settings) for step in range(first, last))
        for first, last in _stretches(total, shares)
    ]


def _stretches(total: int, shares: Sequence[float]) -> list[tuple[int, int]]:
    """First and last step (exclusive) up to each share; none is without a step while there are enough."""
    ends = [max(1, round(share * total)) for share in shares]
    return list(zip([0, *ends], ends, strict=False))


@torch.inference_mode()
def target_losses(
    trainable: Trainable,
    records: Sequence[Encoded],
    tokens_per_pass: int,
    *,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> list[float]:
    """Losses of records, summed over their targets (nats).

    Raises:
        UserError: one is not finite.
    """
    trainable.model.eval()
    device = next(iter(trainable.parameters().values())).device
    found = torch.zeros(len(records), dtype=torch.float64)
    for row in pack(records, tokens_per_pass):
        found.index_add_(0, row.owner, -log_likelihood(trainable.model, row.to(device)).double().cpu())
        on_tokens(row.tokens)
    if not bool(found.isfinite().all()):
        strange = records[int(found.isfinite().logical_not().nonzero()[0])]
        raise UserError(f"the loss of target record {strange.id!r} is not finite", hint="Lower --learning-rate.")
    return [float(one) for one in found]
