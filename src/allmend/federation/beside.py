"""What strategies have members read beside the steps of one training: probes, router steps, a second model."""

from collections.abc import Sequence

from allmend.federation.member import Member
from allmend.federation.strategies.clustered import Clustered
from allmend.federation.strategies.cobo import CoBo
from allmend.federation.strategies.comigs import CoMiGS
from allmend.federation.strategies.ditto import Ditto
from allmend.federation.strategies.ifca import IFCA
from allmend.learn.schedule import steps_per_round
from allmend.recipe import Arm
from allmend.strategy import Strategy

FORWARD = 1 / 3
"""What a forward pass alone costs of one with its backward pass."""


def tokens_beside(strategy: Strategy, arm: Arm, members: Sequence[Member]) -> float:
    """Tokens of all that members read beside their steps, over all rounds."""
    total = 0.0
    for member in members:
        count = len(member.records)
        mean = sum(len(record) for record in member.records) / count
        total += mean * records_beside(strategy, arm, count, len(members))
    return total


def records_beside(strategy: Strategy, arm: Arm, records: int, members: int) -> float:
    """Records that go through a member's model beside its steps over all rounds, about; forward passes count a third.

    Args:
        strategy: of the arm.
        arm: for rounds and steps.
        records: of the member.
        members: of the federation.
    """
    rounds, steps = arm.strategy.rounds, steps_per_round(records, arm.train)
    batch = min(arm.train.batch_size, records)
    match strategy:
        case Ditto():
            return float(rounds * steps * batch)
        case CoMiGS():
            turns = rounds * steps // strategy.router_every
            apart = max(1, round(strategy.validation * records))
            return float(turns * strategy.router_steps * min(batch, apart))
        case CoBo():
            return _probed(strategy, rounds, records, members)
        case IFCA():
            read = min(records, strategy.probe_records or records)
            return FORWARD * strategy.groups * read * rounds if strategy.groups > 1 else 0.0
        case Clustered():
            return float(min(records, strategy.probe_records))
        case _:
            return 0.0


def _probed(strategy: CoBo, rounds: int, records: int, members: int) -> float:
    """Gradients at midpoints until the graph is frozen, and one where neighbours are looked for."""
    if members < 2:
        return 0.0
    together = strategy.rounds_together(rounds)
    rate = strategy.probes_of_a_pair(members)
    lasting = float(rounds - together)
    if strategy.freeze_after_visits and rate:
        lasting = min(lasting, -(-strategy.freeze_after_visits // rate))
    pairs = min(strategy.pairs_per_member * (members - 1) / members, members - 1)
    gradients = pairs * lasting + (1 if strategy.neighbours and together < rounds else 0)
    return gradients * min(records, strategy.probe_records)
