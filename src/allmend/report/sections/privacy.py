"""Which layers protected the records, and what the guarantees came to."""

import math
from collections.abc import Sequence

from allmend.report import numbers
from allmend.report.charts import Axis, Point, Series, line_chart
from allmend.report.evidence import Evidence
from allmend.report.markup import Cell, Html, Rows, details, figure, join, paragraph, section, table, tag
from allmend.results import Budget, PrivacyTable

MOST = 8
"""Accounts of an arm that have a line each; those that cost most."""
MOST_CELLS = 3000
"""Figures in the table by round; beyond, it shows every second, third … round and the last."""
POWER = join(["e", tag("sup", "ε")])
NO_GUARANTEE = "no formal guarantee"


def protects(budget: Budget) -> str:
    """The unit of protection in words."""
    if budget.unit == "member":
        return "one member with all its records"
    return f"one training record of {budget.client}" if budget.client else "one training record"


def _account(budget: Budget) -> str:
    return budget.client or "members"


def _noise(budgets: Sequence[Budget]) -> list[str]:
    """Clipping and noise as layers among the others; what they come to stands in a table of its own."""
    units = {"record": "each training record", "member": "each member with all its records"}
    noisy = {b.unit for b in budgets if b.epsilon is not None}
    return [
        f"differential privacy for {units[unit]}, ε below"
        if unit in noisy
        else f"clip for {units[unit]}, without noise"
        for unit in dict.fromkeys(b.unit for b in budgets)
    ]


def _layers(privacy: PrivacyTable) -> Html:
    def shown(layer: str) -> Html:
        bare = layer.removesuffix(NO_GUARANTEE).rstrip(" ;,.") if layer.endswith(NO_GUARANTEE) else layer
        unproven = bare != layer or "weight noise" in layer or "weight_noise" in layer
        return tag("li", bare, "; " if unproven else None, tag("strong", NO_GUARANTEE) if unproven else None)

    layers = {arm: [*words, *_noise(privacy.budgets.get(arm, ()))] for arm, words in privacy.layers.items()}
    arms = [
        tag("div", tag("dt", arm), tag("dd", tag("ul", *map(shown, words)) if words else "no layer of privacy"))
        for arm, words in layers.items()
    ]
    return tag("dl", *arms, class_="layers")


def _spent(budget: Budget) -> Cell:
    if budget.epsilon is None:
        return Cell(numbers.NONE, "no noise, no guarantee")
    factor = join([POWER, f" = {numbers.number(math.exp(min(budget.epsilon, 700.0)))}"])
    return Cell(numbers.number(budget.epsilon), factor, budget.epsilon)


def _guarantees(budgets: list[tuple[str, Budget]]) -> Html:
    body: Rows = [
        [
            arm,
            protects(b),
            _spent(b),
            Cell(numbers.power(b.delta), value=b.delta),
            Cell(numbers.number(b.noise_multiplier), value=b.noise_multiplier),
            Cell(numbers.number(b.clip), value=b.clip),
            Cell(numbers.count(b.steps), value=b.steps),
            b.sampling,
        ]
        for arm, b in budgets
    ]
    head = ["Arm", "Protects", "ε", "δ", "Noise multiplier", "Clip", "Noisy releases", "Sampling"]
    return table("Guarantees after all rounds", head, body)


def _chart(arm: str, budgets: list[Budget], top: float) -> Html:
    kept = sorted(budgets, key=lambda b: -(b.epsilon or 0.0))[:MOST]
    series = []
    for i, b in enumerate(b for b in budgets if b in kept):
        points = [
            Point(n, spent, f"{_account(b)}, round {n}\nε = {numbers.number(spent)}, δ = {numbers.power(b.delta)}")
            for n, spent in enumerate(b.by_round, 1)
            if spent is not None
        ]
        series.append(Series(_account(b), _account(b), i, tuple(points)))
    rounds = max((len(b.by_round) for b in budgets), default=0)
    x = Axis("round", ticks=tuple(map(float, range(1, rounds + 1))))
    drawn = line_chart(f"ε spent by round, {arm}", series, x, Axis("ε", low=0.0, high=top), height=240)
    return tag("div", tag("h3", arm), drawn) if drawn else drawn


