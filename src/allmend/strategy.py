"""The strategy protocol: what coordinator and members say to each other in a round, and nothing else.

A strategy is explicit, serialisable state and plain steps. It never sees a socket, a path or an engine, so that
the same code runs in one process and between machines. In a round, for each of its legs:

    tasks = strategy.plan(state, turn, members)            # coordinator: what goes to whom
    reply = strategy.work(task, client)                    # member: reads and writes client.state, trains
    state = strategy.combine(state, turn, sums, seen)      # coordinator: sums of all replies, and what may be seen

A tensor's name is `group/parameter`; the group is what a `Declaration` speaks of.
What a member returns stands in two declared groups. **Summed** values reach `combine` only as sums over members
(`Sums` has no way back to a single value, so secure aggregation can take its place without a change). **Seen**
values are looked at one by one; each names its reason, which is shown to users before the run.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch

from allmend.models.tensors import Tensors, is_finite

Facts: TypeAlias = dict[str, float | int | str | bool]
"""Named scalars that travel or are kept beside tensors."""

Layout: TypeAlias = dict[str, torch.Size]
"""Shapes of tensors by name."""


@dataclass
class State:
    """What a side keeps from round to round; stored as safetensors with JSON metadata."""

    tensors: Tensors = field(default_factory=dict)
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True)
class Turn:
    """Where the run is: `round` counts from 1, `leg` from 0, of `rounds` rounds in all, among `members` members."""

    round: int
    leg: int
    rounds: int
    members: int = 1


@dataclass(frozen=True)
class Task:
    """From the coordinator to one member.

    Attributes:
        turn: where the run is.
        tensors, facts: what is sent.
        seen: names and shapes of all that the reply may hold to be looked at one by one, which the coordinator keeps
            to itself. Where it is None, each group has the names and shapes of `tensors`, if there are any.
    """

    turn: Turn
    tensors: Tensors = field(default_factory=dict)
    facts: Facts = field(default_factory=dict)
    seen: Layout | None = None


@dataclass(frozen=True)
class Reply:
    """From one member to the coordinator.

    Attributes:
        summed: tensors of which only the sum over members is ever used.
        summed_facts: numbers of which only the sum is ever used (a weight, a count, a weighted loss).
        seen: tensors that the coordinator looks at one by one.
        seen_facts: scalars that the coordinator looks at one by one.
    """

    summed: Tensors = field(default_factory=dict)
    summed_facts: dict[str, float] = field(default_factory=dict)
    seen: Tensors = field(default_factory=dict)
    seen_facts: Facts = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """The part of one member's reply that may be looked at by itself."""

    tensors: Tensors
    facts: Facts


class Sums:
    """Running sums of replies' `summed` parts, kept in float64: adding is possible, taking apart is not.

    Members may return different tensors: each is summed over those who returned it.
    """

    def __init__(self) -> None:
        self._tensors: Tensors = {}
        self._facts: dict[str, float] = {}
        self.members = 0
        self.cut = 0

    @classmethod
    def of(cls, tensors: Tensors, facts: Mapping[str, float], members: int, *, cut: int = 0) -> "Sums":
        """Sums that were formed elsewhere.

        Args:
            tensors: sums by name.
            facts: sums of numbers by name.
            members: how many are in them.
            cut: values that were too large and were cut.
        """
        sums = cls()
        sums._tensors, sums._facts, sums.members, sums.cut = dict(tensors), dict(facts), members, cut
        return sums

    def add(self, reply: Reply) -> None:
        """Add one member's reply.

        Raises:
            ValueError: a value is not finite, or a tensor has another shape than other members' (the name is in the
                message); nothing is added then.
        """
        for name, tensor in reply.summed.items():
            if not is_finite(tensor):
                raise ValueError(f"tensor {name!r} holds NaN or infinite values")
            if name in self._tensors and self._tensors[name].shape != tensor.shape:
                shapes = tuple(tensor.shape), tuple(self._tensors[name].shape)
                raise ValueError(f"tensor {name!r} has shape {shapes[0]}, other members sent {shapes[1]}")
        for name, value in reply.summed_facts.items():
            if not math.isfinite(value):
                raise ValueError(f"number {name!r} is {value}")
        for name, tensor in reply.summed.items():
            if name in self._tensors:
                self._tensors[name] += tensor
            else:
                self._tensors[name] = tensor.to("cpu", torch.float64, copy=True)
        for name, value in reply.summed_facts.items():
            self._facts[name] = self._facts.get(name, 0.0) + value
        self.members += 1

    def __getitem__(self, name: str) -> torch.Tensor:
        """The sum of one tensor, float64."""
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: object) -> bool:
        """Whether any member sent this tensor or number."""
        return name in self._tensors or name in self._facts

    def fact(self, name: str) -> float:
        """The sum of one number; 0 if nobody sent it."""
        return self._facts.get(name, 0.0)


@dataclass(frozen=True)
class Trained:
    """The outcome of a member's local training.

    Attributes:
        tensors: the trained parameters, named as they came.
        loss: mean training loss per token (nats) over the steps; None where it must not leave the member, since a
            guarantee for its records does not cover it.
        steps: optimiser steps taken.
        tokens: tokens that went through the model.
        optimizer: the optimiser's state, to go on from.
    """

    tensors: Tensors
    loss: float | None
    steps: int
    tokens: int
    optimizer: Tensors


