"""An arm of a run: one strategy with its adapter and settings, trained from its newest checkpoint and saved."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from allmend.events import ArmStarted, Event, StepDone
from allmend.federation.checkpoint import Checkpoint, Checkpoints
from allmend.federation.engines import Engine
from allmend.federation.engines.in_process import InProcessEngine
from allmend.federation.engines.workers import WorkerEngine
from allmend.federation.member import Member
from allmend.federation.rounds import run_rounds
from allmend.federation.strategies import build_strategy
from allmend.learn.loop import Step, steps_per_round
from allmend.meter import Meter
from allmend.models.adapters import Trainable, add_lora, full, remove_lora
from allmend.models.load import LoadedModel
from allmend.models.tensors import Tensors
from allmend.recipe import Adapter, Arm
from allmend.recipe import Engine as EngineSettings
from allmend.strategy import Strategy, Turn

Outcomes: TypeAlias = dict[str | None, Tensors | None]
"""What an arm comes to: the model that all share under None, or each member's own under its name."""


@contextlib.contextmanager
def trainable_of(model: LoadedModel, adapter: Adapter, *, seed: int) -> Iterator[Trainable]:
    """What learns in an arm; afterwards the base model in memory is as it was."""
    if adapter.kind == "full":
        trainable = full(model.model)
        base = trainable.state()
        try:
            yield trainable
        finally:
            trainable.load(base)
            model.model.requires_grad_(False)
        return
    trainable = add_lora(
        model.model,
        rank=adapter.rank,
        alpha=adapter.alpha,
        targets=adapter.targets,
        dropout=adapter.dropout,
        seed=seed,
    )
    try:
        yield trainable
    finally:
        remove_lora(trainable)


def strategy_of(arm: Arm, *, seed: int) -> Strategy:
    """The arm's strategy.

    Raises:
        ValueError: there is no such strategy or option.
    """
    return build_strategy(arm.strategy.name, arm.strategy.options, seed=seed)


def tokens_per_round(arm: Arm, members: Sequence[Member]) -> float:
    """Tokens that members train on in a round if all take part, about."""
    total = 0.0
    for member in members:
        records = len(member.records)
        mean = sum(len(record) for record in member.records) / records
        total += steps_per_round(records, arm.train) * min(arm.train.batch_size, records) * mean
    return total


def train_arm(
    arm: Arm,
    trainable: Trainable,
    members: Sequence[Member],
    *,
    seed: int,
    engine: EngineSettings,
    checkpoints: Checkpoints,
    emit: Callable[[Event], None],
) -> Outcomes:
    """Run an arm's rounds from its newest checkpoint on.

    Args:
        arm: strategy and settings.
        trainable: what learns, at its initial parameters.
        members: training records; one party with all of them where the strategy pools.
        seed: of the strategy's sampling.
        engine: worker processes and threads.
        checkpoints: of this arm.
        emit: writes events.

    Raises:
        UserError: a member's training diverged or a checkpoint cannot be read or written; the last one is whole.
    """
    strategy = strategy_of(arm, seed=seed)
    rounds = arm.strategy.rounds
    start = checkpoints.newest() or Checkpoint(0, strategy.init(trainable.state()), {})
    emit(
        ArmStarted(
            arm=arm.name, strategy=strategy.name, round=start.round + 1, rounds=rounds, trainable=trainable.count
        )
    )
    expected = (rounds - start.round) * tokens_per_round(arm, members)
    watch = _Watch(arm.name, emit, Meter(emit, f"train {arm.name}", expected))
    carrier = _engine(engine, trainable, members, arm, watch)
    try:
        state = run_rounds(
            strategy,
            carrier,
            start,
            rounds=rounds,
            arm=arm.name,
            checkpoints=checkpoints,
            emit=emit,
            tokens=watch.trained,
        )
        states = carrier.states()
    finally:
        carrier.close()
    watch.meter.done()
    if (shared := strategy.shared(state)) is not None:
        return {None: shared}
    return {name: strategy.personal(state, states[name]) for name in carrier.members}


def save_outcomes(folder: Path, outcomes: Mapping[str | None, Tensors | None], trainable: Trainable, base: str) -> None:
    """Write outcomes as PEFT folders (`adapter`), or model folders (`model`) where everything learned.

    Args:
        folder: of the arm; personal outcomes go to `members/NAME` in it.
        outcomes: what to write.
        trainable: what learned.
        base: name or folder of the base model, for PEFT.

    Raises:
        UserError: the operating system refused.
    """
    for member, tensors in outcomes.items():
        if tensors is not None:
            place = folder if member is None else folder / "members" / member
            trainable.save(place / ("model" if trainable.kind == "full" else "adapter"), tensors, base=base)


def _engine(
    settings: EngineSettings, trainable: Trainable, members: Sequence[Member], arm: Arm, watch: "_Watch"
) -> Engine:
    workers = min(settings.workers, len(members))
    if workers == 0:
        return InProcessEngine(trainable, members, arm.train, watch.on_step)
    return WorkerEngine(trainable, members, arm.train, watch.on_step, workers=workers, threads=settings.threads)


@dataclass
class _Watch:
    """Turns optimiser steps into events, and remembers a round's for its summary."""

    arm: str
    emit: Callable[[Event], None]
    meter: Meter
    steps: list[Step] = field(default_factory=list)

    def on_step(self, client: str, turn: Turn, step: Step) -> None:
        self.steps.append(step)
        self.emit(
            StepDone(
                arm=self.arm,
                client=client,
                round=turn.round,
                step=step.number,
                loss=step.loss,
                learning_rate=step.learning_rate,
                gradient_norm=step.gradient_norm,
                tokens=step.tokens,
            )
        )
        self.meter.add(step.tokens)

    def trained(self) -> tuple[int, float | None]:
        """Tokens since it was last asked, and the mean loss per target over them."""
        steps, self.steps = self.steps, []
        targets = sum(step.targets for step in steps)
        loss = sum(step.loss * step.targets for step in steps) / targets if targets else None
        return sum(step.tokens for step in steps), loss
