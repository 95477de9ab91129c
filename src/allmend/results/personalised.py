"""Whether members were better off together: every arm on each member's own held-out records."""

from collections.abc import Mapping

from allmend.results.figures import Estimate, Table


class PersonalisedArm(Table):
    """An arm over all members, each with its own model in it, or with the one that all share.

    Attributes:
        arm: name; a member's own table has the base model, `base`, as well.
        strategy: name; `base`.
        alone: whether its members learn nothing from each other.
        simulated: whether it needs all records in one place.
        loss: mean over members of the loss per token of their own held-out records (nats); n counts tokens.
        difference: this arm's minus that of the arm which it is compared with, paired by record; None where there is
            none, and for that arm itself.
        regret: loss minus that of the member's best arm, for the member where that is largest (nats per token).
        regretting: that member.
        sent, received: bytes of tensors from and to the coordinator over all rounds, a member's mean.
        trainable: parameters that learn in it; 0 where the log does not say.
        steps: optimiser steps of each party's model; empty where the checkpoint is not here.
        passes: of each party over its training records, with all that its strategy asks for beside the steps; empty
            where that was not counted.
    """

    arm: str
    strategy: str
    alone: bool = False
    simulated: bool = False
    loss: Estimate
    difference: Estimate | None = None
    regret: float
    regretting: str
    sent: float = 0.0
    received: float = 0.0
    trainable: int = 0
    steps: Mapping[str, int] = {}
    passes: Mapping[str, float] = {}


class PersonalisedMember(Table):
    """A member under every arm.

    Attributes:
        member: name.
        losses: per token of its own held-out records (nats), by arm.
        best: the arm with the lowest.
        together: the arm with the lowest of those in which members learn from each other; None without one.
        difference: that arm's loss minus the loss of the arm that is compared with, paired by record. Its interval
            allows for the choice among the arms.
    """

    member: str
    losses: Mapping[str, Estimate]
    best: str
    together: str | None = None
    difference: Estimate | None = None

    @property
    def paid(self) -> bool | None:
        """Whether learning together was better for it; None where that cannot be told."""
        found = self.difference
        if found is None or found.low is None or found.high is None or found.low <= 0 <= found.high:
            return None
        return found.value < 0


class PersonalisedTable(Table):
    """`results/personalised.json`: the arms of a run on members' own records. Among organisations each has its own.

    Attributes:
        against: the arm that the others are compared with; None where no arm trains alone and none was named. In a
            member's own table it is then the base model.
        arms: those that are finished, in the recipe's order.
        members: those with held-out records and a model in every arm.
        left_out: the other members.
        unfinished: arms without scores yet.
    """

    against: str | None = None
    arms: tuple[PersonalisedArm, ...]
    members: tuple[PersonalisedMember, ...]
    left_out: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()
