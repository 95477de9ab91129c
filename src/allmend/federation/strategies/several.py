"""Several models in one federation, each of them averaged over those members who train it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from allmend.federation.strategies.fedavg import FedAvg
from allmend.models.tensors import Tensors
from allmend.strategy import (
    Client,
    Declaration,
    Layout,
    Reply,
    Seen,
    State,
    Sums,
    Task,
    Trained,
    Turn,
    grouped,
    of_group,
    shapes,
)

TRAIN, RETURN = range(2)
"""The legs: what members train, and in the last round what they leave with."""


@dataclass(frozen=True, kw_only=True)
class SeveralModels(FedAvg, ABC):
    """x_g ← x_g + Σ nᵢ (xᵢ − x_g) / Σ nᵢ over the members who have trained x_g; a model that nobody trained stays.

    A member's reply has places for the changes of all models and leaves out those that it did not train. Where sums are
    formed behind masks, these places hold zeros, and which model a member has trained does not show.
    """

    legs = 2
    shares = False
    choice: ClassVar[str] = ""
    """How a member comes to its model, in words."""
    stays: ClassVar[str] = ""
    """What stays at a member, in words."""
    drawn: ClassVar[str] = ""
    """What the choice draws from its records; see `Declaration.beyond`."""

    @property
    @abstractmethod
    def count(self) -> int:
        """How many models there are."""

    def declare(self) -> Declaration:
        declared = super().declare()
        of_models = {f"weight-{group}": f"the same of those with model {group + 1}" for group in range(self.count)}
        return Declaration(
            sent=self.choice,
            summed=dict(declared.summed)
            | {"update": "change of the model that the member trains times number of records, apart for each model"}
            | of_models,
            kept=self.stays,
            numbers=declared.numbers | of_models.keys(),
            beyond=self.drawn,
        )

    def layout(self, initial: Tensors, leg: int = 0) -> Layout:
        if leg == RETURN:
            return {}
        return {name: shape for group in range(self.count) for name, shape in shapes(_update(group, initial)).items()}

    def init(self, initial: Tensors) -> State:
        return State({n: t for group in range(self.count) for n, t in grouped(f"model-{group}", initial).items()})

    def reply(self, group: int, start: Tensors, trained: Trained, client: Client) -> Reply:
        """What a member sends after training model `group` from `start`."""
        weight = float(client.examples)
        change = {name: (tensor - start[name]) * weight for name, tensor in trained.tensors.items()}
        loss = {} if trained.loss is None else {"loss": trained.loss * weight}
        weights = {f"weight-{other}": weight if other == group else 0.0 for other in range(self.count)}
        return Reply(_update(group, change), {"weight": weight} | weights | loss)

    def combine(self, state: State, turn: Turn, sums: Sums, seen: Mapping[str, Seen]) -> State:
        if turn.leg == RETURN:
            return state
        models: Tensors = {}
        for group in range(self.count):
            model, weight = self.model(state.tensors, group), sums.fact(f"weight-{group}")
            if weight:
                change = of_group(f"update/{group}", {name: sums[name] for name in sums})
                model = {name: (tensor + change[name] / weight).to(tensor.dtype) for name, tensor in model.items()}
            models |= grouped(f"model-{group}", model)
        return State(models, state.facts)

    def model(self, tensors: Mapping[str, object], group: int) -> Tensors:
        """One of the models among tensors of a state or a task."""
        return of_group(f"model-{group}", tensors)  # type: ignore[arg-type]

    def revealed(self, task: Task, reply: Reply) -> Tensors | None:
        group = next((g for g in range(self.count) if reply.summed_facts.get(f"weight-{g}")), None)
        if group is None:
            return None
        change, weight = of_group(f"update/{group}", reply.summed), reply.summed_facts["weight"]
        start = self.model(task.tensors, group)
        return {name: (tensor + change[name] / weight).to(tensor.dtype) for name, tensor in start.items()}

    def shared(self, state: State) -> Tensors | None:
        return None

    def personal(self, state: State, client: State) -> Tensors | None:
        return of_group("model", client.tensors) or None


def _update(group: int, tensors: Tensors) -> Tensors:
    return grouped("update", grouped(str(group), tensors))
