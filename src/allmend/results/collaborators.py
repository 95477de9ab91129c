"""Who worked with whom."""

from functools import cached_property

from pydantic import Field

from allmend.results.figures import Table

TOGETHER = 0.5
"""Weight above which two members count as partners."""


class Pair(Table):
    """Two members of a graph.

    Attributes:
        one, other: their places among the members, `one` before `other`.
        weight: in [0, 1].
        visits: probes that gave a product.
        last: round of the last of these; 0 without one.
        product: of the two gradients then; None without one.
    """

    one: int
    other: int
    weight: float
    visits: int = 0
    last: int = 0
    product: float | None = None


class ArmGraph(Table):
    """The graph of an arm in which members are pulled towards each other.

    Attributes:
        arm: name.
        members: in the order of first participation.
        round: after which the graph was like this.
        pairs: all of them.
        groups: of each member, by average linkage of what weights leave to 1, cut at a half.
        frozen: whether the graph no longer changed.
        step: by which a product moved a weight; None where too few were known to choose one.
        discarded: share of the squared size of all mixed adapters that their rank had no room for, in the last round.
        broken: probes of each member that gave no finite gradient.
    """

    arm: str
    members: tuple[str, ...]
    round: int
    pairs: tuple[Pair, ...]
    groups: tuple[int, ...]
    frozen: bool
    step: float | None = None
    discarded: float = 0.0
    broken: dict[str, int] = Field(default_factory=dict)

    def weights(self, place: int) -> dict[int, Pair]:
        """A member's pairs, by the other's place."""
        return self._of_member[place]

    @cached_property
    def _of_member(self) -> list[dict[int, Pair]]:
        """Once for all members: there are as many pairs as their number squared."""
        found: list[dict[int, Pair]] = [{} for _ in self.members]
        for pair in self.pairs:
            found[pair.one][pair.other] = found[pair.other][pair.one] = pair
        return found

    def partners(self, place: int) -> list[int]:
        """Those that a member works with, the closest first."""
        near = [(other, pair.weight) for other, pair in self.weights(place).items() if pair.weight > TOGETHER]
        return [other for other, _ in sorted(near, key=lambda one: -one[1])]

    @property
    def probed(self) -> float:
        """Share of pairs that were probed at all."""
        return sum(pair.visits > 0 for pair in self.pairs) / len(self.pairs) if self.pairs else 1.0

    @property
    def visits(self) -> float:
        """Mean over pairs."""
        return sum(pair.visits for pair in self.pairs) / len(self.pairs) if self.pairs else 0.0


class Grouped(Table):
    """A member and the group whose gradients pointed like its own.

    Attributes:
        member: name.
        group: counted from 0; -1 where it trains alone.
        own: mean cosine of its gradient with those of its group's others; None without any.
        next: the same with the other group for which it is largest; None where there is none.
    """

    member: str
    group: int
    own: float | None = None
    next: float | None = None


class ArmGroups(Table):
    """The groups of an arm in which changes are summed apart for each.

    Attributes:
        arm: name.
        round: after which they were found.
        members: group by group, those who train alone last.
    """

    arm: str
    round: int
    members: tuple[Grouped, ...]

    @property
    def count(self) -> int:
        """Of groups with a model."""
        return len({one.group for one in self.members if one.group >= 0})

    @property
    def alone(self) -> list[str]:
        """Members that are in no sum."""
        return [one.member for one in self.members if one.group < 0]


class CollaboratorsTable(Table):
    """`results/collaborators.json`: the graphs and the groups of a run, by arm."""

    arms: tuple[ArmGraph, ...]
    grouped: tuple[ArmGroups, ...] = ()
