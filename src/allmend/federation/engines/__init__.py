"""Who carries the messages between coordinator and members. Strategies do not know which."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from allmend.strategy import Reply, State, Strategy, Task


@dataclass(frozen=True)
class Answer:
    """A member's reply."""

    member: str
    reply: Reply


class Engine(Protocol):
    """Carries tasks to members and replies back, and keeps the members' states."""

    @property
    def members(self) -> list[str]:
        """Names, sorted."""
        ...

    def work(self, strategy: Strategy, tasks: Mapping[str, Task]) -> Iterator[Answer]:
        """Have every member that has a task work on it; replies in the order of names."""
        ...

    def states(self) -> dict[str, State]:
        """The members' states, by name."""
        ...

    def restore(self, states: Mapping[str, State]) -> None:
        """Put back what `states` gave; members that are not named start afresh."""
        ...

    def close(self) -> None:
        """Let go of processes and connections."""
        ...
