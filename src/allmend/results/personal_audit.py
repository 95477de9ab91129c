"""What members' own models keep of their members' canaries, and what they show of the other members'."""

from typing import Literal

from allmend.results.figures import Estimate, Table

Whose = Literal["own", "others"]
"""Canaries and records of the member whose model it is, or of the other members."""

SIGNIFICANT = 0.05
"""Chance of one statement or more that is false, over all models that are told of together."""


class RankTest(Table):
    """Whether a model ranks planted canaries above controls more than the toss of coins explains.

    Under the hypothesis that nothing of whose coin fell how has reached the model, every order of the canaries is as
    likely as any other, whatever the model has learnt of their kind: p is exact where no two scores are equal.

    Attributes:
        model: of one member, `ARM/MEMBER`.
        whose: canaries.
        copies: of the planted ones; controls are of any, which come from the same generator.
        planted, controls: how many there are.
        p: one-sided, of the Mann–Whitney statistic of mean log-likelihood over the base model's.
    """

    model: str
    whose: Whose
    copies: int
    planted: int
    controls: int
    p: float


class OverMembers(Table):
    """A figure over the models of an arm's members.

    Attributes:
        mean: over members, all alike, with Student's interval; n counts members.
        least, most: of a member.
    """

    mean: Estimate
    least: float
    most: float


class KeptByMembers(Table):
    """What the personal models of an arm keep of canaries of one number of copies.

    Attributes:
        arm: its name.
        whose: canaries: each member's own in its own model, or those of all others in it.
        copies: of the canaries.
        gap: likelihood gap, nats per token.
        exact, exact_controls: share of planted canaries, and of controls, whose whole rest comes out after the longest
            prefix.
        exposure: of planted canaries, bits, mean over secrets.
        auc: of planted canaries against controls, by loss over the base model's.
    """

    arm: str
    whose: Whose
    copies: int
    gap: OverMembers | None = None
    exact: OverMembers | None = None
    exact_controls: OverMembers | None = None
    exposure: OverMembers | None = None
    auc: OverMembers | None = None


def member_of(model: str) -> tuple[str, str | None]:
    """Arm and member of a model `ARM/MEMBER`; of one that all share there is no member."""
    arm, _, member = model.partition("/")
    return arm, member or None
