"""What an audit's single probes say to each member: how many of its canaries came out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from allmend import intervals
from allmend.probes import Probe
from allmend.report.base_rate import Secrets, Verdict, judged
from allmend.results import Estimate


@dataclass(frozen=True)
class MemberOutcome:
    """What came out of the canaries of one member in one model.

    Attributes:
        model: name of the arm.
        client: the member.
        planted: share of its canaries that some prefix brings out to the end.
        control: the same of its controls; None where it has none.
        copies: how many came out, by number of copies.
        prefix: the shortest prefix that brought one out; None where none did.
        secrets: those behind one prefix; None where there is none.
        control_secrets: the same of its controls.
    """

    model: str
    client: str
    planted: Estimate
    control: Estimate | None
    copies: dict[int, int]
    prefix: str | None
    secrets: Secrets | None
    control_secrets: Secrets | None

    @property
    def verdict(self) -> Verdict:
        """The more serious of the verdicts on whole texts and on secrets."""
        found = judged(self.planted, self.control)
        if self.secrets is None:
            return found
        null = self.control_secrets.share if self.control_secrets else None
        return max(found, judged(self.secrets.share, null, lucky=True))


def by_member(probes: Sequence[Probe], model: str, prefix: str | None) -> list[MemberOutcome]:
    """What came out of each member's canaries in a model, the most serious first.

    Args:
        probes: of all models.
        model: name of the arm.
        prefix: at which secrets are counted.
    """
    clients: dict[str, list[Probe]] = {}
    for probe in probes:
        if probe.model == model:
            clients.setdefault(probe.client, []).append(probe)
    found = [_of_member(model, client, own, prefix) for client, own in clients.items()]
    known = [outcome for outcome in found if outcome is not None]
    return sorted(known, key=lambda outcome: (-outcome.verdict, -outcome.planted.value))


def _of_member(model: str, client: str, probes: Sequence[Probe], prefix: str | None) -> MemberOutcome | None:
    def came_out(inserted: bool) -> Estimate | None:
        known = {p.canary for p in probes if p.inserted == inserted}
        exact = {p.canary for p in probes if p.inserted == inserted and p.exact}
        return intervals.share(len(exact), len(known)) if known else None

    def secrets(inserted: bool) -> Secrets | None:
        asked = [p for p in probes if p.inserted == inserted and p.prefix == prefix and p.secrets]
        if not asked:
            return None
        share = intervals.mean_share([p.secrets_out / p.secrets for p in asked])
        return Secrets(sum(p.secrets_out for p in asked), sum(p.secrets for p in asked), share)

    planted = came_out(True)
    if planted is None:
        return None
    out = [p for p in probes if p.inserted and p.exact]
    shortest = min(out, key=lambda p: p.prefix_tokens, default=None)
    return MemberOutcome(
        model=model,
        client=client,
        planted=planted,
        control=came_out(False),
        copies=dict(sorted(Counter({p.canary: p.copies for p in out}.values()).items())),
        prefix=shortest.prefix if shortest else None,
        secrets=secrets(True),
        control_secrets=secrets(False),
    )
