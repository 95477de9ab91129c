"""Groups of members whose gradients point alike, and FedAvg within each: nobody's model is seen, only a sketch.

All train one model first. At that point each member tells where the gradients of two halves of its records point, in a
few numbers. Groups come from what both halves say together, and are taken only if one half's groups are found again in
the other: where they are not, there is one group. Changes are summed apart for each group from then on.

Source: after Sattler, Müller, Samek, "Clustered Federated Learning", arXiv 1910.01991, who cut groups in two by the
cosines of whole updates, again and again. Sketches, the cut at the widest gap and the test by halves are ours. Compare
`cobo`, which sees models and finds out whom a member works with better where groups mostly agree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from allmend.federation.collaboration.sketches import gradient_sketch, sketch_groups
from allmend.federation.strategies.cobo import PLACE, ProbingClient
from allmend.federation.strategies.fedavg import FedAvg
from allmend.federation.strategies.local import Local
from allmend.federation.strategies.several import RETURN, SeveralModels
from allmend.models.tensors import Tensors, is_finite
from allmend.strategy import Client, Declaration, Facts, Reply, Seen, State, Sums, Task, Turn, grouped, of_group

HALVES = 2

ALONE = -1
"""Group of a member that trains by itself."""


@dataclass(frozen=True, kw_only=True)
class Clustered(SeveralModels):
    """One model for all in the first rounds, then one for each group that members' gradients there make.

    Args:
        most_groups: that may be found; a reply has places for so many models where sums are formed behind masks.
        common_rounds: share of the rounds before groups are found.
        min_group: members that a group must have, and that a sum of a group is over; those of smaller groups train
            alone.
        probe_records: records whose gradient is sketched, at most.
        sketch_size: numbers of a sketch; there are two from each member, once.
    """

    most_groups: int = 8
    common_rounds: float = 0.2
    min_group: int = 3
    probe_records: int = 64
    sketch_size: int = 256

    name = "clustered"
    choice = "the shared parameters, and later those of the member's group"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.common_rounds <= 1:
            raise ValueError(f"common_rounds must be above 0 and at most 1, got {self.common_rounds}")
        for option, least in (("most_groups", 1), ("min_group", 1), ("probe_records", 2), ("sketch_size", 1)):
            if getattr(self, option) < least:
                raise ValueError(f"{option} must be {least} or more, got {getattr(self, option)}")

    @property
    def count(self) -> int:
        return self.most_groups

    def rounds_together(self, rounds: int) -> int:
        """How many of a run's rounds have one model for all."""
        return max(1, round(self.common_rounds * rounds))

    def declare(self) -> Declaration:
        declared = super().declare()
        told = f"{self.sketch_size} numbers of the gradient at the shared parameters, for two halves of the records: "
        return Declaration(
            sent=declared.sent,
            summed=declared.summed,
            seen={PLACE: f"{told}they say who is of one group, once"},
            kept="the member's model, where it trains alone",
            numbers=declared.numbers,
            beside=frozenset({PLACE}),
            beyond="sketches show where a member's gradient points",
        )

    def plan(self, state: State, turn: Turn, members: Sequence[str]) -> dict[str, Task]:
        together = self.rounds_together(turn.rounds)
        if turn.leg == RETURN:
            return self._to_return(state, turn, members, found=turn.round >= together)
        if turn.round <= together:
            first = grouped("model-0", self.model(state.tensors, 0))
            return {name: Task(turn, first) for name in self._drawn(state, turn, members)}
        tasks: dict[str, Task] = {}
        for group, names in self._groups(state, members).items():
            if group == ALONE:
                tasks |= {name: Task(turn) for name in names}
            elif len(drawn := self._drawn(state, turn, names)) >= self.min_group:
                model = grouped(f"model-{group}", self.model(state.tensors, group))
                tasks |= dict.fromkeys(drawn, Task(turn, model))
        return tasks

    def _drawn(self, state: State, turn: Turn, members: Sequence[str]) -> list[str]:
        return list(FedAvg.plan(self, state, turn, members))

    def _to_return(self, state: State, turn: Turn, members: Sequence[str], *, found: bool) -> dict[str, Task]:
        """Who has no group yet is asked where its gradient points, and in the last round all get their model."""
        tasks = {}
        last = turn.round == turn.rounds
        common = of_group("common", state.tensors) or self.model(state.tensors, 0)
        for name in sorted(members):
            group = state.facts.get(f"group/{name}")
            if group is None and found:
                shown = {f"{PLACE}/{half}": torch.Size([self.sketch_size]) for half in range(HALVES)}
                tasks[name] = Task(turn, grouped("model-0", common), {"place": True}, shown)
            elif last and group not in (None, ALONE):
                tasks[name] = Task(turn, grouped("model-0", self.model(state.tensors, int(cast(int, group)))))
            else:
                tasks[name] = Task(turn)
        return tasks

    @staticmethod
    def _groups(state: State, members: Sequence[str]) -> dict[int, list[str]]:
        """Those who are here, by group."""
        found: dict[int, list[str]] = {}
        for name, group in sorted(groups_in(state).items()):
            if name in members:
                found.setdefault(group, []).append(name)
        return found

    def work(self, task: Task, client: Client) -> Reply:
        if task.turn.leg == RETURN:
            if model := self.model(task.tensors, 0):
                client.state.tensors = client.state.tensors | grouped("model", model)
            return Reply(seen=self._place(model, task, client)) if "place" in task.facts else Reply()
        if not task.tensors:
            return Local().work(task, client)
        group = next(group for group in range(self.count) if self.model(task.tensors, group))
        start = self.model(task.tensors, group)
        trained = client.train(start, task.turn)
        client.state.tensors = client.state.tensors | grouped("model", trained.tensors)
        return self.reply(group, start, trained, client)

    def _place(self, at: Tensors, task: Task, client: Client) -> Tensors:
        member, found = cast(ProbingClient, client), {}
        for half in range(HALVES):
            gradient = member.gradient(at, task.turn, records=self.probe_records, part=(half, HALVES))
            sketch = gradient_sketch(gradient, self.sketch_size, self.seed)
            found[f"{PLACE}/{half}"] = torch.nn.functional.normalize(sketch, dim=0)
        return found if all(map(is_finite, found.values())) else {}

    def combine(self, state: State, turn: Turn, sums: Sums, seen: Mapping[str, Seen]) -> State:
        if turn.leg != RETURN:
            kept = {name: tensor for name, tensor in state.tensors.items() if not name.startswith("model-")}
            moved = super().combine(state, turn, sums, seen)
            return State(kept | moved.tensors, moved.facts)
        if turn.round < self.rounds_together(turn.rounds):
            return state
        told = {
            name: torch.stack([one.tensors[f"{PLACE}/{half}"] for half in range(HALVES)])
            for name, one in sorted(seen.items())
            if len(one.tensors) == HALVES
        }
        return self._joined(state, told) if has_groups(state) else self._grouped(state, told)

    def _grouped(self, state: State, told: Mapping[str, torch.Tensor]) -> State:
        """Groups of those who have told where their gradients point; each begins with the model of all."""
        model = self.model(state.tensors, 0)
        places = torch.stack(list(told.values())) if told else torch.zeros(0, HALVES, self.sketch_size)
        found = sketch_groups(places[:, 0], places[:, 1], most=self.most_groups, seed=self.seed).tolist()
        small = {group for group in found if found.count(group) < self.min_group}
        of = zip(told, found, strict=True)
        facts: Facts = {f"group/{name}": ALONE if group in small else group for name, group in of}
        models = {n: t for group in range(self.count) for n, t in grouped(f"model-{group}", model).items()}
        own = {"sketches": places.sum(1), "members": torch.tensor(found)}
        facts["told"] = "\n".join(told)
        return State(state.tensors | models | grouped("common", model) | own, state.facts | facts)

    def _joined(self, state: State, told: Mapping[str, torch.Tensor]) -> State:
        """Who comes late is of the group whose members' gradients point most like its own."""
        facts: Facts = {}
        sketches, found = state.tensors["sketches"], state.tensors["members"]
        large = [group for group in range(self.count) if int((found == group).sum()) >= self.min_group]
        for name, place in told.items():
            near = torch.nn.functional.cosine_similarity(place.sum(0)[None], sketches, dim=1)
            facts[f"group/{name}"] = max(large, key=lambda g: float(near[found == g].mean()), default=ALONE)
        return State(state.tensors, state.facts | facts)


def has_groups(state: State) -> bool:
    """Whether the coordinator knows of groups yet."""
    return "sketches" in state.tensors


def groups_in(state: State) -> dict[str, int]:
    """Each member's group as the coordinator knows it; -1 where it trains alone."""
    return {name.removeprefix("group/"): int(group) for name, group in state.facts.items() if name.startswith("group/")}


def members_told(state: State) -> list[str]:
    """Members whose sketches made the groups, in their order."""
    return [name for name in str(state.facts["told"]).split("\n") if name]
