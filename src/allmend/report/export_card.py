"""The README of an adapter that stands for a mixture: what it leaves out, and what that costs.

It travels with the weights, so it names no client and no path of the machine that made it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from allmend.report import numbers
from allmend.results import Estimate


@dataclass(frozen=True)
class Compared:
    """A mixture and its export on the same records, in nats a token.

    Attributes:
        records: what they are: `validation`, which router and mean gates were fitted to, or `held-out`.
        count: how many.
        mixture, export: their losses.
        added: loss of the export minus that of the mixture, paired by record.
    """

    records: Literal["validation", "held-out"]
    count: int
    mixture: Estimate
    export: Estimate
    added: Estimate


def in_words(one: Compared) -> str:
    """What an export costs on some records, in a sentence."""
    if not numbers.has_interval(one.added):
        return f"On {one.records} records the loss changes by {_signed(one.added.value)} nats a token."
    assert one.added.low is not None
    assert one.added.high is not None
    if one.added.low > 0:
        return f"On {one.records} records it is worse by {_signed(one.added.value)} nats a token."
    if one.added.high < 0:
        return f"On {one.records} records it is better by {_signed(-one.added.value)} nats a token."
    return f"On {one.records} records no difference is shown."


def export_card(
    *, how: Literal["generalist", "mean-gates"], run: str, arm: str, rank: int, compared: Sequence[Compared]
) -> str:
    """The card, in Markdown.

    Args:
        how: the adapter was made.
        run, arm: names of the run and of its arm.
        rank: of the adapter.
        compared: losses of the mixture and of the adapter.
    """
    what = {
        "generalist": "It has the experts that all members share, and neither the member's own ones nor its router.",
        "mean-gates": "It has all experts, each with its mean weight over the records that the router learnt from. The "
        "mixture weighs them anew for each token, which no LoRA can.",
    }[how]
    lines = [
        "# An adapter in the place of a mixture of experts",
        "",
        f"A LoRA of rank {rank} for one member's mixture of the run `{run}`, arm `{arm}` (`--how {how}`). {what}",
        "",
    ]
    if compared:
        lines += [
            "| records | mixture | this adapter | added loss |",
            "| --- | --- | --- | --- |",
            *(
                f"| {one.count:,} {one.records} | {_loss(one.mixture)} | {_loss(one.export)} | {added(one.added)} |"
                for one in compared
            ),
            "",
            "Nats a token; in brackets 95 % intervals over records, of the difference paired by record. Router and "
            "mean weights were fitted to the validation records, and held-out records are new to both.",
            "",
            " ".join(in_words(one) for one in compared),
        ]
    else:
        lines.append("The member has no record to compare them on.")
    return "\n".join([*lines, ""])


def _loss(estimate: Estimate) -> str:
    ends = numbers.interval(estimate, lambda end: f"{end:.3f}")
    return f"{estimate.value:.3f}" + (f" ({ends})" if ends else "")


def added(estimate: Estimate) -> str:
    """A difference of losses with its interval: `+0.0968 (+0.0619 to +0.1318)`."""
    ends = numbers.interval(estimate, _signed)
    return _signed(estimate.value) + (f" ({ends})" if ends else "")


def _signed(value: float) -> str:
    shown = f"{value:+.4f}"
    return shown.lstrip("+-") if float(shown) == 0 else shown.replace("-", "−")