class Client(Protocol):
    """What a strategy sees of a member while it works there. Its data never passes through here.

    Attributes:
        name: the member's name.
        examples: number of training records.
        state: kept at the member from round to round; a strategy may read and write it, but for the group `client`,
            which is the client's own, as is the fact `steps`: `client/learnt`, int64 [N, 2], holds for each training
            record the optimiser steps that saw it and its tokens under the loss, summed over these steps.
        initial: the parameters everybody starts from (the same at each member, made from the recipe's seed).
    """

    @property
    def name(self) -> str: ...
    @property
    def examples(self) -> int: ...

    state: State
    initial: Tensors

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
        """Train on the member's own records for one round, from `start`.

        A further training in the same turn, of another model, meets the same batches.

        Args:
            start: parameters to go on from.
            turn: the round, for the schedule.
            optimizer: state of the optimiser to go on from, a fresh one when it is empty; when None, the member's own
                where the recipe lets that go on from round to round, else a fresh one.
            proximal: μ of a term (μ / 2) ‖w − anchor‖² beside the loss.
            anchor: parameters; `start` when None.
            validation: share of the records that is set apart, the same ones in every round, and not trained on.
        """
        ...


@dataclass(frozen=True)
class Declaration:
    """What leaves whom, in words that users read before a run (`allmend tune --dry-run`).

    Attributes:
        sent: what the coordinator sends a member in a round; empty if nothing.
        summed: group of tensors or name of a number → what it is.
        seen: group of tensors or of scalars → why it must be looked at one by one.
        kept: what stays at the member.
        numbers: which of the names above are single numbers; the others have the size of what learns.
        seen_by: who looks at what is seen.
        beside: which of what is seen may be so where sums are hidden: it says something else than they would.
        beyond: what is drawn from a member's records beside the steps of one training over all of them, which no
            guarantee for records covers; empty where that is nothing.
    """

    sent: str
    summed: Mapping[str, str] = field(default_factory=dict)
    seen: Mapping[str, str] = field(default_factory=dict)
    kept: str = ""
    numbers: frozenset[str] = frozenset()
    seen_by: str = "the coordinator"
    beside: frozenset[str] = frozenset()
    beyond: str = ""

    def undeclared(self, reply: Reply) -> list[str]:
        """Names in a reply that were not declared in their group, sorted."""
        summed = {name.partition("/")[0] for name in reply.summed} | set(reply.summed_facts)
        seen = {name.partition("/")[0] for name in (*reply.seen, *reply.seen_facts)}
        return sorted((summed - set(self.summed)) | (seen - set(self.seen)))


class Strategy(Protocol):
    """One way to learn together. Implementations are frozen data classes holding their options.

    Attributes:
        name: as in the recipe.
        legs: exchanges per round.
        pooled: True if all records must stand in one place (a baseline that only a simulation can run).
        shares: True if it ends with one model for all, False if with one for each member.
    """

    @property
    def name(self) -> str: ...
    @property
    def legs(self) -> int: ...
    @property
    def pooled(self) -> bool: ...
    @property
    def shares(self) -> bool: ...

    def declare(self) -> Declaration:
        """What leaves each member, who sees it and why."""
        ...

    def layout(self, initial: Tensors, leg: int = 0) -> Layout:
        """Shapes of the tensors that members' replies of a leg sum, by name: the same for all members and rounds.

        A member may leave a tensor out, which stands for zeros. Secure aggregation forms one vector of them.
        """
        ...

    def init(self, initial: Tensors) -> State:
        """The coordinator's state before the first round."""
        ...

    def plan(self, state: State, turn: Turn, members: Sequence[str]) -> dict[str, Task]:
        """The tasks of one leg, by member; a member without one sits out."""
        ...

    def work(self, task: Task, client: Client) -> Reply:
        """A member's part. Runs where the data is."""
        ...

    def combine(self, state: State, turn: Turn, sums: Sums, seen: Mapping[str, Seen]) -> State:
        """The coordinator's next state."""
        ...

    def revealed(self, task: Task, reply: Reply) -> Tensors | None:
        """The member's model as it can be rebuilt from its task and its reply by whoever sees that reply alone, or
        None where it cannot. For audits: what a curious coordinator would learn without secure aggregation."""
        ...

    def shared(self, state: State) -> Tensors | None:
        """The model that all share, or None where there is none."""
        ...

    def personal(self, state: State, client: State) -> Tensors | None:
        """A member's own model, from the coordinator's and the member's state, or None where there is none."""
        ...


def whole_layout(strategy: Strategy, initial: Tensors) -> Layout:
    """Shapes of what is summed in any leg."""
    return {name: shape for leg in range(strategy.legs) for name, shape in strategy.layout(initial, leg).items()}


def grouped(group: str, tensors: Tensors) -> Tensors:
    """The same tensors under names `group/name`."""
    return {f"{group}/{name}": tensor for name, tensor in tensors.items()}


def shapes(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """Their shapes."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def of_group(group: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors of one group under their names within it."""
    prefix = f"{group}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
