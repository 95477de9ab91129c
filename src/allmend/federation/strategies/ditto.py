"""Ditto: one model for all by federated averaging, and beside it a model of each member that is held near it.

Source: Li, Hu, Beirami, Smith, "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021, arXiv
2012.04221, algorithm 1 with as many local steps for both models.
"""

from dataclasses import dataclass

from allmend.federation.strategies.fedavg import FedAvg
from allmend.models.tensors import Tensors
from allmend.strategy import Client, Declaration, Reply, State, Task, grouped, of_group


@dataclass(frozen=True, kw_only=True)
class Ditto(FedAvg):
    """FedAvg's x, and at each member v that minimises fᵢ(v) + (λ / 2) ‖v − x‖², with x as the round began with it.

    A member takes a round's steps twice, with the same batches: for x, whose change it sends, and for v, which stays
    with it together with its optimiser. x does not depend on v. With λ = 0, v is that of `local`, bit for bit.

    Args:
        proximal: λ, 0 or more.
    """

    proximal: float = 0.1

    name = "ditto"
    shares = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.proximal < float("inf"):
            raise ValueError(f"proximal must be 0 or more, got {self.proximal}")

    def declare(self) -> Declaration:
        declared = super().declare()
        return Declaration(
            sent=declared.sent,
            summed=declared.summed,
            kept="the member's own model and its optimiser",
            beyond="two models train with the same records",
            numbers=declared.numbers,
        )

    def work(self, task: Task, client: Client) -> Reply:
        reply = super().work(task, client)
        own = client.train(
            of_group("model", client.state.tensors) or client.initial,
            task.turn,
            optimizer=of_group("optimizer", client.state.tensors),
            proximal=self.proximal,
            anchor=task.tensors,
        )
        client.state.tensors = (
            client.state.tensors | grouped("model", own.tensors) | grouped("optimizer", own.optimizer)
        )
        return reply

    def shared(self, state: State) -> Tensors | None:
        """None: FedAvg's model is a means here, and is the outcome of `fedavg`."""
        return None

    def personal(self, state: State, client: State) -> Tensors | None:
        return of_group("model", client.tensors) or None
