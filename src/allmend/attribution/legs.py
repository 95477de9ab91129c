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
from allmend.influence.federated import BLOCKS, SIZES, FederatedInfluence
from allmend.influence.inverses import INVERSES
from allmend.influence.methods import Directions
from allmend.models.tensors import Tensors
from allmend.recipe import HELD_OUT, Influence
from allmend.strategy import State, Sums, Turn

LARGEST = 2.0**22
"""Of a squared size, or of a target's summed gradient; what is larger is refused."""

LEVELS = {SIZES: 2**52, BLOCKS: 2**30}
"""From 0 to the largest value. Sizes span many orders of magnitude; blocks come in units of them and lie in [−1, 1],
and so does the sum of all."""

NAMES = ("sizes", "blocks", "scores")


def strategy_of(
    settings: Influence, *, hidden: bool, on_tokens: Callable[[int], None] = lambda tokens: None
) -> FederatedInfluence:
    """The recipe's `[influence]` as a strategy.

    Args:
        settings: the section.
        hidden: whether sums are formed out of sight, of integers.
        on_tokens: told the tokens of each pass.
    """
    return FederatedInfluence(
        held_out=settings.target == HELD_OUT,
        modules=settings.modules,
        damping=settings.damping,
        inverse=INVERSES[fastest(torch.device("cpu")) if settings.inverse == AUTO else settings.inverse],
        min_records=settings.min_records,
        reveal=settings.reveal,
        step=LARGEST / LEVELS[SIZES] if hidden else 0.0,
        on_tokens=on_tokens,
    )


def codes_of(strategy: FederatedInfluence, initial: Tensors, members: int) -> tuple[VectorCode, ...]:
    """How the replies of each leg become integers.

    Args:
        strategy: says what each leg sums.
        initial: the parameters that learn.
        members: the most in a sum.
    """
    declared = strategy.declare()
    numbers = sorted(set(declared.summed) & declared.numbers)
    sizes, blocks, scores = (strategy.layout_of(leg, initial) for leg in range(strategy.legs))
    return (
        VectorCode(sizes, numbers, LARGEST, members, levels=LEVELS[SIZES]),
        # one summand is room enough: the sum of all members' parts lies in [−1, 1] too
        VectorCode(blocks, numbers, 1.0, 1, bits=32, levels=LEVELS[BLOCKS]),
        VectorCode(scores, numbers, 1.0, members),
    )


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
    """All three.

    Attributes:
        state: the coordinator's, at the end: directions, and what members told.
        legs: in their order.
        error: by how much of their length directions change where the sums of the second leg are rounded once more;
            None where nothing is rounded.
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
    for leg, name in enumerate(NAMES):
        turn, traffic = Turn(1, leg, 1, len(engine.members)), Traffic()
        tasks = strategy.plan(state, turn, engine.members)
        sums, seen = play_leg(strategy, engine, tasks, turn, traffic)
        before, state = state, strategy.combine(state, turn, sums, seen)
        if leg == BLOCKS and strategy.step:
            error = _error(strategy, before, sums)
        legs.append(
            Leg(name, tuple(sorted(traffic.members)), max(traffic.sent.values()), max(traffic.received.values()))
        )
    return Legs(state, tuple(legs), error)


def _error(strategy: FederatedInfluence, before: State, sums: Sums) -> float:
    """What rounding does, from rounding once more: the change of the directions over their length."""
    spread = math.sqrt(sums.members) / LEVELS[BLOCKS] / 2
    generator = torch.Generator().manual_seed(0)
    again = {
        name: sums[name] + spread * torch.randn(sums[name].shape, generator=generator, dtype=torch.float64)
        for name in sums
    }
    moved = strategy.solved(before, Sums.of(again, {"records": sums.fact("records")}, sums.members)).directions
    once = strategy.solved(before, sums).directions
    change = math.sqrt(sum(float((moved[name] - once[name]).square().sum()) for name in once))
    return change / math.sqrt(sum(float(one.square().sum()) for one in once.values()))
