"""What left each member, and what did it cost?"""

from allmend.report import numbers
from allmend.report.evidence import Evidence
from allmend.report.findings import Finding


def left(evidence: Evidence, model: str) -> Finding | None:
    """What members sent of an arm, and how large it was."""
    rounds = evidence.rounds.get(model, [])
    received = [octets for one in rounds for octets in one.received.values()]
    if not received or not max(received):
        return None
    layers = evidence.privacy.layers.get(model, ()) if evidence.privacy else ()
    hidden = any(words.startswith("secure aggregation") for words in layers)
    sentence = f"In each of {numbers.counted(len(rounds), 'round')} of {model} a member sends its change of the model, "
    sentence += f"{numbers.size(sum(received))} from all members together, and no record. "
    sentence += "Changes are summed behind masks." if hidden else "Whoever sums the changes could see each."
    if not evidence.offered:
        sentence += " Here, members are simulated on one machine."
    return Finding("What left each member?", numbers.size(max(received)), "at most in a round", sentence)


def cost(evidence: Evidence, model: str) -> Finding | None:
    """How long the rounds of an arm took, and how much of it was not training."""
    rounds = evidence.rounds.get(model, [])
    if not rounds:
        return None
    whole, busy = sum(one.seconds for one in rounds), sum(one.training_seconds for one in rounds)
    sentence = f"{numbers.counted(len(rounds), 'round')} of {model} took {numbers.duration(whole)}"
    if tokens := sum(one.tokens for one in rounds):
        sentence += f" for {numbers.counted(tokens, 'token')}"
    sentence += (
        f"; {numbers.count(evidence.arms[model].trainable)} parameters learn." if model in evidence.arms else "."
    )
    if whole > 0 and not evidence.offered:
        share = (whole - busy) / whole
        words = numbers.percent(share) if share >= 0.001 else f"less than {numbers.percent(0.001)}"
        sentence += f" Exchange, aggregation and checkpoints took {words} of it."
    return Finding("What did it cost?", numbers.duration(whole), "of training together", sentence)
