"""Federated averaging: the mean of members' parameters, weighted by their number of records.

Source: McMahan, Moore, Ramage, Hampson, Agüera y Arcas, "Communication-Efficient Learning of Deep Networks from
Decentralized Data", AISTATS 2017, algorithm 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

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


@dataclass(frozen=True, kw_only=True)
class FedAvg:
    """x ← x + Σ nᵢ (xᵢ − x) / Σ nᵢ over the members sampled for the round.

    With LoRA the factors are averaged, not their products: mean(B) mean(A) is not mean(BA).

    Args:
        participation: share of members sampled each round, in (0, 1]; at least one takes part.
        seed: of the sampling.
    """

    participation: float = 1.0
    seed: int = 0

    name = "fedavg"
    legs = 1
    pooled = False
    shares = True

    def __post_init__(self) -> None:
        if not 0 < self.participation <= 1:
            raise ValueError(f"participation must lie in (0, 1], got {self.participation}")

    def declare(self) -> Declaration:
        return Declaration(
            sent="the shared parameters",
            summed={
                "update": "change of the parameters times number of records",
                "weight": "number of training records",
                "loss": "training loss times number of records, unless records have a guarantee",
            },
            numbers=frozenset({"weight", "loss"}),
        )

    def layout(self, initial: Tensors, leg: int = 0) -> Layout:
        return shapes(grouped("update", initial))

    def init(self, initial: Tensors) -> State:
        return State(grouped("model", initial))

    def plan(self, state: State, turn: Turn, members: Sequence[str]) -> dict[str, Task]:
        count = max(1, round(self.participation * len(members)))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + turn.round) % 2**63)
        chosen = torch.randperm(len(members), generator=generator)[:count].tolist()
        ordered = sorted(members)
        return dict.fromkeys((ordered[index] for index in sorted(chosen)), Task(turn, of_group("model", state.tensors)))

    def work(self, task: Task, client: Client) -> Reply:
        trained = self.train(task, client)
        weight = float(client.examples)
        update = {name: (tensor - task.tensors[name]) * weight for name, tensor in trained.tensors.items()}
        loss = {} if trained.loss is None else {"loss": trained.loss * weight}
        return Reply(grouped("update", update), {"weight": weight} | loss)

    def train(self, task: Task, client: Client) -> Trained:
        """A member's training; what FedAvg's relatives do otherwise."""
        return client.train(task.tensors, task.turn)

    def combine(self, state: State, turn: Turn, sums: Sums, seen: Mapping[str, Seen]) -> State:
        weight = sums.fact("weight")
        model = {
            name: (tensor + sums[f"update/{name}"] / weight).to(tensor.dtype)
            for name, tensor in of_group("model", state.tensors).items()
        }
        return State(grouped("model", model))

    def revealed(self, task: Task, reply: Reply) -> Tensors | None:
        weight = reply.summed_facts["weight"]
        update = of_group("update", reply.summed)
        return {name: (tensor + update[name] / weight).to(tensor.dtype) for name, tensor in task.tensors.items()}

    def shared(self, state: State) -> Tensors | None:
        return of_group("model", state.tensors)

    def personal(self, state: State, client: State) -> Tensors | None:
        return None
