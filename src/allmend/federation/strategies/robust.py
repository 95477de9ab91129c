"""Averages that a few wrong members cannot move far. Members' changes are compared one by one, so all are seen.

Sources: Yin, Chen, Ramchandran, Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
ICML 2018 (coordinate-wise median and trimmed mean); Blanchard, El Mhamdi, Guerraoui, Stainer, "Machine Learning with
Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017 (Krum and Multi-Krum).

Every member counts the same here, whatever it has: a wrong one could claim any number of records.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from allmend.errors import UserError
from allmend.federation.strategies.fedavg import FedAvg
from allmend.models.tensors import Tensors
from allmend.strategy import Client, Declaration, Layout, Reply, Seen, State, Sums, Task, Turn, grouped, of_group


@dataclass(frozen=True, kw_only=True)
class _Robust(FedAvg, ABC):
    """x ← x + centre(Δ₁ … Δₙ) over the members sampled for the round."""

    def declare(self) -> Declaration:
        declared = super().declare()
        summed = {name: what for name, what in declared.summed.items() if name != "update"}
        reason = "change of the parameters: changes are compared with each other, to tell which go astray"
        return replace(declared, summed=summed, seen={"update": reason})

    def layout(self, initial: Tensors, leg: int = 0) -> Layout:
        return {}

    def work(self, task: Task, client: Client) -> Reply:
        trained = self.train(task, client)
        weight = float(client.examples)
        update = {name: tensor - task.tensors[name] for name, tensor in trained.tensors.items()}
        loss = {} if trained.loss is None else {"loss": trained.loss * weight}
        return Reply(summed_facts={"weight": weight} | loss, seen=grouped("update", update))

    def combine(self, state: State, turn: Turn, sums: Sums, seen: Mapping[str, Seen]) -> State:
        model = of_group("model", state.tensors)
        shapes = {name: tensor.shape for name, tensor in model.items()}
        changes = []
        for member in sorted(seen):
            changes.append(of_group("update", seen[member].tensors))
            found = {name: tensor.shape for name, tensor in changes[-1].items()}
            if found != shapes:
                name = min(set(found.items()) ^ set(shapes.items()))[0]
                raise UserError(
                    f"tensor {name!r} is missing, too many, or of another shape",
                    where=f"client {member!r}, round {turn.round}",
                    hint="All members need the same model and adapter.",
                )
        centre = self.centre(changes)
        moved = {name: (tensor + centre[name]).to(tensor.dtype) for name, tensor in model.items()}
        return State(grouped("model", moved))

    @abstractmethod
    def centre(self, changes: Sequence[Tensors]) -> Tensors:
        """Where the changes of one or more members agree."""

    def revealed(self, task: Task, reply: Reply) -> Tensors | None:
        update = of_group("update", reply.seen)
        return {name: (tensor + update[name]).to(tensor.dtype) for name, tensor in task.tensors.items()}


@dataclass(frozen=True, kw_only=True)
class TrimmedMean(_Robust):
    """Each parameter moves by the mean of its changes without the ⌊trim · n⌋ largest and smallest of n.

    It withstands that many wrong members.

    Args:
        trim: share that is left out at either end, in [0, 0.5).
    """

    trim: float = 0.2

    name = "trimmed_mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.trim < 0.5:
            raise ValueError(f"trim must lie in [0, 0.5), got {self.trim}")

    def centre(self, changes: Sequence[Tensors]) -> Tensors:
        cut = math.floor(self.trim * len(changes))
        kept = slice(cut, len(changes) - cut)
        return {name: _sorted(changes, name)[kept].mean(0) for name in changes[0]}


@dataclass(frozen=True, kw_only=True)
class Median(_Robust):
    """Each parameter moves by the median of its changes. It withstands all but half of the members."""

    name = "median"

    def centre(self, changes: Sequence[Tensors]) -> Tensors:
        upper = len(changes) // 2
        return {
            name: (ordered[upper] + ordered[~upper]) / 2 for name in changes[0] for ordered in [_sorted(changes, name)]
        }


@dataclass(frozen=True, kw_only=True)
class Krum(_Robust):
    """The mean of the `kept` whole changes with the smallest distances to their n − f − 2 nearest.

    It withstands f wrong members out of n ≥ 2 f + 3.

    Args:
        malicious: f.
        kept: how many changes are averaged: 1 for Krum, more for Multi-Krum.
    """

    malicious: int = 1
    kept: int = 1

    name = "krum"

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, least in (("malicious", 0), ("kept", 1)):
            if getattr(self, option) < least:
                raise ValueError(f"{option} must be {least} or more, got {getattr(self, option)}")

    def plan(self, state: State, turn: Turn, members: Sequence[str]) -> dict[str, Task]:
        """Also raises UserError where too few members take part for `malicious` and `kept`."""
        tasks = super().plan(state, turn, members)
        self._check(len(tasks))
        return tasks

    def centre(self, changes: Sequence[Tensors]) -> Tensors:
        n, near = len(changes), len(changes) - self.malicious - 2
        self._check(n)
        distances = torch.zeros(n, n, dtype=torch.float64)
        for one in range(n):
            for other in range(one):
                squares = ((changes[one][name].double() - changes[other][name]).square().sum() for name in changes[one])
                distances[one, other] = distances[other, one] = sum(squares, torch.zeros((), dtype=torch.float64))
        distances.fill_diagonal_(math.inf)
        scores = distances.sort(dim=1).values[:, :near].sum(1)
        chosen = scores.argsort(stable=True)[: self.kept].tolist()
        return {name: torch.stack([changes[place][name].double() for place in chosen]).mean(0) for name in changes[0]}

    def _check(self, members: int) -> None:
        needed = max(2 * self.malicious + 3, self.malicious + self.kept)
        if members < needed:
            raise UserError(
                f"krum with malicious = {self.malicious} and kept = {self.kept} needs {needed} members in a round, and "
                f"{members} take part",
                where="strategy",
                hint="Lower them, or let more members take part.",
            )


def _sorted(changes: Sequence[Tensors], name: str) -> torch.Tensor:
    """The members' changes of one tensor, each number in ascending order over the members; float64 [n, …]."""
    return torch.stack([change[name].double() for change in changes]).sort(dim=0).values
