"""Did it help, was it better than to train alone, and whom did it help?"""

from collections.abc import Callable
from statistics import fmean

from allmend.report import numbers
from allmend.report.evidence import Evidence
from allmend.report.findings import Finding, verdict
from allmend.results import BASE, POOLED, Estimate

HELP = "Did it help?"
TOGETHER = "Was it better than alone?"
WHOM = "Whom did it help?"
PAID = "Did working together pay?"


def against_base(evidence: Evidence, model: str) -> Finding | None:
    after, before = evidence.row(model, POOLED), evidence.row(BASE, POOLED)
    if after is None or after.accuracy is None:
        return _perplexity_against_base(evidence, model)
    reached = numbers.percent(after.accuracy.value, 0)
    if before is None or before.accuracy is None:
        sentence = f"Pooled held-out accuracy is {reached} with {model}; the base model was not measured."
        return Finding(HELP, reached, "pooled held-out accuracy", sentence)
    shares = f"from {numbers.percent(before.accuracy.value, 0)} to {reached} with {model}"
    known = evidence.difference(model, BASE)
    if known is None or known.accuracy is None:
        sentence = f"Pooled held-out accuracy went {shares} ({numbers.sample(after.accuracy)}); no interval."
        gained = after.accuracy.value - before.accuracy.value
        return Finding(HELP, f"{numbers.points(gained, 0)} points", "accuracy over the base model", sentence)
    verb = _shown(known.accuracy, "rose", "fell")
    sentence = f"Pooled held-out accuracy {verb} {shares} ({_points(known.accuracy)})."
    return Finding(HELP, f"{numbers.points(known.accuracy.value, 0)} points", "accuracy over the base model", sentence)


def _perplexity_against_base(evidence: Evidence, model: str) -> Finding | None:
    """What there is to say where no question is asked."""
    after, before = evidence.row(model, POOLED), evidence.row(BASE, POOLED)
    if after is None or after.perplexity is None:
        return None
    reached = numbers.number(after.perplexity.value)
    if before is None or before.perplexity is None:
        sentence = f"Pooled held-out perplexity is {reached} with {model}; the base model was not measured."
        return Finding(HELP, reached, "pooled held-out perplexity", sentence)
    was = numbers.number(before.perplexity.value)
    known = evidence.difference(model, BASE)
    if known is None or known.log_perplexity is None:
        sentence = f"Pooled held-out perplexity went from {was} to {reached} with {model}; no interval."
    else:
        verb = _shown(known.log_perplexity, "rose", "fell")
        sentence = f"Pooled held-out perplexity {verb} from {was} to {reached} with {model} "
        sentence += f"({_nats(known.log_perplexity)}); lower is better."
    return Finding(HELP, f"{was} → {reached}", "perplexity of held-out responses, before and after", sentence)


def against_alone(evidence: Evidence, model: str, alone: str) -> Finding | None:
    known = evidence.difference(model, alone)
    ours, own = evidence.row(model, POOLED), [r.accuracy for r in evidence.members_rows(alone, POOLED) if r.accuracy]
    if known is not None and known.accuracy is not None:
        gap, behind = known.accuracy.value, f" ({_points(known.accuracy)})"
        verb = _shown(known.accuracy, "is better than", "is worse than")
        verb = verb if verb.startswith("is") else "shows no difference from"
    elif ours is not None and ours.accuracy is not None and own:
        gap, behind = ours.accuracy.value - fmean(e.value for e in own), "; no interval"
        verb = "is ahead of" if gap > 0 else "is not ahead of"
        behind = f" ({numbers.points(gap, 0)} points{behind})"
    else:
        return _perplexity_against_alone(evidence, model, alone)
    sentence = f"On the pooled questions {model} {verb} members who train alone, on average{behind}."
    pairs = own_specialty(evidence, model, alone)
    if pairs:
        ahead = sum(ours.value > own.value for _, ours, own in pairs)
        level = sum(ours.value == own.value for _, ours, own in pairs)
        drawn = f", level with {level}" if level else ""
        sentence += " On each member’s own questions it is ahead of that member’s"
        sentence += f" own model for {ahead} of {len(pairs)}{drawn} (point estimates)."
    return Finding(TOGETHER, f"{numbers.points(gap, 0)} points", "accuracy over members alone", sentence)


