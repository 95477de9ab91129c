"""The default engine: all members in this process, one after the other, on one frozen base.

Adapters are swapped in and out of the same model, so that n members cost one base model plus their states.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from allmend.federation.engines import Answer
from allmend.federation.member import Member, MemberClient, OnStep
from allmend.models.adapters import Trainable
from allmend.recipe import Train
from allmend.strategy import State, Strategy, Task


@dataclass
class InProcessEngine:
    """`Engine` over members in this process.

    Attributes:
        trainable: the model that all members use in turns, holding the initial parameters at the start.
        records: the members.
        settings: of local training.
        on_step: told of every optimiser step.
    """

    trainable: Trainable
    records: Sequence[Member]
    settings: Train
    on_step: OnStep
    _clients: dict[str, MemberClient] = field(init=False)

    def __post_init__(self) -> None:
        initial = self.trainable.state()
        self._clients = {
            member.name: MemberClient(member, self.trainable, self.settings, initial, on_step=self.on_step)
            for member in sorted(self.records, key=lambda member: member.name)
        }

    @property
    def members(self) -> list[str]:
        return list(self._clients)

    def work(self, strategy: Strategy, tasks: Mapping[str, Task]) -> Iterator[Answer]:
        for name in sorted(tasks):
            yield Answer(name, strategy.work(tasks[name], self._clients[name]))

    def summed(self) -> None:
        return None

    def states(self) -> dict[str, State]:
        return {name: client.state for name, client in self._clients.items()}

    def restore(self, states: Mapping[str, State]) -> None:
        for name, client in self._clients.items():
            client.state = states.get(name, State())

    def close(self) -> None:
        pass
