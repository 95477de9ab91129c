"""The findings of a run in plain words, each with its interval; where an interval covers zero it says so."""

import math
from dataclasses import dataclass
from statistics import fmean

from allmend.report import bounds, numbers
from allmend.report.base_rate import Verdict, hits, outcomes
from allmend.report.evidence import Evidence
from allmend.report.markup import Html, join, tag
from allmend.report.numbers import THIN
from allmend.results import BASE, POOLED, Estimate, longest_prefix


@dataclass(frozen=True)
class Finding:
    """One finding: the figure that carries it, what it is a figure of, and the sentence."""

    figure: str
    about: str
    sentence: str


def verdict(difference: Estimate) -> int:
    """1 or −1 when the interval lies on one side of zero, 0 when it does not or there is none."""
    if difference.low is None or difference.high is None:
        return 0
    return 1 if difference.low > 0 else -1 if difference.high < 0 else 0


def _points(difference: Estimate) -> str:
    whole = numbers.evidence(difference, lambda share: numbers.hundredths(share, 0))
    return f"{numbers.points(difference.value, 0)} points, {whole}"


def _shown(difference: Estimate, better: str, worse: str) -> str:
    """The verb for a difference, or that there is none to speak of."""
    if not numbers.has_interval(difference):
        return better if difference.value > 0 else worse if difference.value < 0 else "stayed the same:"
    return {1: better, -1: worse, 0: "shows no difference:"}[verdict(difference)]


def _against_base(evidence: Evidence, model: str) -> Finding | None:
    after, before = evidence.row(model, POOLED), evidence.row(BASE, POOLED)
    if after is None or after.accuracy is None:
        return _perplexity_against_base(evidence, model)
    reached = numbers.percent(after.accuracy.value, 0)
    if before is None or before.accuracy is None:
        sentence = f"Pooled held-out accuracy is {reached} with {model}; the base model was not measured."
        return Finding(reached, "pooled held-out accuracy", sentence)
    shares = f"from {numbers.percent(before.accuracy.value, 0)} to {reached} with {model}"
    known = evidence.difference(model, BASE)
    if known is None or known.accuracy is None:
        sentence = f"Pooled held-out accuracy went {shares} ({numbers.sample(after.accuracy)}); no interval."
        gained = after.accuracy.value - before.accuracy.value
        return Finding(f"{numbers.points(gained, 0)} points", "accuracy over the base model", sentence)
    verb = _shown(known.accuracy, "rose", "fell")
    sentence = f"Pooled held-out accuracy {verb} {shares} ({_points(known.accuracy)})."
    return Finding(f"{numbers.points(known.accuracy.value, 0)} points", "accuracy over the base model", sentence)


def _nats(difference: Estimate) -> str:
    return f"{numbers.signed(difference.value)} nats per token, {numbers.evidence(difference, numbers.signed)} tokens"


def _perplexity_against_base(evidence: Evidence, model: str) -> Finding | None:
    """What there is to say where no question is asked."""
    after, before = evidence.row(model, POOLED), evidence.row(BASE, POOLED)
    if after is None or after.perplexity is None:
        return None
    reached = numbers.number(after.perplexity.value)
    if before is None or before.perplexity is None:
        sentence = f"Pooled held-out perplexity is {reached} with {model}; the base model was not measured."
        return Finding(reached, "pooled held-out perplexity", sentence)
    was = numbers.number(before.perplexity.value)
    known = evidence.difference(model, BASE)
    if known is None or known.log_perplexity is None:
        sentence = f"Pooled held-out perplexity went from {was} to {reached} with {model}; no interval."
    else:
        verb = _shown(known.log_perplexity, "rose", "fell")
        sentence = f"Pooled held-out perplexity {verb} from {was} to {reached} with {model} "
        sentence += f"({_nats(known.log_perplexity)}); lower is better."
    return Finding(f"{was} → {reached}", "perplexity of held-out responses, before and after", sentence)


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
    return Finding(figure, "log-perplexity against members alone; less is better", sentence)


def _against_alone(evidence: Evidence, model: str, alone: str) -> Finding | None:
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
    return Finding(f"{numbers.points(gap, 0)} points", "accuracy over members alone", sentence)


def _alone_against_base(evidence: Evidence, alone: str) -> Finding | None:
    own = [row.accuracy.value for row in evidence.members_rows(alone, POOLED) if row.accuracy]
    before = evidence.row(BASE, POOLED)
    if not own:
        return None
    reached = numbers.percent(fmean(own), 0)
    than = f"; the base model {numbers.percent(before.accuracy.value, 0)}" if before and before.accuracy else ""
    sentence = (
        f"On the pooled questions the members’ own models ({alone}) reach {reached} on average{than}. No interval."
    )
    return Finding(reached, "pooled held-out accuracy, mean of members", sentence)


