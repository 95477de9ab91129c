"""Who answers in members' mixtures: how much weight routers give to the experts that all share."""

import math

from allmend.results.figures import Estimate, Table


class MemberRouting(Table):
    """The gates of one member's mixture on its own records, by layer.

    Attributes:
        member: name.
        records: that were read; they are held-out ones, or those of the member's target where `target`.
        target: whether they are what its routers have learnt from.
        shared, own: generalists and specialists that it has.
        mass: weight of all generalists together, in [0, 1]: mean over tokens, with an interval over records.
        overall: the same over all layers.
        gates: mean over tokens of each expert's gate, generalists first; they sum to 1.
    """

    member: str
    records: int
    target: bool = False
    shared: int
    own: int
    mass: tuple[Estimate, ...]
    overall: Estimate
    gates: tuple[tuple[float, ...], ...]

    @property
    def routed(self) -> bool:
        """Whether it has a router: a single expert has all the weight without one."""
        return self.shared + self.own > 1

    def entropy(self, place: int) -> float:
        """−Σ ḡ ln ḡ of the mean gates of a layer (nats): ln of the number of experts where all are used alike."""
        return -math.fsum(gate * math.log(gate) for gate in self.gates[place] if gate > 0)


class ArmRouting(Table):
    """Routing in an arm whose members have mixtures.

    Attributes:
        arm: name.
        layers: numbers of the decoder's layers that have experts, from 0.
        members: those with a mixture and a record to read.
        warnings: of routers that use one side alone.
    """

    arm: str
    layers: tuple[int, ...]
    members: tuple[MemberRouting, ...]
    warnings: tuple[str, ...] = ()


class RoutingTable(Table):
    """`results/routing.json`: who answers in a run's mixtures, by arm."""

    arms: tuple[ArmRouting, ...]
