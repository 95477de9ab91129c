"""FedProx: federated averaging whose members are held near the shared parameters while they train.

Source: Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks", MLSys 2020,
algorithm 2.
"""

from dataclasses import dataclass

from allmend.federation.strategies.fedavg import FedAvg
from allmend.strategy import Client, Task, Trained


@dataclass(frozen=True, kw_only=True)
class FedProx(FedAvg):
    """FedAvg of members that minimise fᵢ(w) + (μ / 2) ‖w − x‖², where x are the parameters that the round began with.

    With μ = 0 it is FedAvg, bit for bit.

    Args:
        proximal: μ, 0 or more.
    """

    proximal: float = 0.01

    name = "fedprox"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.proximal < float("inf"):
            raise ValueError(f"proximal must be 0 or more, got {self.proximal}")

    def train(self, task: Task, client: Client) -> Trained:
        return client.train(task.tensors, task.turn, proximal=self.proximal)
