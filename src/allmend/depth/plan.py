"""Plans: which layers of a decoder run, in what order, and which of them side by side."""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol

from allmend.errors import UserError
from allmend.run import write_atomic

Together = Literal["parallel", "parallel_sum", "merge"]
"""What becomes of the layers of a step that has several.

`parallel`: every perceptron sees the sum of all attention updates. `parallel_sum`: each sees that of its own attention
alone. `merge`: one layer with the mean of their weights.
"""


@dataclass(frozen=True)
class Step:
    """What a decoder does in one go: one layer, or several together."""

    layers: tuple[int, ...]
    together: Together = "parallel"


class Intervention(Protocol):
    """A way of running a decoder's layers otherwise than one after the other."""

    def steps(self, layers: int) -> tuple[Step, ...]:
        """What a decoder of so many layers does, one step after the other."""


@dataclass(frozen=True)
class Plan:
    """Groups of layers: a group runs side by side, groups run one after the other.

    Attributes:
        groups: of layer indices; a layer that is in none does not run.
    """

    groups: tuple[tuple[int, ...], ...]

    @property
    def depth(self) -> int:
        """Sequential steps."""
        return len(self.groups)

    @property
    def widths(self) -> list[int]:
        return [len(group) for group in self.groups]

    @property
    def together(self) -> tuple[tuple[int, ...], ...]:
        """Groups of more than one layer."""
        return tuple(group for group in self.groups if len(group) > 1)

    def steps(self, layers: int) -> tuple[Step, ...]:
        """One for each group, as they stand: also in another order than the layers have."""
        seen = [layer for group in self.groups for layer in group]
        if bad := [layer for layer in seen if not 0 <= layer < layers]:
            raise UserError(f"layer {bad[0]} is not one of the model's {layers} (0 to {layers - 1})")
        if twice := [layer for layer in seen if seen.count(layer) > 1]:
            raise UserError(f"layer {twice[0]} runs twice")
        return tuple(Step(group) for group in self.groups)

    def check(self, layers: int, *, where: str | Path | None = None) -> None:
        """See that the plan can be folded: it covers every layer of a model once, in order, in groups of neighbours.

        Raises:
            UserError: it does not; the message has the group that is wrong.
        """
        seen: set[int] = set()
        for group in self.groups:
            named = list(group)
            if not group:
                raise UserError("a group of the plan is empty", where=where)
            if outside := [layer for layer in group if not 0 <= layer < layers]:
                raise UserError(
                    f"group {named}: layer {outside[0]} is not one of the model's {layers} (0 to {layers - 1})",
                    where=where,
                    hint="A plan is for the model that it was searched on.",
                )
            if twice := [layer for layer in group if layer in seen]:
                raise UserError(f"group {named}: layer {twice[0]} is in the plan twice", where=where)
            if any(after != before + 1 for before, after in pairwise(group)):
                raise UserError(
                    f"group {named}: its layers are not neighbours",
                    where=where,
                    hint="Layers run side by side with the next ones only, in their order.",
                )
            seen.update(group)
        if missing := sorted(set(range(layers)) - seen):
            raise UserError(
                f"layer {missing[0]} is in no group of the plan"
                + (f", nor are {len(missing) - 1} others" if missing[1:] else ""),
                where=where,
                hint="Every layer stands in a group, those that stay as they are alone in theirs. Dropping layers is "
                "for comparison only (`allmend depth scan`).",
            )
        if any(after[0] != before[-1] + 1 for before, after in pairwise(self.groups)):
            raise UserError("the groups of the plan are not in the order of the layers", where=where)