def _charts(budgets: dict[str, list[Budget]]) -> Html:
    spent = [v for held in budgets.values() for b in held for v in b.by_round if v is not None]
    if not spent:
        return Html("")
    drawn = [_chart(arm, held, max(spent)) for arm, held in budgets.items()]
    more = any(len(held) > MOST for held in budgets.values())
    note = "Each round spends more; what was spent is never got back."
    note += f" The {MOST} accounts that cost most are drawn." if more else ""
    return figure("ε spent after each round", tag("div", *drawn, class_="charts"), note=note)


def _by_round(budgets: list[tuple[str, Budget]]) -> Html:
    rounds = max((len(b.by_round) for _, b in budgets), default=0)
    if not rounds:
        return Html("")
    stride = max(1, -(-rounds * len(budgets) // MOST_CELLS))
    shown = sorted({*range(0, rounds, stride), rounds - 1})

    def spent(b: Budget, i: int) -> Cell:
        value = b.by_round[i] if i < len(b.by_round) else None
        return Cell(numbers.NONE) if value is None else Cell(numbers.number(value), value=value)

    body: Rows = [[_account(b), arm, *(spent(b, i) for i in shown)] for arm, b in budgets]
    head = ["Account", "Arm", *(f"Round {i + 1}" for i in shown)]
    return details("ε after each round in figures", table("ε after each round", head, body))


def _statements(budgets: list[tuple[str, Budget]]) -> list[Html]:
    """What the guarantees rest on."""
    told = []
    simulated = list(dict.fromkeys(arm for arm, b in budgets if b.simulated and b.epsilon is not None))
    secret = list(dict.fromkeys(arm for arm, b in budgets if not b.simulated and b.epsilon is not None))
    if simulated:
        told.append(
            f"Simulation ({', '.join(simulated)}): noise and samples came from the recipe’s seed, so whoever knows the "
            "seed can take them out. The ε is that of the same run with secret noise (privacy.randomness = "
            '"secure").'
        )
    if secret:
        told.append(
            f"Noise and samples came from the operating system’s cryptographic generator ({', '.join(secret)})."
        )
    for arm in dict.fromkeys(arm for arm, b in budgets if b.stopped is not None):
        after = min(b.stopped for name, b in budgets if name == arm and b.stopped is not None)
        told.append(f"The budget stopped {arm} after round {after}: another round would have exceeded it.")
    told.append("What was learnt from earlier runs on the same data, such as a learning rate, is not counted.")
    return [tag("li", words) for words in told]


def _how_to_read(budgets: list[tuple[str, Budget]]) -> Html | None:
    """What ε means, and what it holds for; None where no account has one."""
    holds = {
        "record": "what leaves the client and the final model (for a record)",
        "member": "the models sent to all (for a member)",
    }
    units = {b.unit for _, b in budgets if b.epsilon is not None}
    if not units:
        return None
    return paragraph(
        tag("strong", "How to read ε: "),
        " and ".join(words for unit, words in holds.items() if unit in units),
        " are at most ",
        POWER,
        " times as likely with the protected unit in the data as without it, but for a chance of about δ. This does "
        "not hold for the run folder and this page, whose losses carry no noise.",
    )


def privacy(evidence: Evidence) -> Html:
    """The section."""
    title, table_ = "What protected the records", evidence.privacy
    if table_ is None:
        return section("privacy", title, paragraph("No layer of privacy is recorded for this run.", class_="note"))
    held = {arm: list(budgets) for arm, budgets in table_.budgets.items() if budgets}
    flat = [(arm, b) for arm, budgets in held.items() for b in budgets]
    if not flat and not any(table_.layers.values()):
        words = "No layer of privacy was on in any arm: what the models kept is what the audit measures."
        return section("privacy", title, paragraph(words))
    if not flat:
        words = "No arm has a guarantee of differential privacy: what the layers bought is what the audit measures."
        return section("privacy", title, _layers(table_), paragraph(words))
    return section(
        "privacy",
        title,
        _layers(table_),
        _how_to_read(flat),
        _guarantees(flat),
        tag("div", _charts(held), tag("ul", *_statements(flat), class_="statements"), class_="charts"),
        _by_round(flat),
    )
