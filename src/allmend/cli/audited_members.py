"""Members' own models on the terminal: what they keep of their members' canaries, and what they show of the others'."""

from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

from allmend.cli.figures import ABSENT, show_sections
from allmend.results import AuditTable, OverMembers, Whose, member_of

COLUMNS = {"": 10, "gap, nats per token": 22, "exact %": 7, "controls": 8, "exposure": 8, "AUC": 19}

TITLES: dict[Whose, str] = {"own": "own", "others": "others"}

MOST_NAMED = 6
"""Members that a sentence names."""


def show_members_models(console: Console, audit: AuditTable) -> None:
    """Print one row for an arm's members, by whose canaries and number of copies, and whether anything passed on."""
    sections: dict[str, list[tuple[str, ...]]] = {}
    for row in audit.members:
        sections.setdefault(row.arm, []).append(
            (
                f"{TITLES[row.whose]} ×{row.copies}",
                _range(row.gap, lambda value: f"{value:+.2f}"),
                _mean(row.exact, lambda share: f"{100 * share:.0f}"),
                _mean(row.exact_controls, lambda share: f"{100 * share:.0f}"),
                _mean(row.exposure, lambda bits: f"{bits:.1f}"),
                _range(row.auc, lambda area: f"{area:.2f}"),
            )
        )
    if sections:
        title = "Members' own models: means over members (from the least to the most)"
        show_sections(console, title, COLUMNS, sections)
    console.print(
        "Own: canaries of the member whose model it is; others: what its model shows of the other members'.",
        highlight=False,
    )
    for arm in dict.fromkeys(member_of(test.model)[0] for test in audit.ranks):
        console.print(escape(_passed(audit, arm)), highlight=False)


def _mean(found: OverMembers | None, form: Callable[[float], str]) -> str:
    return ABSENT if found is None else form(found.mean.value)


def _range(found: OverMembers | None, form: Callable[[float], str]) -> str:
    more = f" ({form(found.least)} to {form(found.most)})" if found and found.mean.n > 1 else ""
    return _mean(found, form) + more


def _passed(audit: AuditTable, arm: str) -> str:
    """Whether what one member's data taught shows in another's model."""
    tests = [test for test in audit.ranks if member_of(test.model)[0] == arm and test.whose == "others"]
    models = {test.model for test in tests}
    above = list(dict.fromkeys(test.model for test in audit.above_chance("others") if test in tests))
    if not tests:
        return f"{arm}: there are no canaries of other members to ask for."
    if not above:
        return f"{arm}: none of {len(models)} models is shown to know another member's planted canaries."
    names = ", ".join(member_of(model)[1] or "" for model in above[:MOST_NAMED])
    names += f" and {len(above) - MOST_NAMED} more" if len(above) > MOST_NAMED else ""
    return f"{arm}: {len(above)} of {len(models)} models know other members' planted canaries above chance: {names}."