def stretch_plan(layers: int, start: int, end: int, size: int = 2) -> Plan:
    """The layers start … end − 1 in groups of `size`; a remainder and all other layers stay alone.

    Raises:
        ValueError: the stretch is not within the layers, or a group has no layer.
    """
    if not 0 <= start <= end <= layers:
        raise ValueError(f"{start} to {end} is no stretch of {layers} layers")
    if size < 1:
        raise ValueError(f"a group has 1 layer or more, not {size}")
    whole = start + (end - start) // size * size
    together = [tuple(range(first, first + size)) for first in range(start, whole, size)]
    return Plan((*_alone(range(start)), *together, *_alone(range(whole, layers))))


def pairs_plan(layers: int, firsts: Iterable[int]) -> Plan:
    """Pairs (i, i + 1) for each i of `firsts`, and all other layers alone.

    Raises:
        ValueError: two pairs overlap, or one is not within the layers.
    """
    groups: list[tuple[int, ...]] = []
    for first in sorted(firsts):
        done = groups[-1][-1] + 1 if groups else 0
        if first < done or first + 1 >= layers:
            raise ValueError(f"layers {first} and {first + 1} of {layers} are no pair of their own")
        groups += [*_alone(range(done, first)), (first, first + 1)]
    return Plan((*groups, *_alone(range(groups[-1][-1] + 1 if groups else 0, layers))))


def _alone(layers: Iterable[int]) -> list[tuple[int, ...]]:
    return [(layer,) for layer in layers]


@dataclass(frozen=True)
class Prune:
    """Leave out the layers start … end − 1."""

    start: int
    end: int

    def steps(self, layers: int) -> tuple[Step, ...]:
        return tuple(Step((layer,)) for layer in range(layers) if not self.start <= layer < self.end)


@dataclass(frozen=True)
class Drop:
    """Leave out these layers."""

    layers: frozenset[int]

    def steps(self, layers: int) -> tuple[Step, ...]:
        return tuple(Step((layer,)) for layer in range(layers) if layer not in self.layers)


@dataclass(frozen=True)
class Shuffle:
    """Run the layers start … end − 1 in an order that `seed` decides."""

    start: int
    end: int
    seed: int = 0

    def steps(self, layers: int) -> tuple[Step, ...]:
        stretch = list(range(self.start, self.end))
        random.Random(self.seed).shuffle(stretch)
        order = [*range(self.start), *stretch, *range(self.end, layers)]
        return tuple(Step((layer,)) for layer in order)


@dataclass(frozen=True)
class Stretch:
    """The layers start … end − 1 in one step: side by side, or merged."""

    start: int
    end: int
    together: Together

    def steps(self, layers: int) -> tuple[Step, ...]:
        one = [Step(tuple(range(self.start, self.end)), self.together)] if self.end > self.start else []
        before, after = (_alone(some) for some in (range(self.start), range(self.end, layers)))
        return (*map(Step, before), *one, *map(Step, after))


def write_plan(path: Path, plan: Plan, facts: dict[str, object] | None = None) -> None:
    """Write a plan, and what it was found with, as JSON.

    Raises:
        UserError: the operating system refused.
    """
    body = {"format": 1, "groups": [list(group) for group in plan.groups], **(facts or {})}
    write_atomic(path, (json.dumps(body, indent=1) + "\n").encode())


def read_plan(path: Path) -> Plan:
    """A plan as `write_plan` left it, or as somebody wrote it: `{"groups": [[0], [1, 2], …]}`.

    Raises:
        UserError: the file cannot be read, or is no plan.
    """
    try:
        body = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", where=path) from error
    except ValueError as error:
        raise UserError(f"is not JSON: {error}", where=path, hint=_HINT) from error
    groups = body.get("groups") if isinstance(body, dict) else None
    if not isinstance(groups, list) or not all(_is_group(group) for group in groups):
        raise UserError("holds no plan: `groups` is not a list of lists of layer numbers", where=path, hint=_HINT)
    return Plan(tuple(tuple(group) for group in groups))


def _is_group(group: object) -> bool:
    return isinstance(group, Sequence) and all(type(layer) is int for layer in group)


_HINT = "`allmend depth search MODEL --out DIR` writes plan.json."
