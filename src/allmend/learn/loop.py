"""The local training loop: an optimiser over packed batches, the same for every strategy.

A step's gradient is that of the mean negative log-likelihood over all targets of its records, or over the records of
each one's mean, however they are packed into passes; or a private estimate of the latter. Everything that happens
follows from the arguments, unless noise is from the cryptographic generator: the same call gives the same bits.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from allmend.data.chat import Encoded
from allmend.data.packing import Row, pack
from allmend.errors import UserError
from allmend.learn.objective import log_likelihood
from allmend.learn.optimizer import Descent
from allmend.learn.per_example import record_loss, separable_rows
from allmend.learn.private import RecordNoise, poisson_batches, private_gradient
from allmend.learn.schedule import batches, learning_rate
from allmend.learn.updates import UpdateSize
from allmend.models.adapters import Trainable
from allmend.models.tensors import Tensors, is_finite
from allmend.recipe import Train

_DIVERGED = (
    "Lower train.learning_rate or set train.clip_norm, then start a new run; "
    "the checkpoint of the last whole round is kept."
)


class DivergedError(UserError):
    """Training met a loss or gradient that is not finite."""


@dataclass(frozen=True)
class Step:
    """What one optimiser step was like.

    Attributes:
        number: counts from 1 over all rounds of a client.
        loss: mean negative log-likelihood per target (nats), before the step and without noise, whatever the gradient
            has; None where a Poisson sample is empty.
        learning_rate: used by the step.
        gradient_norm: with noise, before the gradient is scaled down to `clip_norm`.
        tokens: that went through the model.
        targets: tokens under the loss.
        update: how large the step was, where that is logged and this one was looked at.
    """

    number: int
    loss: float | None
    learning_rate: float
    gradient_norm: float
    tokens: int
    targets: int
    update: UpdateSize | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of one call of `train`.

    Attributes:
        tensors: the parameters.
        optimizer: the optimiser's state.
        steps: in order.
        learnt: for each of the N records given, the steps that saw it, and its targets under the loss, summed over
            these steps; int64 [N, 2].
    """

    tensors: Tensors
    optimizer: Tensors
    steps: tuple[Step, ...]
    learnt: torch.Tensor


def mean_loss(steps: Sequence[Step]) -> float | None:
    """Mean negative log-likelihood per target over some steps (nats); None if they had none."""
    losses = [(step.loss, step.targets) for step in steps if step.loss is not None]
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses) if losses else None


