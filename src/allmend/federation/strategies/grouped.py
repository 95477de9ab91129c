"""FedAvg within groups that are told: what strategies that find groups could reach at best, if the groups are right."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from allmend.federation.strategies.local import Local
from allmend.federation.strategies.several import RETURN, SeveralModels
from allmend.strategy import Client, Reply, State, Task, Turn, grouped


@dataclass(frozen=True, kw_only=True)
class Grouped(SeveralModels):
    """A model for each group, averaged over its members; `participation` is of each group's.

    Args:
        groups: names of members, those of a group with spaces between them, groups with commas: `"de-1 de-2, fr-1"`.
        others: what comes of members of no group: the run is refused (`refuse`), or they train as in `local` (`alone`).
    """

    groups: str = ""
    others: Literal["refuse", "alone"] = "refuse"

    name = "grouped"
    choice = "the shared parameters of the member's group"
    stays = "the model and the optimiser of a member of no group"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.others not in ("refuse", "alone"):
            raise ValueError(f"others must be refuse or alone, got {self.others!r}")
        if not self.members:
            raise ValueError('groups names nobody: give each group\'s members, such as "de-1 de-2, fr-1 fr-2"')
        if twice := [name for name, times in Counter(self.members).items() if times > 1]:
            raise ValueError(f"groups names {', '.join(twice)} twice: a client is in one group")

    @property
    def parted(self) -> list[list[str]]:
        """Names of members, group by group."""
        return [names for part in self.groups.split(",") if (names := part.split())]

    @property
    def members(self) -> list[str]:
        """All that are in a group."""
        return [name for names in self.parted for name in names]

    @property
    def count(self) -> int:
        return len(self.parted)

    def check(self, clients: Sequence[str]) -> None:
        """See that the groups are of these clients.

        Raises:
            ValueError: a name is no client's, or a client is in no group and none is asked to train alone.
        """
        if unknown := sorted(set(self.members) - set(clients)):
            raise ValueError(f"groups names {', '.join(unknown)}, and there are the clients {', '.join(clients)}")
        if self.others == "refuse" and (left := sorted(set(clients) - set(self.members))):
            raise ValueError(f'{", ".join(left)}: in no group. Add to groups, or set others = "alone"')

    def plan(self, state: State, turn: Turn, members: Sequence[str]) -> dict[str, Task]:
        tasks: dict[str, Task] = {}
        last = turn.leg == RETURN and turn.round == turn.rounds
        for group, names in enumerate(self.parted):
            there = [name for name in names if name in members]
            drawn = there if turn.leg == RETURN else list(super().plan(state, turn, there)) if there else []
            model = grouped(f"model-{group}", self.model(state.tensors, group))
            tasks |= dict.fromkeys(drawn, Task(turn, {} if turn.leg == RETURN and not last else model))
        return tasks | {name: Task(turn) for name in sorted(set(members) - set(self.members))}

    def work(self, task: Task, client: Client) -> Reply:
        if client.name not in self.members:
            return Reply() if task.turn.leg == RETURN else Local().work(task, client)
        group = next(group for group, names in enumerate(self.parted) if client.name in names)
        model = self.model(task.tensors, group)
        if task.turn.leg == RETURN:
            client.state.tensors = client.state.tensors | grouped("model", model)
            return Reply()
        trained = client.train(model, task.turn)
        client.state.tensors = client.state.tensors | grouped("model", trained.tensors)
        return self.reply(group, model, trained, client)

    def fewest(self, clients: Sequence[str]) -> int:
        """Members that the smallest group has in a round."""
        sizes = [sum(name in clients for name in names) for names in self.parted]
        return min(max(1, round(self.participation * size)) for size in sizes)