def by_member(evidence: Evidence, model: str) -> Finding | None:
    """For how many members the shared model is better than the base model on their own held-out records."""
    asked = [(client, evidence.difference(model, BASE, client)) for client in evidence.clients]
    gains = {client: known.accuracy for client, known in asked if known and known.accuracy}
    what, unit = "questions", " points"
    form: Callable[[float], str] = _whole_points
    if not gains:  # a fall of perplexity is a gain
        gains = {client: known.log_perplexity for client, known in asked if known and known.log_perplexity}
        gains = {client: _negative(gain) for client, gain in gains.items()}
        what, form, unit = "records", numbers.signed, " nats per token"
    if len(gains) < 2:
        return None
    shown, against = (sum(verdict(gain) == side for gain in gains.values()) for side in (1, -1))
    most, least = (pick(gains, key=lambda client: gains[client].value) for pick in (max, min))
    sentence = f"On members’ own held-out {what} {model} is shown to be better than the base model for {shown} of "
    sentence += f"{len(gains)}" + (f", and worse for {against}" if against else "")
    few, many = (pick(gain.n for gain in gains.values()) for pick in (min, max))
    sentence += f" (n = {numbers.count(few)} each)" if few == many else f" (n = {few} to {many})"
    sentence += f". It gains most for {most} ({form(gains[most].value)}{unit}) and least for {least} "
    sentence += f"({form(gains[least].value)}{unit})."
    return Finding(WHOM, f"{shown} of {len(gains)}", "members for whom a gain is shown", sentence)


def paid(evidence: Evidence) -> Finding | None:
    """For how many members an arm in which they work together is shown to be better than training alone."""
    found = evidence.personalised
    if found is None or found.against is None or not any(row.difference for row in found.members):
        return None
    n, better = len(found.members), sum(row.paid is True for row in found.members)
    worse = sum(row.paid is False for row in found.members)
    sentence = (
        f"On their own held-out records {numbers.out_of(better, n)} members are shown to be better off with some "
    )
    sentence += f"arm in which they work together than with {found.against}" + (f", and {worse} worse" if worse else "")
    sentence += f"; for {n - better - worse} it cannot be told." if better + worse < n else "."
    together = [arm for arm in found.arms if arm.difference and not arm.alone and not arm.simulated]
    if together:
        best = min(together, key=lambda arm: arm.loss.value)
        assert best.difference is not None
        sentence += f" On average over members {best.arm} is best among these arms ({_nats(best.difference)})."
    return Finding(PAID, numbers.out_of(better, n), f"members better off than with {found.against}", sentence)


def _whole_points(difference: float) -> str:
    return numbers.points(difference, 0)


def _negative(gain: Estimate) -> Estimate:
    low, high = (None if bound is None else -bound for bound in (gain.high, gain.low))
    return gain.model_copy(update={"value": -gain.value, "low": low, "high": high})


def own_specialty(evidence: Evidence, shared: str, alone: str) -> list[tuple[str, Estimate, Estimate]]:
    """By client: accuracy of the shared model and of the client's own, on the client's own held-out set."""
    pairs = []
    for client in evidence.clients:
        ours, own = evidence.row(shared, client), evidence.row(alone, client, client)
        if ours and own and ours.accuracy and own.accuracy:
            pairs.append((client, ours.accuracy, own.accuracy))
    return pairs


def _perplexity_against_alone(evidence: Evidence, model: str, alone: str) -> Finding | None:
    known = evidence.difference(model, alone)
    if known is None or known.log_perplexity is None:
        return None
    verb = _shown(known.log_perplexity, "is worse than", "is better than")
    verb = verb if verb.startswith("is") else "shows no difference from"
    sentence = f"On the pooled held-out records {model} {verb} members who train alone, on average "
    sentence += f"({_nats(known.log_perplexity)})."
    rows = [(evidence.row(model, client), evidence.row(alone, client, client)) for client in evidence.clients]
    pairs = [(a.perplexity, b.perplexity) for a, b in rows if a and b and a.perplexity and b.perplexity]
    if pairs:
        ahead = sum(ours.value < own.value for ours, own in pairs)
        sentence += f" On each member’s own records its perplexity is below that of the member’s own model for {ahead} "
        sentence += f"of {len(pairs)} (point estimates)."
    figure = f"{numbers.signed(known.log_perplexity.value)} nats"
    return Finding(TOGETHER, figure, "log-perplexity against members alone; less is better", sentence)


def alone_against_base(evidence: Evidence, alone: str) -> Finding | None:
    own = [row.accuracy.value for row in evidence.members_rows(alone, POOLED) if row.accuracy]
    before = evidence.row(BASE, POOLED)
    if not own:
        return None
    reached = numbers.percent(fmean(own), 0)
    than = f"; the base model {numbers.percent(before.accuracy.value, 0)}" if before and before.accuracy else ""
    sentence = (
        f"On the pooled questions the members’ own models ({alone}) reach {reached} on average{than}. No interval."
    )
    return Finding(HELP, reached, "pooled held-out accuracy, mean of members", sentence)


def _points(difference: Estimate) -> str:
    whole = numbers.evidence(difference, lambda share: numbers.hundredths(share, 0))
    return f"{numbers.points(difference.value, 0)} points, {whole}"


def _nats(difference: Estimate) -> str:
    return f"{numbers.signed(difference.value)} nats per token, {numbers.evidence(difference, numbers.signed)} tokens"


def _shown(difference: Estimate, better: str, worse: str) -> str:
    """The verb for a difference, or that there is none to speak of."""
    if not numbers.has_interval(difference):
        return better if difference.value > 0 else worse if difference.value < 0 else "stayed the same:"
    return {1: better, -1: worse, 0: "shows no difference:"}[verdict(difference)]
