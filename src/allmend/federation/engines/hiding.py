"""Sums out of sight in a simulation: what members only sum is added up as integers, and nothing else looks at it.

It is what secure aggregation between machines comes to: the same integers, so the same model, but for the masks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from allmend.errors import UserError
from allmend.federation.engines import Answer, Engine
from allmend.federation.privacy.vectors import CodedSum, VectorCode, without_sums
from allmend.learn.noise import NoiseSource
from allmend.strategy import State, Strategy, Sums, Task, Turn


@dataclass
class HidingEngine:
    """Another engine whose replies come without their summed parts.

    Attributes:
        inner: does the work.
        codes: of the replies' vectors, for each leg of a round.
        rounding: random numbers for a member's rounding and noise in a leg.
        fewest: members that a sum must be over.
    """

    inner: Engine
    codes: Sequence[VectorCode]
    rounding: Callable[[Turn, str], NoiseSource]
    fewest: int
    _sum: CodedSum | None = field(init=False, default=None)
    _worked: list[str] = field(init=False, default_factory=list)

    @property
    def members(self) -> list[str]:
        return self.inner.members

    def work(self, strategy: Strategy, tasks: Mapping[str, Task]) -> Iterator[Answer]:
        leg = next((task.turn.leg for task in tasks.values()), 0)
        self._sum, self._worked = CodedSum(self.codes[leg]), []
        for answer in self.inner.work(strategy, tasks):
            turn = tasks[answer.member].turn
            try:
                size = self._sum.add(answer.reply, self.rounding(turn, answer.member))
            except ValueError as error:
                raise UserError(
                    f"the reply cannot be used: {error}",
                    where=f"client {answer.member!r}, round {turn.round}",
                    hint="Lower train.learning_rate if its training diverged.",
                ) from error
            self._worked.append(answer.member)
            yield Answer(answer.member, without_sums(answer.reply), hidden=size)

    def summed(self) -> tuple[Sums, list[str]] | None:
        assert self._sum is not None, "work comes first"
        if self._sum.members < self.fewest:
            raise UserError(
                f"a sum over {self._sum.members} members is not opened, and {self.fewest} are the fewest",
                where="privacy.secure_aggregation",
                hint="Let more members take part in a round.",
            )
        return self._sum.sums(), list(self._worked)

    def states(self) -> dict[str, State]:
        return self.inner.states()

    def restore(self, states: Mapping[str, State]) -> None:
        self.inner.restore(states)

    def close(self) -> None:
        self.inner.close()
