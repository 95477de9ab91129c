"""Whose data helped."""

from collections.abc import Sequence

from allmend.results.figures import Estimate, Table


class LegTraffic(Table):
    """A leg of federated influence: who took part, and bytes to and from the member with the most."""

    name: str
    members: tuple[str, ...]
    sent: int
    received: int


class MemberInfluence(Table):
    """What a member's records did for a target, as far as the member tells.

    Attributes:
        client, target: which.
        mean: mean score of its records; n counts them.
        below: share of them with a score below 0.
        size: mean of their absolute values.
        balance: sum of all scores over the sum of their absolute values. Near 0 they cancel, as they do where training
            has come to rest; then a negative mean says "less than the others", not "harmful".
    """

    client: str
    target: str
    mean: Estimate
    below: Estimate
    size: float
    balance: float


def in_typical_scores(found: Sequence[MemberInfluence]) -> list[MemberInfluence]:
    """Figures for one target, the most helpful first, with means in units of the mean absolute score of all these
    records: scores have no unit of their own."""
    total = sum(one.size * one.mean.n for one in found)
    unit = total / sum(one.mean.n for one in found) if total else 1.0
    scaled = [
        one.model_copy(
            update={
                "mean": Estimate(
                    value=one.mean.value / unit,
                    low=None if one.mean.low is None else one.mean.low / unit,
                    high=None if one.mean.high is None else one.mean.high / unit,
                    n=one.mean.n,
                )
            }
        )
        for one in found
    ]
    return sorted(scaled, key=lambda one: -one.mean.value)


class ArmInfluence(Table):
    """Whose data helped in an arm.

    Attributes:
        arm: name.
        weights: SHA-256 of the adapter at which influence was measured.
        target: `held_out`, or the file's name; `target_records` of it, in `targets` groups.
        method: of influence.
        records: training records in the curvature; 0 where the method has none.
        damping, modules, min_records, clip, reveal: as asked for.
        clipped: gradients of a record and a factor that were scaled down to `clip` for the curvature, of `gradients`.
        members: by member and target; empty where nothing is revealed.
        silent: members that told nothing, since they have too few records.
        legs: what travelled.
        hidden: whether sums were formed out of sight; `error` is what rounding for that does to the directions, over
            their length.
        skipped: modules without a gradient.
    """

    arm: str
    weights: str
    target: str
    target_records: int
    targets: tuple[str, ...]
    method: str = "gfim"
    records: int
    damping: float
    modules: str | None
    min_records: int
    clip: float | None = None
    clipped: int = 0
    gradients: int = 0
    reveal: str
    members: tuple[MemberInfluence, ...]
    silent: tuple[str, ...] = ()
    legs: tuple[LegTraffic, ...]
    hidden: bool
    error: float | None = None
    skipped: tuple[str, ...] = ()

    def told(self, target: str) -> list[MemberInfluence]:
        """Members' figures for a target, as `in_typical_scores` gives them."""
        return in_typical_scores([one for one in self.members if one.target == target])


class InfluenceByMember(Table):
    """`results/influence.json`: whose data helped, in each arm that was measured."""

    arms: tuple[ArmInfluence, ...]
