"""What did the model memorise, and what bounds it?"""

import math

from allmend.report import bounds, numbers
from allmend.report.base_rate import Verdict, hits, outcomes
from allmend.report.evidence import Evidence
from allmend.report.findings import Finding, verdict
from allmend.results import longest_prefix, member_of

KEPT = "What did it memorise?"
BOUND = "What bounds it?"


def memorised(evidence: Evidence, model: str) -> Finding | None:
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
    return Finding(KEPT, f"{numbers.signed(value)} nats", "log-likelihood of canaries over controls", sentence)


def recited(evidence: Evidence, model: str) -> Finding | None:
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
    return Finding(KEPT, shown, "planted canaries recited", sentence)


def passed_on(evidence: Evidence) -> Finding | None:
    """Whether members' own models show what other members' data taught."""
    if (audit := evidence.members_audit) is None:
        return None
    asked = {test.model for test in audit.ranks if test.whose == "others"}
    above = list(dict.fromkeys(test.model for test in audit.above_chance("others")))
    arms = ", ".join(dict.fromkeys(member_of(model)[0] for model in above))
    sentence = (
        f"In {arms}, members’ own models tell planted canaries of other members from controls above chance: something "
        "of a member’s records passes to the others."
        if above
        else "No member’s own model is shown to tell other members’ planted canaries from controls. Absence of "
        "evidence is not evidence of absence."
    )
    return Finding(KEPT, numbers.out_of(len(above), len(asked)), "members’ models that know others’ canaries", sentence)


def guaranteed(evidence: Evidence) -> Finding | None:
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
    return Finding(BOUND, f"ε ≤ {numbers.number(epsilon)}", f"for one {unit}, accounted", sentence)
