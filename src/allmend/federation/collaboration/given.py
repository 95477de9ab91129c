"""A graph that is known beforehand, as a recipe writes it: `"de-1 de-2 1, de-1 fr-1 0.2, nl-1"`.

Each part is a pair and its weight, or the name of a member that works with nobody.
"""

from dataclasses import dataclass

import torch

from allmend.federation.collaboration.graph import number_of


@dataclass(frozen=True)
class GivenGraph:
    """Pairs that may work together, and what they begin with.

    Attributes:
        members: all that are named, in the order in which they are.
        weights: by pair, whose names are in alphabetical order.
    """

    members: tuple[str, ...]
    weights: dict[tuple[str, str], float]

    @classmethod
    def parsed(cls, text: str) -> "GivenGraph":
        """Of a text; an empty one names nobody.

        Raises:
            ValueError: a part that is neither, a pair of one member, a weight outside [0, 1], a pair with two weights.
        """
        weights: dict[tuple[str, str], float] = {}
        members: dict[str, None] = {}
        for part in (words for one in text.split(",") if (words := one.split())):
            if len(part) == 1:
                members[part[0]] = None
                continue
            pair, weight = _pair(part)
            if weights.setdefault(pair, weight) != weight:
                raise ValueError(f"graph has two weights for {pair[0]} and {pair[1]}: {weights[pair]:g} and {weight:g}")
            members |= dict.fromkeys(part[:2])
        return cls(tuple(members), weights)

    def among(self, names: list[str], first: int, otherwise: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers int64 [P] and weights [P] of pairs with one member at least from place `first` on.

        Args:
            names: of all members, in the graph's order.
            first: place of the first new one.
            otherwise: weight of every pair of a member that is not named here.
        """
        place = {name: position for position, name in enumerate(names)}
        told = [(place[i], place[j], w) for (i, j), w in self.weights.items() if i in place and j in place]
        given = torch.tensor(told, dtype=torch.float64).view(-1, 3)
        unnamed = torch.tensor([name not in self.members for name in names], dtype=torch.bool)
        # of the new ones alone: of all pairs there would be too many each time that somebody comes
        free = torch.cartesian_prod(torch.arange(first, len(names)), torch.arange(len(names)))
        free = free[(free[:, 0] != free[:, 1]) & unnamed[free].any(1)]
        i, j = torch.cat([given[:, :2].long(), free]).T.sort(0).values
        weights = torch.cat([given[:, 2], given.new_full((len(free),), otherwise)]).float()
        numbers, inverse = torch.unique(number_of(i, j)[j >= first], return_inverse=True)
        return numbers, weights.new_empty(len(numbers)).scatter(0, inverse, weights[j >= first])


def _pair(part: list[str]) -> tuple[tuple[str, str], float]:
    told = " ".join(part)
    try:
        one, other, weight = part[0], part[1], float(part[2])
    except (IndexError, ValueError):
        part = []
    if len(part) != 3:
        raise ValueError(f'graph has "{told}", neither a name nor two names and a weight, as in "north south 1"')
    if one == other:
        raise ValueError(f'graph has "{told}": a pair is of two members')
    if not 0 <= weight <= 1:
        raise ValueError(f'graph has "{told}": a weight lies in [0, 1]')
    return (min(one, other), max(one, other)), weight
