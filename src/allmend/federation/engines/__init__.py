"""Who carries the messages between coordinator and members. Strategies do not know which."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from allmend.strategy import Reply, State, Strategy, Sums, Task


@dataclass(frozen=True)
class Answer:
    """A member's reply.

    Attributes:
        member: whose.
        reply: without what is summed out of sight.
        hidden: bytes of that.
    """

    member: str
    reply: Reply
    hidden: int = 0


class Engine(Protocol):
    """Carries tasks to members and replies back, and keeps the members' states."""

    @property
    def members(self) -> list[str]:
        """Names, sorted."""
        ...

    def work(self, strategy: Strategy, tasks: Mapping[str, Task]) -> Iterator[Answer]:
        """Have every member that has a task work on it; replies in the order of names."""
        ...

    def summed(self) -> tuple[Sums, list[str]] | None:
        """After `work`: sums that were formed without a look at their parts, and of whose; None where the replies hold
        the parts.

        Raises:
            UserError: too few members are left for a sum.
        """
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