def train(
    trainable: Trainable,
    records: Sequence[Encoded],
    settings: Train,
    *,
    steps: int,
    first_step: int,
    schedule_step: int,
    total_steps: int,
    seed: int,
    optimizer: Tensors | None = None,
    proximal: float = 0.0,
    anchor: Tensors | None = None,
    noise: RecordNoise | None = None,
    penalty: Callable[[Sequence[Row]], None] = lambda rows: None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Outcome:
    """Train what learns in `trainable`, in place, for some steps of a client's schedule.

    Args:
        trainable: model and parameters; left with the trained parameters.
        records: the client's encoded training records; those without a target are passed over.
        settings: learning rate, batch size and the like.
        steps: optimiser steps to take.
        first_step: steps this client has taken before; places it in the order of its data.
        schedule_step: the step (from 0) of the learning rate's schedule to start at.
        total_steps: steps of the whole schedule.
        seed: of data order, dropout and seeded noise.
        optimizer: the optimiser's state from an earlier call; fresh when None.
        proximal: μ of a term (μ / 2) ‖w − w₀‖² beside the loss. The losses that are told are without it, the gradient
            norms with it.
        anchor: w₀; the parameters at the start when None.
        noise: makes every step private for each record; the loss is the mean over records then, and nothing is
            dropped out, neither in the adapter nor in the model.
        penalty: given a batch's rows (on the CPU), adds the gradient of a further term to what lies in the parameters'
            `grad`. The losses that are told are without it, and noise does not cover it.
        on_step: told after every step.

    Raises:
        DivergedError: loss or gradient norm became NaN or infinite.
        UserError: no record has a token to learn from.
    """
    # a batch of nothing but records without targets would be a step without a loss
    usable = [index for index, record in enumerate(records) if record.learns]
    if not usable:
        raise UserError("no record has a token to learn from", hint="Look at data.max_tokens and the response fields.")
    parameters = trainable.parameters()
    device = next(iter(parameters.values())).device
    descent = Descent(trainable.model, parameters, settings, optimizer)
    if anchor is None:
        anchor = {name: parameter.detach().clone() for name, parameter in parameters.items()} if proximal else {}
    pulling = {name: anchor[name].to(parameters[name]) for name in parameters} if proximal else {}
    size: int | None = None
    if noise is not None and noise.sampling == "poisson":
        stream = poisson_batches(len(usable), settings.batch_size, noise, seed=seed, first=first_step)
        size = min(settings.batch_size, len(usable))  # expected: how many are drawn must not show
    else:
        stream = batches(len(usable), settings.batch_size, seed=seed, first=first_step)
    done: list[Step] = []
    learnt = torch.zeros(len(records), 2, dtype=torch.int64)
    # a mask of dropout over a packed row changes with every record in it, and no clip would bound what one record does
    trainable.model.train(noise is None)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for index in range(steps):
                number = first_step + index
                torch.manual_seed((seed * 1_000_003 + number) % 2**63)  # dropout; the caller's generator is given back
                rate = learning_rate(schedule_step + index, total_steps, settings)
                batch = [usable[place] for place in next(stream)]
                chosen = [records[place] for place in batch]
                rows, loss = _gradient(
                    trainable, chosen, settings, noise, size=size or len(batch), seed=seed, step=number
                )
                for name, before in pulling.items():  # what it adds depends on nothing but what noise has passed
                    parameter = parameters[name]
                    assert parameter.grad is not None
                    parameter.grad.add_(parameter.detach() - before, alpha=proximal)
                penalty(rows)
                norm = descent.clip(settings.clip_norm)
                # what a step tells is noisy then, and so must be what an error tells
                _check_finite(number, loss if noise is None else None, norm, rate)
                update = descent.step(rate)
                owners = torch.cat([torch.zeros(0, dtype=torch.int64), *(row.owner for row in rows)])
                targets = owners.bincount(minlength=len(batch))
                learnt[batch] += torch.stack([targets > 0, targets], dim=1)
                tokens = sum(row.tokens for row in rows)
                done.append(Step(number + 1, loss, rate, norm, tokens, int(targets.sum()), update))
                on_step(done[-1])
    finally:
        descent.forget()
        trainable.model.eval()
    state = trainable.state()
    if not all(map(is_finite, state.values())):  # the last step's loss came before its update
        raise DivergedError(f"parameters are no longer finite after step {first_step + steps}", hint=_DIVERGED)
    return Outcome(state, descent.state(), tuple(done), learnt)


def gradient(trainable: Trainable, records: Sequence[Encoded], *, tokens_per_pass: int) -> Tensors:
    """The gradient of the mean negative log-likelihood per target of some records, by name, on the CPU.

    Args:
        trainable: model and parameters, which stay as they are; nothing is dropped out.
        records: those without a target are passed over.
        tokens_per_pass: that go through the model at once.

    Raises:
        UserError: no record has a token to learn from.
    """
    rows = _rows(records, tokens_per_pass)
    parameters = trainable.parameters()
    trainable.model.eval()
    try:
        _token_mean(trainable, rows)
        return {
            name: torch.zeros_like(one, device="cpu") if one.grad is None else one.grad.detach().to("cpu", copy=True)
            for name, one in parameters.items()
        }
    finally:
        for one in parameters.values():
            one.grad = None


@torch.inference_mode()
def loss(trainable: Trainable, records: Sequence[Encoded], *, tokens_per_pass: int) -> float:
    """The mean negative log-likelihood per target of some records (nats); arguments as of `gradient`.

    Raises:
        UserError: no record has a token to learn from.
    """
    rows = _rows(records, tokens_per_pass)
    device = next(iter(trainable.parameters().values())).device
    trainable.model.eval()
    total = math.fsum(-float(log_likelihood(trainable.model, row.to(device)).sum()) for row in rows)
    return total / sum(row.targets.numel() for row in rows)


def _rows(records: Sequence[Encoded], tokens_per_pass: int) -> list[Row]:
    rows = pack([record for record in records if record.learns], tokens_per_pass)
    if not rows:
        raise UserError("no record has a token to learn from", hint="Look at data.max_tokens and the response fields.")
    return rows


def _check_finite(number: int, loss: float | None, norm: float, rate: float) -> None:
    if not (math.isfinite(loss or 0.0) and math.isfinite(norm)):
        raise DivergedError(
            f"training diverged at step {number + 1}: {'' if loss is None else f'loss {loss:.4g}, '}gradient norm "
            f"{norm:.4g}, learning rate {rate:.3g}",
            hint=_DIVERGED,
        )


def _gradient(
    trainable: Trainable,
    batch: Sequence[Encoded],
    settings: Train,
    noise: RecordNoise | None,
    *,
    size: int,
    seed: int,
    step: int,
) -> tuple[list[Row], float | None]:
    """Leave the batch's gradient in the parameters' `grad`; gives its rows and their loss per target (nats).

    `size` is what sums over records are divided by.
    """
    if noise is None and settings.loss_mean == "token":
        rows = pack(batch, settings.tokens_per_pass)
        return rows, _token_mean(trainable, rows)
    rows = separable_rows(trainable, batch, settings.tokens_per_pass)
    if noise is None:
        losses = _record_mean(trainable, rows, size)
    else:
        losses = private_gradient(trainable, rows, noise, size=size, seed=seed, step=step)
    targets = sum(row.targets.numel() for row in rows)
    return rows, losses / targets if targets else None


def _token_mean(trainable: Trainable, rows: Sequence[Row]) -> float:
    device = next(iter(trainable.parameters().values())).device
    targets = sum(row.targets.numel() for row in rows)
    loss = 0.0
    for row in rows:
        part = -log_likelihood(trainable.model, row.to(device)).sum() / targets
        part.backward()  # type: ignore[no-untyped-call]
        loss += part.item()
        del part  # its graph would stay through the next row's pass
    return loss


def _record_mean(trainable: Trainable, rows: Sequence[Row], size: int) -> float:
    """Also gives the sum of the losses of all targets."""
    parameters = trainable.parameters().values()
    device = next(iter(parameters)).device
    losses = 0.0
    for row in rows:
        part, of_targets = record_loss(trainable.model, row.to(device))
        part.backward()  # type: ignore[no-untyped-call]
        losses += of_targets
        del part  # its graph would stay through the next row's pass
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.div_(size)
    return losses