def _memorised(evidence: Evidence, model: str) -> Finding | None:
    gaps = [gap for gap in (evidence.audit.gaps if evidence.audit else ()) if gap.model == model]
    if not gaps:
        return None
    most = max(gaps, key=lambda gap: gap.copies)
    value, cell = most.gap.value, f"Canaries with {numbers.counted(most.copies, 'copy', 'copies')}"
    behind = numbers.evidence(most.gap, numbers.number)
    measured = {
        1: "memorisation is measurable",
        -1: "they are less likely than their controls",
        0: "no memorisation shown by this measure",
    }[verdict(most.gap)]
    sentence = (
        f"{cell} are {numbers.number(value)} nats per token likelier than controls under {model}, a factor of "
        f"{numbers.number(math.exp(min(value, 50.0)))} per token ({behind}): {measured}."
    )
    return Finding(f"{numbers.signed(value)} nats", "log-likelihood of canaries over controls", sentence)


def _recited(evidence: Evidence, model: str) -> Finding | None:
    if evidence.audit is None or not (found := outcomes(evidence.audit, model)):
        return None
    out, n = hits(o.planted.exact for o in found)
    null, controls = hits(o.control.exact for o in found if o.control)
    verdict = max(o.verdict for o in found)
    shown = numbers.out_of(out, n)
    given = longest_prefix(evidence.audit.extraction)
    sentence = f"Given the first {given}, {model} recites {shown} planted canaries without an error"
    sentence += f", and {numbers.out_of(null, controls)} controls" if controls else ""
    sentence += f": {verdict.words}."
    most = found[-1]
    if verdict is Verdict.MEMORISED:
        exact = numbers.evidence(most.planted.exact, lambda share: numbers.hundredths(share, 0))
        sentence += f" With {numbers.counted(most.copies, 'copy', 'copies')}: "
        sentence += f"{numbers.percent(most.planted.exact.value, 0)} ({exact})."
    else:
        sentence += " Absence of extraction is not absence of memorisation." if out == 0 else ""
    return Finding(shown, "planted canaries recited", sentence)


def _guaranteed(evidence: Evidence) -> Finding | None:
    """The guarantee of the arm that spent most, beside what was measured."""
    budgets = evidence.privacy.budgets if evidence.privacy else {}
    spent = [(arm, b, b.epsilon) for arm, held in budgets.items() for b in held if b.epsilon is not None]
    if not spent:
        return None
    arm, budget, epsilon = max(spent, key=lambda entry: entry[2])
    unit = "member with all its records" if budget.unit == "member" else "training record"
    sentence = f"With {arm}, the accountant bounds what any one {unit} can change by ε = {numbers.number(epsilon)} "
    sentence += f"(δ = {numbers.power(budget.delta)})."
    known = [b for b in (evidence.audit.epsilon if evidence.audit else ()) if (b.model, b.copies) == (arm, 1)]
    sentence += "".join(f" Measured from canaries with 1 copy: {bounds.measured(bound)}." for bound in known)
    sentence += " Noise from the recipe’s seed: a simulation." if budget.simulated else ""
    return Finding(f"ε ≤ {numbers.number(epsilon)}", f"for one {unit}, accounted", sentence)


def _exchanged(evidence: Evidence) -> Finding | None:
    rounds = [r for rounds in evidence.rounds.values() for r in rounds]
    messages = [octets for r in rounds for octets in (*r.sent.values(), *r.received.values())]
    if not messages or not max(messages):
        return None
    whole, busy = sum(r.seconds for r in rounds), sum(r.training_seconds for r in rounds)
    sentence = (
        f"Largest message: {numbers.size(max(messages))} per member and round; {numbers.size(sum(messages))} in all."
    )
    if whole > 0 and not evidence.offered:
        share = numbers.percent((whole - busy) / whole)
        sentence += f" Exchange, aggregation and checkpoints took {share} of the rounds’ time."
    return Finding(numbers.size(max(messages)), "largest message", sentence)


def findings(evidence: Evidence) -> list[Finding]:
    """What a reader should know first; fewer when less was measured."""
    shared, personal = evidence.shared, evidence.personal
    found: list[Finding | None] = []
    for model in shared[:1]:
        found.append(_against_base(evidence, model))
        found += [_against_alone(evidence, model, alone) for alone in personal[:1]]
    if not shared:
        found += [_alone_against_base(evidence, alone) for alone in personal[:1]]
    for model in evidence.audited[:1]:
        found += [_memorised(evidence, model), _recited(evidence, model)]
    found.append(_guaranteed(evidence))
    found.append(_exchanged(evidence))
    return [finding for finding in found if finding is not None]


def summary(evidence: Evidence) -> Html:
    """The findings as cards."""
    cards = [
        tag("li", tag("b", finding.figure), tag("span", finding.about), tag("p", finding.sentence))
        for finding in findings(evidence)
    ]
    if not cards:
        return tag("p", "Nothing has been measured yet.")
    note = f"Intervals are 95{THIN}% intervals. Where one covers zero, the page says that no difference is shown."
    return join([tag("ul", *cards, class_="findings"), tag("p", note, class_="note")])
