"""What a budget costs before anything is trained: the noise that it needs, and what other numbers would need."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from allmend.errors import UserError
from allmend.federation.privacy.accounting import OutOfReachError, Release, Unit, describe, epsilon, noise_for

WEAK = 10.0
"""ε above which a guarantee says little (Ponomareva et al., "How to DP-fy ML", JAIR 2023, section 5.2)."""


@dataclass(frozen=True)
class Need:
    """What one choice of numbers needs to keep within the budget.

    Attributes:
        choice: in words.
        noise_multiplier: standard deviation of the noise on the sum, in clips; infinite where no noise is enough.
        noise_on_average: the same on the average, which is the sum over the expected number of units in it.
    """

    choice: str
    noise_multiplier: float
    noise_on_average: float


@dataclass(frozen=True)
class Plan:
    """The price of a budget.

    Attributes:
        unit: what is protected.
        setting: the numbers of the plan, in words.
        protects: what the guarantee means, in a sentence.
        epsilon, delta: the budget.
        need: of the plan itself.
        spent: ε after some of the rounds (counted from 1), the last one included.
        others: what other numbers would need under the same budget.
        warnings: what the guarantee lacks, in sentences.
    """

    unit: Unit
    setting: str
    protects: str
    epsilon: float
    delta: float
    need: Need
    spent: dict[int, float]
    others: tuple[Need, ...]
    warnings: tuple[str, ...]


def plan_members(*, clients: int, rounds: int, fraction: float, epsilon: float, delta: float) -> Plan:
    """Noise on the sum of members' clipped updates, once a round.

    Args:
        clients: members in all.
        rounds: noisy sums.
        fraction: probability with which each member takes part in a round, by a secret coin; 1 for all in every round.
        epsilon, delta: the budget for the whole run.

    Raises:
        UserError: numbers that make no plan, or a budget that no noise keeps.
    """
    _check_counts(clients=clients, rounds=rounds)
    _check_budget(epsilon, delta)
    if not 0 < fraction <= 1:
        raise UserError(f"{fraction:g} is no share", where="fraction", hint="Choose a number above 0, and 1 at most.")
    rate = fraction if fraction < 1 else None

    def need(choice: str, *, clients: int = clients, rounds: int = rounds) -> Need:
        noise = noise_for(rate=rate, times=rounds, epsilon=epsilon, delta=delta)
        return Need(choice, noise, noise / (fraction * clients))

    asked = need("as planned")
    takes_part = f"each in a round with probability {fraction:g}" if rate else "all in every round"
    return Plan(
        unit="member",
        setting=f"{clients:,} members, {takes_part}; {rounds:,} rounds",
        protects=describe("member"),
        epsilon=epsilon,
        delta=delta,
        need=asked,
        spent=_spent(Release(asked.noise_multiplier, rate), 1, rounds, delta),
        others=(
            *(_if_possible(need, f"{other:,} rounds", rounds=other) for other in _other_rounds(rounds)),
            *(_if_possible(need, f"{factor * clients:,} members", clients=factor * clients) for factor in (3, 10)),
        ),
        warnings=(*_member_warnings(clients, fraction), *_budget_warnings(clients, "member", epsilon, delta)),
    )


def plan_records(*, records: int, batch_size: int, local_steps: int, rounds: int, epsilon: float, delta: float) -> Plan:
    """Noise on the sum of records' clipped gradients, at every step of one client (DP-SGD).

    Args:
        records: training records of the client.
        batch_size: expected records in a step; each enters with probability batch_size / records, by a secret coin.
        local_steps: in a round.
        rounds: in which the client takes part.
        epsilon, delta: the budget for the whole run.

    Raises:
        UserError: numbers that make no plan, or a budget that no noise keeps.
    """
    _check_counts(records=records, batch_size=batch_size, local_steps=local_steps, rounds=rounds)
    _check_budget(epsilon, delta)
    if batch_size > records:
        raise UserError(
            f"{batch_size:,} is more than the {records:,} records",
            where="batch_size",
            hint="Choose the number of records at most.",
        )

    def need(choice: str, *, batch_size: int = batch_size, rounds: int = rounds) -> Need:
        noise = noise_for(rate=batch_size / records, times=rounds * local_steps, epsilon=epsilon, delta=delta)
        return Need(choice, noise, noise / batch_size)

    asked = need("as planned")
    return Plan(
        unit="record",
        setting=(
            f"{records:,} records, each in a step with probability {batch_size / records:.3g}; "
            f"{rounds:,} rounds of {local_steps:,} steps"
        ),
        protects=describe("record"),
        epsilon=epsilon,
        delta=delta,
        need=asked,
        spent=_spent(Release(asked.noise_multiplier, batch_size / records), local_steps, rounds, delta),
        others=(
            *(_if_possible(need, f"{other:,} rounds", rounds=other) for other in _other_rounds(rounds)),
            *(
                _if_possible(need, f"batches of {factor * batch_size:,}", batch_size=factor * batch_size)
                for factor in (4, 16)
                if factor * batch_size <= records
            ),
        ),
        warnings=(*_record_warnings(records, batch_size), *_budget_warnings(records, "record", epsilon, delta)),
    )


def _if_possible(need: Callable[..., Need], choice: str, **numbers: int) -> Need:
    """What other numbers would need: infinite noise where none of the accountant's range is enough."""
    try:
        return need(choice, **numbers)
    except OutOfReachError:
        return Need(choice, math.inf, math.inf)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{count} is too few", where=name, hint="It takes 1 or more.")


def _check_budget(epsilon: float, delta: float) -> None:
    if not 0 < epsilon < math.inf:
        raise UserError(f"{epsilon:g} is no budget", where="epsilon", hint="Choose a number above 0.")
    if not 0 < delta < 1:
        raise UserError(f"{delta:g} is no δ", where="delta", hint="Choose a number above 0 and far below 1.")


def _spent(release: Release, per_round: int, rounds: int, delta: float) -> dict[int, float]:
    shown = sorted({1, *(math.ceil(rounds * quarter / 4) for quarter in (1, 2, 3, 4))})
    return {round: epsilon(release, round * per_round, delta) for round in shown}


def _other_rounds(rounds: int) -> list[int]:
    return [rounds // 2, 2 * rounds] if rounds > 1 else [2]


def _budget_warnings(units: int, unit: Unit, epsilon: float, delta: float) -> Iterator[str]:
    if delta >= 1 / units:
        yield (
            f"δ = {delta:g} is not below 1 / {units:,}: to give away one {unit} picked at random, whole, would be "
            f"within this guarantee. Choose a δ far below {1 / units:.1g}."
        )
    if epsilon > WEAK:
        odds = f"{math.exp(epsilon):.1e}" if epsilon < 700 else "more than 1e300"
        yield f"ε = {epsilon:g} is a weak promise: the odds of a result may change by a factor of {odds}."


def _member_warnings(clients: int, fraction: float) -> Iterator[str]:
    if fraction == 1:
        yield "All members take part in every round: sampling amplifies nothing, every round counts in full."
    elif (empty := (1 - fraction) ** clients) > 0.01:
        yield f"In {empty:.0%} of the rounds nobody will take part, and only noise is added."


def _record_warnings(records: int, batch_size: int) -> Iterator[str]:
    if batch_size == records:
        yield "Every record enters every step: sampling amplifies nothing, every step counts in full."
