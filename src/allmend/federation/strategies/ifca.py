"""IFCA: several models, of which every member trains the one that has the lowest loss on its own records.

Source: Ghosh, Chung, Yin, Ramchandran, "An Efficient Framework for Clustered Federated Learning", NeurIPS 2020, arXiv
2006.04088, algorithm 1 with model averaging. Ours is the start: factors of LoRA begin with a product of zero, so that
all models are equal and no loss tells them apart, and the first round's groups are drawn by lot.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch

from allmend.federation.strategies.several import RETURN, SeveralModels
from allmend.models.tensors import Tensors
from allmend.strategy import Client, Reply, State, Task, Turn, grouped


class LosingClient(Client, Protocol):
    """A member whose loss can be asked for anywhere."""

    def loss(self, at: Tensors, turn: Turn, *, records: int | None = None) -> float: ...


@dataclass(frozen=True, kw_only=True)
class IFCA(SeveralModels):
    """Groups that members find by themselves: how good they are depends on the draw, so take several seeds.

    Args:
        groups: models, 1 or more; with 1 it is FedAvg.
        probe_records: training records whose loss is asked for under each model, at most; 0: all.
    """

    groups: int = 2
    probe_records: int = 0

    name = "ifca"
    drawn = "a member's loss decides which model it trains"
    choice = "all models, of which the member takes the one that has the lowest loss on its training records"
    stays = "which of them that is"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups < 1:
            raise ValueError(f"groups must be 1 or more, got {self.groups}")
        if self.probe_records < 0:
            raise ValueError(f"probe_records must be 0 or more, got {self.probe_records}")

    @property
    def count(self) -> int:
        return self.groups

    def plan(self, state: State, turn: Turn, members: Sequence[str]) -> dict[str, Task]:
        if turn.leg == RETURN:
            models = state.tensors if turn.round == turn.rounds else {}
            return {name: Task(turn, dict(models)) for name in sorted(members)}
        drawn = list(super().plan(state, turn, members))
        if turn.round > 1:
            return {name: Task(turn, dict(state.tensors)) for name in drawn}
        # the models are all the same still
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.groups) % 2**63)
        lots = {drawn[place]: lot for lot, place in enumerate(torch.randperm(len(drawn), generator=generator).tolist())}
        return {name: Task(turn, dict(state.tensors), {"model": lots[name] % self.groups}) for name in drawn}

    def work(self, task: Task, client: Client) -> Reply:
        if not task.tensors:
            return Reply()
        models = [self.model(task.tensors, group) for group in range(self.groups)]
        group = int(task.facts["model"]) if "model" in task.facts else self._lowest(models, task.turn, client)
        client.state.facts["model"] = group
        if task.turn.leg == RETURN:
            client.state.tensors = client.state.tensors | grouped("model", models[group])
            return Reply()
        trained = client.train(models[group], task.turn)
        client.state.tensors = client.state.tensors | grouped("model", trained.tensors)
        return self.reply(group, models[group], trained, client)

    def _lowest(self, models: Sequence[Tensors], turn: Turn, client: Client) -> int:
        """The place of the model that a member loses least under, the first of several."""
        if len(models) == 1:
            return 0
        member = cast(LosingClient, client)
        losses = [member.loss(model, turn, records=self.probe_records or None) for model in models]
        return losses.index(min(losses))
