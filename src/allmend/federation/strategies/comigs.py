"""CoMiGS: a mixture of experts of which members share some, the generalists, and keep the others, the specialists.

min over experts of Σ f_i^train(θ_G, θ_i^S, φ_i), with each router φ_i = argmin f_i^valid(θ_G, θ_i^S, ·). Members train
their experts and their router in turns (`learn.alternating`); only the generalists' changes leave them, and only in
sum. A second leg brings the new generalists back, so that after a round all members have the same.

Source: Fan, Messmer, Doikov, Jaggi, "On-Device Collaborative Language Modeling via a Mixture of Generalists and
Specialists", arXiv 2409.13931, ICML 2025.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

from allmend.federation.strategies.fedavg import FedAvg
from allmend.learn.alternating import Alternation, RouterSettings
from allmend.models.mixture import role
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
    shapes,
)

TRAIN, RETURN = range(2)
"""The legs."""

STALE = 2
"""Rounds that a member may have sat out before its experts' optimiser begins anew."""


class MixtureClient(Client, Protocol):
    """A member that trains a mixture."""

    def experts(self) -> Tensors: ...

    def alternate(
        self,
        start: Tensors,
        turn: Turn,
        router: RouterSettings,
        *,
        validation: float,
        learns_from: Literal["validation", "train"],
        experts: Tensors,
        routers: Tensors,
    ) -> Alternation: ...


@dataclass(frozen=True, kw_only=True)
class CoMiGS(FedAvg):
    """θ_G ← θ_G + Σ n_i (θ_G,i − θ_G) / Σ n_i over the members of the round; all else stays where it is.

    Args:
        validation: share of a member's records that its router learns from, and its experts do not.
        router_every: τ, steps of the experts before it is the routers' turn.
        router_steps: of the routers in a turn; with 0 the gates stay nearly equal, as they are in the beginning.
        router: what routers learn from: those records (`validation`), or, for comparison, the experts' (`train`),
            which leaves the same records out.
        router_lr: learning rate of the routers, the same in every step.
        balance: weight of a term that draws the gates towards equal use of the experts.
        weighting: whether members count by their records (`examples`), or all alike (`equal`).
    """

    validation: float = 0.1
    router_every: int = 30
    router_steps: int = 10
    router: Literal["validation", "train"] = "validation"
    router_lr: float = 2e-3
    balance: float = 0.0
    weighting: Literal["examples", "equal"] = "examples"

    name = "comigs"
    legs = 2
    shares = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.validation < 1:
            raise ValueError(f"validation must lie between 0 and 1, got {self.validation}")
        if self.router_every < 1:
            raise ValueError(f"router_every must be 1 or more, got {self.router_every}")
        for option in ("router_steps", "balance"):
            if not getattr(self, option) >= 0:
                raise ValueError(f"{option} must be 0 or more, got {getattr(self, option)}")
        if self.router not in ("validation", "train"):
            raise ValueError(f"router must be validation or train, got {self.router!r}")
        if not self.router_lr > 0:
            raise ValueError(f"router_lr must be above 0, got {self.router_lr}")
        if self.weighting not in ("examples", "equal"):
            raise ValueError(f"weighting must be examples or equal, got {self.weighting!r}")

    def declare(self) -> Declaration:
        times = "number of records" if self.weighting == "examples" else "1"
        return Declaration(
            sent="the generalists",
            beyond="experts and routers have optimisers and records of their own",
            summed={
                "update": f"change of the generalists times {times}",
                "weight": "number of training records" if self.weighting == "examples" else "1 for each member",
                "loss": f"training loss times {times}",
            },
            kept="specialists, routers and their optimisers, and the records that routers learn from",
            numbers=frozenset({"weight", "loss"}),
        )

    def layout(self, initial: Tensors, leg: int = 0) -> Layout:
        return shapes(grouped("update", generalists_of(initial))) if leg == TRAIN else {}

    def init(self, initial: Tensors) -> State:
        return State(grouped("model", generalists_of(initial)))

    def plan(self, state: State, turn: Turn, members: Sequence[str]) -> dict[str, Task]:
        if turn.leg == TRAIN:
            return super().plan(state, turn, members)
        # to all, so that who sat this round out has what the others have
        return {name: Task(turn, of_group("model", state.tensors)) for name in sorted(members)}

    def work(self, task: Task, client: Client) -> Reply:
        if task.turn.leg == RETURN:
            client.state.tensors = client.state.tensors | grouped("generalist", task.tensors)
            return Reply()
        member = cast(MixtureClient, client)
        start = (of_group("own", client.state.tensors) or member.experts()) | task.tensors
        fresh = task.turn.round - int(client.state.facts.get("trained", task.turn.round)) > STALE
        found = member.alternate(
            start,
            task.turn,
            RouterSettings(self.router_every, self.router_steps, self.router_lr, self.balance),
            validation=self.validation,
            learns_from=self.router,
            experts={} if fresh else of_group("experts", client.state.tensors),
            routers=of_group("routers", client.state.tensors),
        )
        own = {name: tensor for name, tensor in found.tensors.items() if name not in task.tensors}
        client.state.tensors = (
            client.state.tensors
            | grouped("own", own)
            | grouped("experts", found.experts)
            | grouped("routers", found.routers)
        )
        client.state.facts["trained"] = task.turn.round
        weight = float(client.examples) if self.weighting == "examples" else 1.0
        update = {name: (found.tensors[name] - tensor) * weight for name, tensor in task.tensors.items()}
        targets = sum(step.targets for step in found.steps)
        loss = sum((step.loss or 0.0) * step.targets for step in found.steps) / max(targets, 1)
        return Reply(grouped("update", update), {"weight": weight, "loss": loss * weight})

    def combine(self, state: State, turn: Turn, sums: Sums, seen: Mapping[str, Seen]) -> State:
        return super().combine(state, turn, sums, seen) if turn.leg == TRAIN else state

    def revealed(self, task: Task, reply: Reply) -> Tensors | None:
        """None: without its specialists and its router, a member's generalists are no model."""
        return None

    def shared(self, state: State) -> Tensors | None:
        return None

    def personal(self, state: State, client: State) -> Tensors | None:
        """Its specialists and router with the generalists of the last round."""
        own = of_group("own", client.tensors)
        return own | of_group("generalist", client.tensors) if own else None


def generalists_of(tensors: Tensors) -> Tensors:
    """What members share of a mixture's state."""
    return {name: tensor for name, tensor in tensors.items() if role(name) == "generalist"}
