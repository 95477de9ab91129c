"""The search: at each depth the best stretch of a kind, or the best pairs anywhere."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from allmend.data.windows import Windows
from allmend.depth.additive import best_firsts
from allmend.depth.decoder import Decoder
from allmend.depth.log import Log
from allmend.depth.measure import Candidate, Measured, added, measure, sequential
from allmend.depth.plan import Intervention, Plan, pairs_plan
from allmend.depth.scanning import Kind, change_of, stretches
from allmend.errors import UserError
from allmend.results import Estimate

CHEAP = 3
"""Pairs outside a plan that are tried in the place of each of its pairs."""

SPARE = 4
"""Pairs beyond those that are wanted whose costs are measured to the end."""


@dataclass(frozen=True)
class Result:
    """The best way found to run a model at some depth.

    Attributes:
        kind: `free`, or a kind of scan.
        candidate: the way.
        measured: on the text of the search.
        added: to the loss of the model as it is, on that text (nats).
        predicted: the sum of the single pairs' costs; None where they were not measured.
    """

    kind: str
    candidate: Candidate
    measured: Measured
    added: Estimate
    predicted: float | None = None

    @property
    def depth(self) -> int:
        return self.measured.depth

    @property
    def plan(self) -> Plan:
        """Of a way that is a plan; others, such as leaving layers out, cannot be folded."""
        change = self.candidate.change
        if not isinstance(change, Plan):
            raise TypeError(f"{self.kind} is for comparison: there is no plan to fold")
        return change


class Search:
    """Measurements of one model on one text, each made once.

    Args:
        model: as `architectures.layers_of` asks for.
        windows: the text.
        log: where measurements are kept, and gone on from.
        on_step: told in words what is measured, and the share of it that is done.
    """

    def __init__(
        self,
        model: Any,
        windows: Windows,
        *,
        log: Log | None = None,
        on_step: Callable[[str, float], None] = lambda words, share: None,
    ) -> None:
        self.decoder, self.windows = Decoder(model), windows
        self._log, self._on_step = log, on_step
        self.layers = len(self.decoder.layers)
        self._plain = sequential(self.layers)
        self._found: dict[Intervention, Measured] = {}
        self._costs: dict[int, list[float]] = {}

    @property
    def plain(self) -> Measured:
        """The model as it is."""
        return self.measured([self._plain], "as it is")[self._plain]

    def measured(self, candidates: Sequence[Candidate], words: str, *, keep: int = 1) -> dict[Candidate, Measured]:
        """Measure what is not yet measured; rivals that fall behind are dropped."""
        # dropped among other rivals is not dropped among these
        known = {
            one: replace(self._found[one.change], dropped=False) for one in candidates if one.change in self._found
        }
        if self._log:
            known = self._log.known(candidates, self.layers) | known

        def save(window: int, found: object) -> None:
            if self._log and window % 4 == 0:
                self._keep(known | measured_now)

        measured_now: dict[Candidate, Measured] = {}
        measured_now |= measure(
            self.decoder,
            self.windows,
            candidates,
            known=known,
            keep=keep,
            after_window=save,
            on_candidate=lambda share: self._on_step(words, share),
        )
        self._keep(measured_now)
        return measured_now

    def _keep(self, found: dict[Candidate, Measured]) -> None:
        self._found |= {one.change: measured for one, measured in found.items()}
        if self._log and self._plain.change in self._found:
            self._log.save(found, self._found[self._plain.change])

    def result(self, kind: str, one: Candidate, measured: Measured, predicted: float | None = None) -> Result:
        return Result(kind, one, measured, added(measured, self.plain), predicted)

    def costs(self, wanted: int) -> list[float]:
        """Of each pair of neighbours alone, what it adds to the loss (nats).

        Those that cannot be among the `wanted` best are measured roughly.
        """
        if wanted not in self._costs:
            plain = self.plain
            pairs = [
                Candidate("pairs", first, first + 2, pairs_plan(self.layers, [first]), "single pairs")
                for first in range(self.layers - 1)
            ]
            found = self.measured(pairs, "single pairs", keep=2 * wanted + SPARE)
            self._costs[wanted] = [added(found[pair], plain).value for pair in pairs]
        return self._costs[wanted]

    def contiguous(self, kind: Kind, depth: int) -> Result | None:
        """The best stretch of a kind that leaves so many steps; None if no stretch does."""
        some = [
            Candidate(kind, start, end, change, f"{kind} to {depth}")
            for start, end in stretches(kind, self.layers, self.layers)
            if len((change := change_of(kind, self.layers, start, end)).steps(self.layers)) == depth
        ]
        if not some:
            return None
        self.plain  # noqa: B018  # before the log writes what is added to it
        found = self.measured(some, f"{kind}, {depth} steps")
        best = _best(found)
        return self.result(kind, best, found[best])

    def free(self, pairs: int, *, wanted: int | None = None) -> Result:
        """The best disjoint pairs anywhere: those with the smallest sum of single costs, then local moves.

        Args:
            pairs: how many.
            wanted: pairs of the largest plan that will be asked for, whose costs are then measured at once.
        """
        costs = self.costs(max(pairs, wanted or 0))
        firsts = best_firsts(costs, pairs)
        name = f"free, {self.layers - pairs} steps"
        best = self._free(firsts, name)
        found = self.measured([best], name)
        for place in range(pairs):
            firsts = _firsts(best)
            others = (self._free(moved, name) for moved in _moves(firsts, place, costs))
            found = self.measured([best, *others], name)
            best = _best(found)
        predicted = sum(costs[first] for first in _firsts(best))
        return self.result("free", best, found[best], predicted)

    def _free(self, firsts: Sequence[int], rivals: str) -> Candidate:
        return Candidate("free", min(firsts), max(firsts) + 2, pairs_plan(self.layers, firsts), rivals)


def _best(found: dict[Candidate, Measured]) -> Candidate:
    return min((one for one in found if not found[one].dropped), key=lambda one: found[one].loss)


def _firsts(one: Candidate) -> tuple[int, ...]:
    assert isinstance(one.change, Plan)
    return tuple(group[0] for group in one.change.together)


def _moves(firsts: Sequence[int], place: int, costs: Sequence[float]) -> Iterator[tuple[int, ...]]:
    """Plans with one pair shifted by a layer, or exchanged for one of the cheapest that are free."""
    rest = [first for number, first in enumerate(firsts) if number != place]
    free = [
        first for first in range(len(costs)) if first != firsts[place] and all(abs(first - other) > 1 for other in rest)
    ]
    near = [first for first in free if abs(first - firsts[place]) == 1]
    cheap = sorted((first for first in free if first not in near), key=lambda first: costs[first])[:CHEAP]
    yield from (tuple(sorted([*rest, first])) for first in (*near, *cheap))


def pair_costs(model: Any, windows: Windows) -> list[float]:
    """What each pair of neighbours adds to the loss when it alone runs side by side (nats a token).

    Args:
        model: as `architectures.layers_of` asks for.
        windows: the text.

    Raises:
        UserError: the model cannot be rearranged.
    """
    one = Search(model, windows)
    return one.costs(one.layers)


def search(
    model: Any,
    windows: Windows,
    *,
    kind: Kind | Literal["free"] = "pairs",
    depth: int | None = None,
    max_loss: float | None = None,
    log: Log | None = None,
    on_step: Callable[[str, float], None] = lambda words, share: None,
    on_result: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """The best way to run a model at each depth, from one step less down to `depth`, or as long as the loss allows.

    Args:
        model: as `architectures.layers_of` asks for.
        windows: the text.
        kind: `free` for pairs anywhere, or a kind of scan for the best stretch.
        depth: sequential steps to come down to.
        max_loss: what may be added to the loss (nats); the last result is the first that adds more, if one does.
        log: where measurements are kept, and gone on from.
        on_step: told in words what is measured, and the share of it that is done.
        on_result: told each result as it is found.

    Raises:
        UserError: there is no such depth, or the model cannot be rearranged.
    """
    one = Search(model, windows, log=log, on_step=on_step)
    least = least_depth(one.layers, kind)
    last = least if depth is None else depth
    if not least <= last < one.layers:
        raise UserError(
            f"a depth of {last} cannot be reached: the model has {one.layers} layers, and {kind} leave {least} to "
            f"{one.layers - 1} steps",
            where="--depth",
        )
    results: list[Result] = []
    for steps in range(one.layers - 1, last - 1, -1):
        wanted = one.layers - last if depth is not None else None
        found = one.free(one.layers - steps, wanted=wanted) if kind == "free" else one.contiguous(kind, steps)
        if found is None:
            continue
        results.append(found)
        on_result(found)
        if max_loss is not None and found.added.value > max_loss:
            break
    return results


def least_depth(layers: int, kind: str) -> int:
    """The fewest steps that a kind leaves."""
    match kind:
        case "free" | "pairs":
            return (layers + 1) // 2
        case "triples":
            return layers // 3 + layers % 3
        case _:
            return 1
