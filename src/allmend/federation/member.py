"""A member's side: the records that stay with it, and the `Client` that a strategy works with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from allmend.data.chat import Encoded
from allmend.errors import UserError
from allmend.learn.loop import Step, steps_per_round, train
from allmend.models.adapters import Trainable
from allmend.models.tensors import Tensors
from allmend.recipe import Train
from allmend.strategy import State, Trained, Turn

OnStep = Callable[[str, Turn, Step], None]
"""Told the member's name, the turn and the step, after each optimiser step."""


@dataclass(frozen=True)
class Member:
    """A member's encoded training records and the seed of their order."""

    name: str
    records: Sequence[Encoded]
    seed: int


@dataclass
class MemberClient:
    """`allmend.strategy.Client` over a member's records and a model that several members may share in turns.

    Attributes:
        trainable: holds whatever was trained last; every call of `train` loads its own start into it.
        settings: of local training.
        initial: the parameters everybody starts from.
        state: the member's, kept from round to round. `facts["steps"]` counts its optimiser steps.
    """

    member: Member
    trainable: Trainable
    settings: Train
    initial: Tensors
    state: State = field(default_factory=State)
    on_step: OnStep = lambda name, turn, step: None

    @property
    def name(self) -> str:
        return self.member.name

    @property
    def examples(self) -> int:
        return len(self.member.records)

    def train(self, start: Tensors, turn: Turn, *, optimizer: Tensors | None = None) -> Trained:
        """One round of local training from `start`.

        Raises:
            UserError: nothing to learn from, or training diverged; the member is named.
        """
        self.trainable.load(start)
        steps = steps_per_round(self.examples, self.settings)
        taken = int(self.state.facts.get("steps", 0))
        try:
            outcome = train(
                self.trainable,
                self.member.records,
                self.settings,
                steps=steps,
                first_step=taken,
                # a member that sat out rounds is as far down the schedule as the rest
                schedule_step=(turn.round - 1) * steps,
                total_steps=turn.rounds * steps,
                seed=self.member.seed,
                optimizer=optimizer,
                on_step=lambda step: self.on_step(self.name, turn, step),
            )
        except UserError as error:
            raise type(error)(error.what, where=f"client {self.name!r}, round {turn.round}", hint=error.hint) from error
        self.state.facts["steps"] = taken + steps
        tokens = sum(step.tokens for step in outcome.steps)
        targets = sum(step.targets for step in outcome.steps)
        loss = sum(step.loss * step.targets for step in outcome.steps) / targets
        return Trained(outcome.tensors, loss, steps, tokens, outcome.optimizer)
