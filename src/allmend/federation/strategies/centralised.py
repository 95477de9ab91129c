"""All records in one place: what the members could reach if they were allowed to pool. Simulation only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from allmend.models.tensors import Tensors
from allmend.strategy import Client, Declaration, Facts, Layout, Reply, Seen, State, Sums, Task, Turn, grouped, of_group


@dataclass(frozen=True, kw_only=True)
class Centralised:
    """One party trains on the union of all records; the optimiser goes on from round to round."""

    name = "centralised"
    legs = 1
    pooled = True
    shares = True

    def declare(self) -> Declaration:
        return Declaration(
            sent="the shared parameters",
            seen={
                "model": "the one party that holds all records returns its model",
                "loss": "its training loss, unless records have a guarantee",
            },
            kept="the optimiser",
            numbers=frozenset({"loss"}),
        )

    def layout(self, initial: Tensors, leg: int = 0) -> Layout:
        return {}

    def init(self, initial: Tensors) -> State:
        return State(grouped("model", initial))

    def plan(self, state: State, turn: Turn, members: Sequence[str]) -> dict[str, Task]:
        if len(members) != 1:
            raise ValueError(f"centralised training has one party that holds all records, not {len(members)}")
        return {members[0]: Task(turn, of_group("model", state.tensors))}

    def work(self, task: Task, client: Client) -> Reply:
        optimizer = of_group("optimizer", client.state.tensors)
        trained = client.train(task.tensors, task.turn, optimizer=optimizer or None)
        client.state.tensors = client.state.tensors | grouped("optimizer", trained.optimizer)
        loss: Facts = {} if trained.loss is None else {"loss": trained.loss}
        return Reply(seen=grouped("model", trained.tensors), seen_facts=loss)

    def combine(self, state: State, turn: Turn, sums: Sums, seen: Mapping[str, Seen]) -> State:
        (only,) = seen.values()
        return State(dict(only.tensors))

    def revealed(self, task: Task, reply: Reply) -> Tensors | None:
        return of_group("model", reply.seen)

    def shared(self, state: State) -> Tensors | None:
        return of_group("model", state.tensors)

    def personal(self, state: State, client: State) -> Tensors | None:
        return None
