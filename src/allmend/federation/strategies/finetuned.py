"""FedAvg, then local training: in the last rounds every member trains the common model by itself.

The baseline of personal models that costs least: McMahan et al.'s algorithm (see `fedavg`) with local steps after it,
as in Cheng, Chadha, Duchi, "Fine-tuning is Fine in Federated Learning", arXiv 2108.07313.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from allmend.federation.strategies.fedavg import FedAvg
from allmend.federation.strategies.local import Local
from allmend.models.tensors import Tensors
from allmend.strategy import Client, Declaration, Reply, Seen, State, Sums, Task, Turn, grouped, of_group


@dataclass(frozen=True, kw_only=True)
class FineTuned(FedAvg):
    """`fedavg` in the first rounds and `local` in the others, from the model that all share then.

    In the local rounds all members train, and nothing leaves them.

    Args:
        local_rounds: share of the rounds that are local, in (0, 1); at least one, and not all where there are several.
    """

    local_rounds: float = 0.375

    name = "finetuned"
    shares = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.local_rounds < 1:
            raise ValueError(f"local_rounds must lie between 0 and 1, got {self.local_rounds}")

    def declare(self) -> Declaration:
        declared = super().declare()
        return Declaration(
            sent="the shared parameters, until the local rounds have begun",
            summed={name: f"{words}; nothing in the local rounds" for name, words in declared.summed.items()},
            kept="in the local rounds the member's model and its optimiser",
            numbers=declared.numbers,
        )

    def first_local(self, rounds: int) -> int:
        """The first local round of so many."""
        return rounds - max(1, min(round(self.local_rounds * rounds), rounds - 1)) + 1

    def plan(self, state: State, turn: Turn, members: Sequence[str]) -> dict[str, Task]:
        if turn.round < self.first_local(turn.rounds):
            return super().plan(state, turn, members)
        model = of_group("model", state.tensors)
        return {name: Task(turn, {} if state.facts.get(f"has/{name}") else model) for name in sorted(members)}

    def work(self, task: Task, client: Client) -> Reply:
        if task.turn.round < self.first_local(task.turn.rounds):
            return super().work(task, client)
        if task.tensors:
            client.state.tensors = client.state.tensors | grouped("model", task.tensors)
        Local().work(task, client)
        return Reply()

    def combine(self, state: State, turn: Turn, sums: Sums, seen: Mapping[str, Seen]) -> State:
        if turn.round < self.first_local(turn.rounds):
            return super().combine(state, turn, sums, seen)
        return State(state.tensors, state.facts | {f"has/{name}": True for name in seen})

    def revealed(self, task: Task, reply: Reply) -> Tensors | None:
        """FedAvg's; nothing of a local round."""
        return super().revealed(task, reply) if reply.summed else None

    def shared(self, state: State) -> Tensors | None:
        return None

    def personal(self, state: State, client: State) -> Tensors | None:
        """The common model where a member has not begun with its own."""
        return of_group("model", client.tensors) or of_group("model", state.tensors) or None
