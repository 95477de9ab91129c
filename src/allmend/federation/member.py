"""A member's side: the records that stay with it, and the `Client` that a strategy works with."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from allmend.data.chat import Encoded
from allmend.errors import UserError
from allmend.learn.alternating import Alternation, RouterSettings, alternate
from allmend.learn.loop import Step, gradient, loss, mean_loss, train
from allmend.learn.private import RecordNoise
from allmend.learn.schedule import steps_per_round
from allmend.models.adapters import Trainable, of_other_rank
from allmend.models.factors import first_components, with_components
from allmend.models.mixture import PRESENT, Mixture, initial, of_ranks, role
from allmend.models.tensors import Tensors
from allmend.recipe import Train
from allmend.strategy import State, Trained, Turn, grouped, of_group

LEARNT = "client/learnt"
"""Name, in a member's state, of what was learnt from each of its records (`Outcome.learnt`), over all rounds."""

OPTIMIZER = "client/optimizer"
"""Group, in a member's state, of its optimiser's state, where that goes on from round to round."""

ASIDE = "aside"
"""Name, in a member's state, of the number of its records that went through the model for anything but training steps:
one each there and back, a third there alone."""

_APART = 7
"""Of the seed by which a member sets records apart."""

OnStep = Callable[[str, Turn, Step], None]
"""Told the member's name, the turn and the step, after each optimiser step."""


@dataclass(frozen=True)
class Member:
    """What a member trains on.

    Attributes:
        name: of the member.
        records: encoded for training.
        seed: of their order and of seeded noise; another one for each member.
        noise: makes the member's steps private for each of its records.
        rank: most components of a LoRA adapter that it trains; all where it is None.
        held_out: records that it does not train on, encoded likewise, where a strategy asks about them.
        specialists: experts of its own, of a mixture; all that there is room for where it is None.
        target: records of what its model is to be good at, encoded likewise, which routers learn from; none where a
            share of `records` stands for them.
    """

    name: str
    records: Sequence[Encoded]
    seed: int
    noise: RecordNoise | None = None
    rank: int | None = None
    held_out: Sequence[Encoded] = ()
    specialists: int | None = None
    target: Sequence[Encoded] = ()

    def validation(self, share: float) -> list[Encoded]:
        """What its routers learn from: its target, or the records that `set_apart` takes from its experts."""
        return [*self.target] or [self.records[place] for place in set_apart(self.records, share, self.seed)]


def set_apart(records: Sequence[Encoded], share: float, seed: int) -> list[int]:
    """Places of the records that routers learn from and experts do not, increasing, the same in every round.

    They are of those that can be learnt from: one at least, and not all. Records with the same tokens are on the same
    side, so that no router learns from what experts were fitted to.

    Args:
        records: of a member.
        share: of them to set apart; more where records are alike.
        seed: of the choice.
    """
    learning = [place for place, record in enumerate(records) if record.learns]
    alike: dict[bytes, list[int]] = {}
    for place in learning:
        alike.setdefault(records[place].ids.numpy().tobytes(), []).append(place)
    count = min(max(1, round(share * len(learning))), len(learning) - 1)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + _APART) % 2**63)
    found: set[int] = set()
    for drawn in torch.randperm(len(learning), generator=generator).tolist():
        if len(found) >= count:
            break
        same = alike[records[learning[drawn]].ids.numpy().tobytes()]
        if len(found | {*same}) < len(learning):
            found.update(same)
    return sorted(found)


def change(tensors: Tensors, start: Tensors) -> float:
    """The norm of the change from one set of parameters to another, over all of them."""
    return math.sqrt(sum(float((t.double() - start[name].double()).square().sum()) for name, t in tensors.items()))


def bounded(tensors: Tensors, start: Tensors, largest: float | None) -> Tensors:
    """Parameters whose change from `start` has at most the norm `largest`: itself, or scaled down to it."""
    if largest is None or (norm := change(tensors, start)) <= largest:
        return tensors
    return {
        name: (start[name].double() + (tensor.double() - start[name].double()) * (largest / norm)).to(tensor.dtype)
        for name, tensor in tensors.items()
    }


