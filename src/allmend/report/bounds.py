"""Measured bounds on ε in words, and which of several a sentence may speak of.

Each bound holds at its confidence by itself; the largest of several, picked once all are seen, does not. So the number
of copies decides which one is quoted, not its size. The accountant's ε is for one record: only the bound from canaries
that stand once can be set beside it.
"""

from collections.abc import Sequence

from allmend.report import numbers
from allmend.results import AuditTable, EpsilonBound, PrivacyTable


def guaranteed(model: str, audit: AuditTable, privacy: PrivacyTable | None) -> bool:
    """Whether the accountant has an ε for the model."""
    budgets = privacy.budgets.get(model, ()) if privacy else ()
    beside = (bound.accounted for bound in audit.epsilon if bound.model == model)
    return any(budget.epsilon is not None for budget in budgets) or any(epsilon is not None for epsilon in beside)


def quoted(bounds: Sequence[EpsilonBound], *, beside_guarantee: bool) -> EpsilonBound:
    """The bound that speaks for a model.

    Args:
        bounds: of one model, at least one.
        beside_guarantee: whether there is an accountant's ε to set it beside.

    Returns:
        The bound from single copies where there is a guarantee; otherwise, or where none stands once, that from the
        most copies.
    """
    single = next((bound for bound in bounds if bound.copies == 1), None)
    if beside_guarantee and single is not None:
        return single
    return max(bounds, key=lambda bound: bound.copies or 0)


def about(bound: EpsilonBound) -> str:
    """What the bound is on: 1 copy, 10 copies together, all canaries together."""
    if bound.copies is None:
        return "all canaries together"
    return numbers.counted(bound.copies, "copy", "copies") + (" together" if bound.copies > 1 else "")


def measured(bound: EpsilonBound) -> str:
    """The figure: at least 2.31, or that there is none."""
    return f"at{numbers.THIN}least {numbers.number(bound.epsilon)}" if bound.epsilon else "0 not ruled out"


def accounted(bound: EpsilonBound, *, guarantee: bool) -> str:
    """The accountant's ε for what the bound is on, or why there is none."""
    if bound.accounted is not None:
        return numbers.number(bound.accounted)
    return "accounted for one record only" if guarantee else "no guarantee"
