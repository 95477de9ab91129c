"""No exchange: every member trains by itself for as many steps as the others. The baseline of all strategies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    Turn,
    grouped,
    of_group,
)


@dataclass(frozen=True, kw_only=True)
class Local:
    """Each member's model and optimiser stay with it from round to round; only its loss is summed.

    Args:
        validation: share of a member's records that it does not train on: those whose routers alone learn from them in
            `comigs`, which needs a baseline with as many records.
    """

    validation: float = 0.0

    name = "local"
    legs = 1
    pooled = False
    shares = False

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation must lie in [0, 1), got {self.validation}")

    def declare(self) -> Declaration:
        return Declaration(
            sent="",
            beyond="with validation fewer records are trained on than are counted" if self.validation else "",
            summed={
                "weight": "number of training records",
                "loss": "training loss times number of records, unless records have a guarantee",
            },
            kept="the member's model and its optimiser",
            numbers=frozenset({"weight", "loss"}),
        )

    def layout(self, initial: Tensors, leg: int = 0) -> Layout:
        return {}

    def init(self, initial: Tensors) -> State:
        return State()

    def plan(self, state: State, turn: Turn, members: Sequence[str]) -> dict[str, Task]:
        return {member: Task(turn) for member in sorted(members)}

    def work(self, task: Task, client: Client) -> Reply:
        start = of_group("model", client.state.tensors) or client.initial
        optimizer = of_group("optimizer", client.state.tensors)
        trained = client.train(start, task.turn, optimizer=optimizer or None, validation=self.validation)
        client.state.tensors = (
            client.state.tensors | grouped("model", trained.tensors) | grouped("optimizer", trained.optimizer)
        )
        weight = float(client.examples)
        loss = {} if trained.loss is None else {"loss": trained.loss * weight}
        return Reply(summed_facts={"weight": weight} | loss)

    def combine(self, state: State, turn: Turn, sums: Sums, seen: Mapping[str, Seen]) -> State:
        return state

    def revealed(self, task: Task, reply: Reply) -> Tensors | None:
        return None

    def shared(self, state: State) -> Tensors | None:
        return None

    def personal(self, state: State, client: State) -> Tensors | None:
        return of_group("model", client.tensors) or None