@dataclass
class MemberClient:
    """`allmend.strategy.Client` over a member's records and a model that several members may share in turns.

    Attributes:
        trainable: holds whatever was trained last; every call of `train` loads its own start into it.
        settings: of local training.
        initial: the parameters everybody starts from.
        state: the member's, kept from round to round. `facts["steps"]` counts its optimiser steps; `tensors[LEARNT]`
            is what they learnt from.
    """

    member: Member
    trainable: Trainable
    settings: Train
    initial: Tensors
    state: State = field(default_factory=State)
    on_step: OnStep = lambda name, turn, step: None
    _begun: tuple[Turn, int] | None = field(init=False, default=None)
    """The turn of the last training, and the steps taken before it."""

    @property
    def name(self) -> str:
        return self.member.name

    @property
    def examples(self) -> int:
        return len(self.member.records)

    @property
    def records(self) -> Sequence[Encoded]:
        """What it trains on."""
        return self.member.records

    @property
    def held_out(self) -> Sequence[Encoded]:
        """What it does not."""
        return self.member.held_out

    def train(
        self,
        start: Tensors,
        turn: Turn,
        *,
        optimizer: Tensors | None = None,
        proximal: float = 0.0,
        anchor: Tensors | None = None,
        validation: float = 0.0,
    ) -> Trained:
        """One round of local training from `start`; a second one in the same turn meets the same batches, and its
        steps are not told.

        Args:
            start, turn, optimizer, proximal, anchor: see `Client`.
            validation: share of the member's records that it does not train on, those that `alternate` sets apart
                without a target.

        Raises:
            UserError: nothing to learn from, or training diverged; the member is named.
        """
        rank = self.member.rank if self.trainable.kind == "lora" else None
        self.trainable.load(start if rank is None else first_components(start, rank))
        if anchor is not None and rank is not None:
            anchor = first_components(anchor, rank)
        steps = steps_per_round(self.examples, self.settings)
        taken = int(self.state.facts.get("steps", 0))
        if again := self._begun == (turn, taken - steps):
            taken -= steps
        self._begun = turn, taken
        apart = set(self._apart(validation) if validation and not self.member.target else ())
        places = [place for place in range(self.examples) if place not in apart]
        kept = self.settings.optimizer_state == "persist" and optimizer is None
        if kept:
            optimizer = of_group(OPTIMIZER, self.state.tensors) or None
        with self._named(turn):
            outcome = train(
                self.trainable,
                [self.records[place] for place in places],
                self.settings,
                steps=steps,
                first_step=taken,
                # a member that sat out rounds is as far down the schedule as the rest
                schedule_step=(turn.round - 1) * steps,
                total_steps=turn.rounds * steps,
                seed=self.member.seed,
                optimizer=optimizer,
                proximal=proximal,
                anchor=anchor,
                noise=self.member.noise,
                on_step=lambda step: None if again else self.on_step(self.name, turn, step),
            )
        tensors = outcome.tensors if rank is None else with_components(outcome.tensors, start, rank)
        tensors = bounded(tensors, start, self.settings.largest_update)
        self.state.facts["steps"] = taken + steps
        learnt = self._learnt()
        learnt[places] += outcome.learnt
        self.state.tensors = self.state.tensors | {LEARNT: learnt}
        if kept:
            self.state.tensors = self.state.tensors | grouped(OPTIMIZER, outcome.optimizer)
        tokens = sum(step.tokens for step in outcome.steps)
        # without noise of its own, the loss would be a release that no guarantee covers
        loss = mean_loss(outcome.steps) if self.member.noise is None else None
        return Trained(tensors, loss, steps, tokens, outcome.optimizer)

    def experts(self) -> Tensors:
        """The state of a mixture that this member starts from: generalists and routers that all have in common,
        specialists of its own, and no more experts than it has."""
        mixture = self._mixture
        own = initial(mixture, seed=0, specialist_seed=self.member.seed)
        config = mixture.config
        most = config.specialists if self.member.specialists is None else self.member.specialists
        ranks = [min(rank, self.member.rank or rank) for rank in config.ranks]
        ranks[config.generalists + most :] = [0] * (config.specialists - most)
        start = self.initial | {name: tensor for name, tensor in own.items() if role(name) == "specialist"}
        return of_ranks(start, config, ranks)

    def alternate(
        self,
        start: Tensors,
        turn: Turn,
        router: RouterSettings,
        *,
        validation: float,
        learns_from: Literal["validation", "train"] = "validation",
        experts: Tensors,
        routers: Tensors,
    ) -> Alternation:
        """One round of a mixture's local training: experts on the member's records, routers on those set apart, or on
        the member's target.

        Args:
            start: the mixture's state to go on from.
            turn: the round, for the schedule.
            router: how routers learn.
            validation: share of the member's records that routers learn from, and experts do not, without a target.
            learns_from: what routers learn from; with `train` the experts' records, and those set apart teach nobody.
            experts, routers: states of the optimisers to go on from; fresh when empty.

        Raises:
            UserError: nothing to learn from, or training diverged; the member is named.
        """
        self._mixture.load(start)
        steps = steps_per_round(self.examples, self.settings)
        taken = int(self.state.facts.get("steps", 0))
        routed, target = int(start[PRESENT].sum()) > 1, self.member.target
        apart = set(self._apart(validation) if routed and not target else ())
        places = [place for place in range(self.examples) if place not in apart]
        own = [self.records[place] for place in places]
        with self._named(turn):
            found = alternate(
                self._mixture,
                own,
                own if learns_from == "train" else target or [self.records[place] for place in sorted(apart)],
                self.settings,
                router,
                steps=steps,
                first_step=taken,
                schedule_step=(turn.round - 1) * steps,
                total_steps=turn.rounds * steps,
                seed=self.member.seed,
                experts=experts,
                routers=routers,
                on_step=lambda step: self.on_step(self.name, turn, step),
            )
        self.state.facts["steps"] = taken + steps
        learnt = self._learnt()
        learnt[places] += found.learnt
        if learns_from == "train":
            learnt[places] += found.validated
        elif apart:
            learnt[sorted(apart)] += found.validated
        else:
            self._count(float(found.validated[:, 0].sum()))
        self.state.tensors = self.state.tensors | {LEARNT: learnt}
        return found

    def _apart(self, share: float) -> list[int]:
        return set_apart(self.records, share, self.member.seed)

    @contextlib.contextmanager
    def _named(self, turn: Turn) -> Iterator[None]:
        """Whose mistake it is, and in which round."""
        try:
            yield
        except UserError as error:
            raise type(error)(error.what, where=f"client {self.name!r}, round {turn.round}", hint=error.hint) from error

    @property
    def _mixture(self) -> Mixture:
        assert isinstance(self.trainable, Mixture)
        return self.trainable

    def gradient(
        self,
        at: Tensors,
        turn: Turn,
        *,
        records: int | None = None,
        held_out: bool = False,
        part: tuple[int, int] = (0, 1),
    ) -> Tensors:
        """The gradient of the mean loss of this member's records at some parameters, by name.

        Args:
            at: parameters; factors of LoRA may have another rank than the member's.
            turn: the round, which decides the records that are drawn.
            records: that are drawn, or as many as there are; all when None.
            held_out: whether of the held-out records instead.
            part: which of so many parts of these records, counted from 0; of fewer records than parts, all.

        Raises:
            UserError: no record has a token to learn from; the member is named.
        """
        drawn = self._drawn(self.held_out if held_out else self.records, turn, records)
        source = drawn[part[0] :: part[1]] if len(drawn) >= part[1] else drawn
        own = self.trainable.parameters()
        self._count(len(source))
        with self._named(turn):
            if all(tensor.shape == own[name].shape for name, tensor in at.items()):
                self.trainable.load(at)
                return gradient(self.trainable, source, tokens_per_pass=self.settings.tokens_per_pass)
            with of_other_rank(self.trainable, at) as other:
                return gradient(other, source, tokens_per_pass=self.settings.tokens_per_pass)

    def loss(self, at: Tensors, turn: Turn, *, records: int | None = None) -> float:
        """The mean loss per token (nats) of this member's training records at some parameters.

        Args:
            at: parameters, of the member's shapes.
            turn: the round, which decides the records that are drawn, as for `gradient`.
            records: that are drawn, or as many as there are; all when None.

        Raises:
            UserError: no record has a token to learn from; the member is named.
        """
        source = self._drawn(self.records, turn, records)
        self._count(len(source) / 3)
        with self._named(turn):
            self.trainable.load(at)
            return loss(self.trainable, source, tokens_per_pass=self.settings.tokens_per_pass)

    def _drawn(self, records: Sequence[Encoded], turn: Turn, count: int | None) -> list[Encoded]:
        """Those that can be learnt from, or as many of them, drawn anew in each round."""
        source = [one for one in records if one.learns]
        if count is None or len(source) <= count:
            return source
        generator = torch.Generator().manual_seed((self.member.seed * 1_000_003 + turn.round) % 2**63)
        return [source[place] for place in torch.randperm(len(source), generator=generator)[:count].tolist()]

    def _learnt(self) -> torch.Tensor:
        """What its records have taught so far, to add to."""
        known = self.state.tensors.get(LEARNT)
        return torch.zeros(self.examples, 2, dtype=torch.int64) if known is None else known.clone()

    def _count(self, passes: float) -> None:
        self.state.facts[ASIDE] = float(self.state.facts.get(ASIDE, 0.0)) + passes
