"""The local training loop: AdamW over packed batches, the same for every strategy.

A step's gradient is that of the mean negative log-likelihood over all targets of its records, however they are
packed into passes. Everything that happens follows from the arguments: the same call gives the same bits.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from allmend.data.chat import Encoded
from allmend.data.packing import pack
from allmend.errors import UserError
from allmend.learn.objective import log_likelihood
from allmend.models.adapters import Trainable
from allmend.models.tensors import Tensors
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
        loss: mean negative log-likelihood per target (nats), before the step.
        learning_rate: used by the step.
        gradient_norm: before clipping.
        tokens: that went through the model.
        targets: tokens under the loss.
    """

    number: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    targets: int


@dataclass(frozen=True)
class Outcome:
    """Parameters, optimiser state and the steps of one call of `train`."""

    tensors: Tensors
    optimizer: Tensors
    steps: tuple[Step, ...]


def steps_per_round(records: int, settings: Train) -> int:
    """Optimiser steps that a client with so many records takes in a round; at least 1."""
    if settings.local_steps is not None:
        return settings.local_steps
    return max(1, math.ceil((settings.local_epochs or 1.0) * math.ceil(records / settings.batch_size)))


def learning_rate(step: int, total: int, settings: Train) -> float:
    """The learning rate of step `step` (from 0) of `total`: linear warmup, then cosine to 0 or constant."""
    if step < settings.warmup_steps:
        return settings.learning_rate * ((step + 1) / settings.warmup_steps)
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def batches(records: int, batch_size: int, *, seed: int, first: int) -> Iterator[list[int]]:
    """Batches of record indices from the `first` on (from 0), without end: each epoch is a fresh permutation.

    An epoch's last batch is smaller when `batch_size` does not divide the number of records.
    """
    per_epoch = math.ceil(records / batch_size)
    epoch, at = divmod(first, per_epoch)
    while True:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(records, generator=generator).tolist()
        for start in range(at * batch_size, records, batch_size):
            yield order[start : start + batch_size]
        epoch, at = epoch + 1, 0


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
        seed: of data order and dropout.
        optimizer: AdamW's state from an earlier call; fresh when None.
        on_step: told after every step.

    Raises:
        DivergedError: loss or gradient norm became NaN or infinite.
        UserError: no record has a token to learn from.
    """
    # a batch of nothing but records without targets would be a step without a loss
    records = [record for record in records if (record.target & (record.position > 0)).any()]
    if not records:
        raise UserError("no record has a token to learn from", hint="Look at data.max_tokens and the response fields.")
    parameters = trainable.parameters()
    device = next(iter(parameters.values())).device
    adam = torch.optim.AdamW(
        list(parameters.values()),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        foreach=_foreach(device),
    )
    if optimizer:
        _restore(adam, parameters, optimizer)
    done: list[Step] = []
    stream = batches(len(records), settings.batch_size, seed=seed, first=first_step)
    trainable.model.train()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for index in range(steps):
                number = first_step + index
                torch.manual_seed((seed * 1_000_003 + number) % 2**63)  # dropout; the caller's generator is given back
                rate = learning_rate(schedule_step + index, total_steps, settings)
                batch = [records[index] for index in next(stream)]
                done.append(_step(trainable, adam, batch, settings, rate, number, device))
                on_step(done[-1])
    finally:
        trainable.model.eval()
    state = trainable.state()
    if not all(tensor.isfinite().all() for tensor in state.values()):  # the last step's loss came before its update
        raise DivergedError(f"parameters are no longer finite after step {first_step + steps}", hint=_DIVERGED)
    return Outcome(state, _snapshot(adam, parameters), tuple(done))


def _step(
    trainable: Trainable,
    adam: torch.optim.AdamW,
    batch: Sequence[Encoded],
    settings: Train,
    rate: float,
    number: int,
    device: torch.device,
) -> Step:
    rows = pack(batch, settings.tokens_per_pass)
    targets = sum(row.targets.numel() for row in rows)
    loss = 0.0
    for row in rows:
        part = -log_likelihood(trainable.model, row.to(device)).sum() / targets
        part.backward()  # type: ignore[no-untyped-call]
        loss += part.item()
    parameters = list(trainable.parameters().values())
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm, foreach=_foreach(device)).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        adam.zero_grad(set_to_none=True)
        raise DivergedError(
            f"training diverged at step {number + 1}: loss {loss:.4g}, gradient norm {norm:.4g}, "
            f"learning rate {rate:.3g}",
            hint=_DIVERGED,
        )
    for group in adam.param_groups:
        group["lr"] = rate
    adam.step()
    adam.zero_grad(set_to_none=True)
    return Step(number + 1, loss, rate, norm, sum(row.tokens for row in rows), targets)


def _foreach(device: torch.device) -> bool | None:
    """One kernel for many tensors, where the device has such kernels."""
    return None if device.type == "mps" else True


def _snapshot(adam: torch.optim.AdamW, parameters: dict[str, torch.nn.Parameter]) -> Tensors:
    return {
        f"{slot}/{name}": value.detach().to("cpu", copy=True)
        for name, parameter in parameters.items()
        for slot, value in adam.state[parameter].items()
    }


def _restore(adam: torch.optim.AdamW, parameters: dict[str, torch.nn.Parameter], saved: Tensors) -> None:
    for key, value in saved.items():
        slot, _, name = key.partition("/")
        parameter = parameters[name]
        device = "cpu" if slot == "step" else parameter.device
        adam.state[parameter][slot] = value.to(device, copy=True)
