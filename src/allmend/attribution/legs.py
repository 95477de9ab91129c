"""Federated influence over an engine: what travels in each leg, as integers behind masks where sums are hidden."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from allmend.data.canaries import canary_of
from allmend.federation.engines import Engine
from allmend.federation.member import Member
from allmend.federation.privacy.vectors import VectorCode
from allmend.federation.rounds import Traffic, play_leg
from allmend.influence.fastest_inverse import AUTO, fastest
from allmend.influence.federated import SCORES, SIZES, TARGET, FederatedInfluence
from allmend.influence.inverses import INVERSES
from allmend.influence.methods import Directions
from allmend.influence.summed_curvature import SummedBlocks, SummedCorrections, SummedCurvature
from allmend.models.tensors import Tensors
from allmend.recipe import HELD_OUT, Influence
from allmend.strategy import State, Sums, Turn

LARGEST = 2.0**22
"""Of a squared size, or of a target's summed gradient; what is larger is refused."""

SIZE_LEVELS, PART_LEVELS = 2**52, 2**30
"""From 0 to the largest value. Sizes and targets span many orders of magnitude; what a curvature sums comes in units of
sizes and lies in [−1, 1], and so does the sum of all."""


def strategy_of(
    settings: Influence, *, hidden: bool, targets: int = 1, on_tokens: Callable[[int], None] = lambda tokens: None
) -> FederatedInfluence:
    """The recipe's `[influence]` as a strategy.

    Args:
        settings: the section.
        hidden: whether sums are formed out of sight, of integers.
        targets: how many there are.
        on_tokens: told the tokens of each pass.
    """
    return FederatedInfluence(
        held_out=settings.target == HELD_OUT,
        curvature=_curvature_of(settings, targets),
        modules=settings.modules,
        clip=settings.clip,
        min_records=settings.min_records,
        reveal=settings.reveal,
        step=LARGEST / SIZE_LEVELS if hidden else 0.0,
        on_tokens=on_tokens,
    )


def _curvature_of(settings: Influence, targets: int) -> SummedCurvature | None:
    if settings.method == "gfim":
        inverse = fastest(torch.device("cpu")) if settings.inverse == AUTO else settings.inverse
        return SummedBlocks(settings.damping, INVERSES[inverse])
    return SummedCorrections(settings.damping, targets) if settings.method == "datainf" else None


def codes_of(strategy: FederatedInfluence, initial: Tensors, members: int) -> tuple[VectorCode, ...]:
    """How the replies of each leg become integers.

    Args:
        strategy: says what each leg sums.
        initial: the parameters that learn.
        members: the most in a sum.
    """
    declared = strategy.declare()
    numbers = sorted(set(declared.summed) & declared.numbers)

    def code(leg: int, name: str) -> VectorCode:
        layout = strategy.layout(initial, leg)
        if name == SCORES:
            return VectorCode(layout, numbers, 1.0, members)
        if name in (SIZES, TARGET):
            return VectorCode(layout, numbers, LARGEST, members, levels=SIZE_LEVELS)
        # one summand is room enough: the sum of all members' parts lies in [−1, 1] too
        return VectorCode(layout, numbers, 1.0, 1, bits=32, levels=PART_LEVELS)

    return tuple(code(leg, name) for leg, name in enumerate(strategy.names))


def scored(member: Member) -> Member:
    """A member with the records that get a score: its own, with a token to learn from; no canaries."""
    return replace(
        member,
        records=[one for one in member.records if one.learns and canary_of(one.id) is None],
        held_out=[one for one in member.held_out if one.learns],
    )


@dataclass(frozen=True)
class Leg:
    """What a leg came to.

    Attributes:
        name: of the leg.
        members: who took part.
        sent, received: bytes, of the member with the most.
    """

    name: str
    members: tuple[str, ...]
    sent: int
    received: int


@dataclass(frozen=True)
class Legs:
    """All of them.

    Attributes:
        state: the coordinator's, at the end: directions, and what members told.
        legs: in their order.
        error: by how much of their length directions change where the sums that they are made of are rounded once
            more; None where nothing is rounded.
    """

    state: State
    legs: tuple[Leg, ...]
    error: float | None = None


def play(
    strategy: FederatedInfluence,
    engine: Engine,
    initial: Tensors,
    targets: tuple[Sequence[str], Directions] | None = None,
) -> Legs:
    """Play the legs with all members of an engine.

    Args:
        strategy: of the legs.
        engine: carries the messages.
        initial: the parameters at which influence is asked for.
        targets: names, and the coordinator's mean gradients; None where members hold the target out.

    Raises:
        UserError: too few members or records are there, or a member's part cannot be right.
    """
    state = strategy.init(initial) if targets is None else strategy.begin(initial, targets[1], targets[0])
    legs: list[Leg] = []
    error = None
    for leg, name in enumerate(strategy.names):
        turn, traffic = Turn(1, leg, 1, len(engine.members)), Traffic()
        tasks = strategy.plan(state, turn, engine.members)
        sums, seen = play_leg(strategy, engine, tasks, turn, traffic)
        before, state = state, strategy.combine(state, turn, sums, seen)
        if strategy.step and name != SCORES:
            error = _error(strategy, before, turn, sums)
        legs.append(
            Leg(name, tuple(sorted(traffic.members)), max(traffic.sent.values()), max(traffic.received.values()))
        )
    return Legs(state, tuple(legs), error)


def _error(strategy: FederatedInfluence, before: State, turn: Turn, sums: Sums) -> float | None:
    """What rounding does, from rounding once more: the change of the directions over their length."""
    if (once := strategy.solved(before, turn, sums)) is None:
        return None
    step = strategy.step if turn.leg == 0 else 1 / PART_LEVELS
    spread = math.sqrt(sums.members) * step / 2
    generator = torch.Generator().manual_seed(0)
    again = {
        name: sums[name] + spread * torch.randn(sums[name].shape, generator=generator, dtype=torch.float64)
        for name in sums
    }
    facts = {name: sums.fact(name) for name in ("records", "targets")}
    moved = strategy.solved(before, turn, Sums.of(again, facts, sums.members))
    assert moved is not None
    pairs = [(moved.directions[name], one) for name, one in once.directions.items()]
    change = math.sqrt(sum(float((other - one).square().sum()) for other, one in pairs))
    return change / (math.sqrt(sum(float(one.square().sum()) for _, one in pairs)) or 1.0)
