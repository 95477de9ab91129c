"""The scan: what it costs to run a stretch of layers otherwise, for every stretch and kind."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

from allmend.data.windows import Windows
from allmend.depth.decoder import Decoder
from allmend.depth.log import Log
from allmend.depth.measure import Candidate, Measured, measure, sequential
from allmend.depth.plan import Intervention, Prune, Shuffle, Stretch, stretch_plan
from allmend.errors import UserError

Kind = Literal["pairs", "triples", "parallel", "parallel_sum", "merge", "prune", "shuffle"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def change_of(kind: Kind, layers: int, start: int, end: int, *, seed: int = 0) -> Intervention:
    """The layers start … end − 1 of a model run otherwise."""
    match kind:
        case "pairs":
            return stretch_plan(layers, start, end, 2)
        case "triples":
            return stretch_plan(layers, start, end, 3)
        case "prune":
            return Prune(start, end)
        case "shuffle":
            return Shuffle(start, end, seed)
        case _:
            return Stretch(start, end, kind)


_STEP = {"pairs": 2, "triples": 3}
"""Lengths of stretches that leave no remainder."""


def stretches(kind: Kind, layers: int, longest: int) -> Iterator[tuple[int, int]]:
    """Start and end of every stretch that is worth a look, none longer than `longest`."""
    step = _STEP.get(kind, 1)
    shortest = 1 if kind == "prune" else max(2, step)
    most = layers - 1 if kind == "prune" else layers  # something has to run
    for length in range(shortest, min(longest, most) + 1, step):
        for start in range(layers - length + 1):
            yield start, start + length


def candidates(kinds: Sequence[Kind], layers: int, longest: int, *, seed: int = 0) -> list[Candidate]:
    """Every stretch of every kind; those of one kind and length are rivals.

    Raises:
        UserError: a kind is unknown.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"{unknown[0]!r} is no kind of scan", where="--kinds", hint=f"Kinds are {', '.join(KINDS)}.")
    return [
        Candidate(kind, start, end, change_of(kind, layers, start, end, seed=seed), f"{kind} of {end - start}")
        for kind in dict.fromkeys(kinds)
        for start, end in stretches(kind, layers, longest)
    ]


def scan(
    model: Any,
    windows: Windows,
    *,
    kinds: Sequence[Kind] = ("pairs", "prune"),
    longest: int = 8,
    seed: int = 0,
    log: Log | None = None,
    on_share: Callable[[float], None] = lambda share: None,
) -> dict[Candidate, Measured]:
    """Measure every stretch of every kind, and the model as it is.

    A stretch that is clearly behind another one of its kind and length is measured on the windows so far only.

    Args:
        model: as `architectures.layers_of` asks for.
        windows: the text.
        kinds: of intervention.
        longest: stretch, in layers.
        seed: of `shuffle`.
        log: where measurements are kept, and gone on from.
        on_share: told the share of the work that is done.

    Raises:
        UserError: the model cannot be rearranged, or a kind is unknown.
    """
    decoder = Decoder(model)
    plain = sequential(len(decoder.layers))
    every = [plain, *candidates(kinds, len(decoder.layers), longest, seed=seed)]
    return measure(
        decoder,
        windows,
        every,
        keep=3,
        known=log.known(every, len(decoder.layers)) if log else None,
        after_window=lambda _, found: log.save(found, found[plain]) if log else None,
        on_candidate=on_share,
    )
