"""The section on memorisation in a model's card: what was measured, in a file that travels with the weights.

A card is public where the model is, so it names no client and no path of the machine that made it.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt

from allmend.errors import UserError
from allmend.report import bounds, numbers
from allmend.report.base_rate import Secrets, hits, outcomes, secrets_of
from allmend.results import BASE, AuditTable, Budget, Estimate, Exposure, PrivacyTable, Whose, longest_prefix
from allmend.run import write_atomic

FILE = "README.md"
HEADING = "Memorisation"
LIMITS = (
    "Absence of extraction is not absence of memorisation: other prompts, or the weights themselves, may give more.",
    "Canaries measure their own kind of secret, and controls remove guessing from the template, not what the model "
    "learns about one canary from another.",
    "A small model memorises less than a large one, and a guarantee of differential privacy protects its unit alone.",
)
ON_THE_HUB = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(@[\w./-]+)?")
PLANTED = {True: "planted", False: "controls"}
FROM_A_WHEEL = re.compile(r"pypi:[\w.-]+")


def memorisation_card(audit: AuditTable, privacy: PrivacyTable | None, *, arm: str, member: str | None = None) -> str:
    """The card's section on what one model memorised.

    Args:
        audit: of the run; its rows for `base` and the model are used.
        privacy: of the run; None where no layers are recorded.
        arm: the arm's name in the tables.
        member: whose own model it is; None for one that all members share.

    Returns:
        Markdown that starts with the heading `## Memorisation` and ends with a line break.
    """
    guarantee = bounds.guaranteed(arm, audit, privacy)
    parts = [
        f"## {HEADING}",
        _intro(audit),
        *(
            _measures(audit.of(None), arm, guarantee=guarantee)
            if member is None
            else _of_a_member(audit, f"{arm}/{member}", guarantee=guarantee)
        ),
        *_layers(privacy, arm, guarantee=guarantee),
    ]
    if audit.design_changed:
        parts.append("**The design of the audit was changed after training: read the figures as exploration.**")
    if audit.refused:  # the reasons may name clients
        refused = numbers.counted(len(audit.refused), "figure was", "figures were")
        parts.append(f"{refused} refused; the report of the run gives the reasons.")
    parts.append("\n".join(["Limits:", "", *(f"- {limit}" for limit in LIMITS)]))
    parts.append(
        "To repeat it from the run: `allmend audit RUN`. With the run’s canaries and an adapter: "
        "`allmend audit BASE_MODEL --adapter THIS_FOLDER --canaries canaries.jsonl`; with a whole model: "
        "`allmend audit THIS_FOLDER --canaries canaries.jsonl`."
    )
    return "\n\n".join(parts) + "\n"


def _intro(audit: AuditTable) -> str:
    planted, controls = (numbers.count(n) for n in (audit.canaries, audit.controls))
    return (
        f"Before training, {planted} synthetic records (canaries) were planted in the data; {controls} from the same "
        "generator were kept out (controls). What comes out of controls as easily was guessed, not memorised. "
        f"In brackets: 95{numbers.THIN}% intervals."
    )


def _measures(audit: AuditTable, model: str, *, guarantee: bool) -> Iterator[str]:
    yield from _extraction(audit, model)
    yield from _further(audit, model, guarantee=guarantee)


def _of_a_member(audit: AuditTable, model: str, *, guarantee: bool) -> Iterator[str]:
    """What the model keeps of its member's canaries, and shows of the others', none of whom is named."""
    yield (
        "This is one member's own model. Its figures are of canaries of that member's data, and, apart, of the other "
        "members': what passed between members by working together. The base model's are of all canaries."
    )
    headings: dict[Whose, str] = {"own": "The member's own canaries", "others": "The other members' canaries"}
    for whose, heading in headings.items():
        yield f"### {heading}"
        tests = [test for test in audit.ranks if test.whose == whose]
        if own := [test.p for test in tests if test.model == model]:
            above = any(test.model == model for test in audit.above_chance(whose))
            yield (
                f"Planted ones are {'' if above else 'not shown to be '}told from controls above chance (least p "
                f"{numbers.chance(min(own))}; judged among {numbers.counted(len(tests), 'test')} of the run's models)."
            )
        yield from _measures(audit.of(whose, model), model, guarantee=guarantee)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _share(estimate: Estimate | None) -> str:
    return numbers.NONE if estimate is None else numbers.out_of(*hits([estimate])) + _ends(estimate)


def _secrets(found: Secrets | None) -> str:
    return numbers.NONE if found is None else numbers.out_of(found.out, found.asked) + _ends(found.share)


def _ends(share: Estimate) -> str:
    ends = numbers.interval(share, lambda end: numbers.hundredths(end, 0))
    return f" ({ends}{numbers.THIN}%)" if ends else ""


def _plain(estimate: Estimate | None) -> str:
    if estimate is None:
        return numbers.NONE
    ends = numbers.interval(estimate, numbers.number)
    return f"{numbers.number(estimate.value)} ({f'{ends}; ' if ends else ''}{numbers.sample(estimate)})"


def _extraction(audit: AuditTable, arm: str) -> Iterator[str]:
    """Extraction and likelihood gap by number of copies, the base model beside them."""
    found = {o.copies: o for o in outcomes(audit, arm)}
    base = {o.copies: o for o in outcomes(audit, BASE)}
    gaps = {(gap.model, gap.copies): gap.gap for gap in audit.gaps}
    copies = sorted({*found, *(copies for model, copies in gaps if model == arm)})
    if not copies:
        yield f"No figure of extraction or likelihood for {arm} is in the audit."
        return

    def line(number: int) -> list[str]:
        o, untrained = found.get(number), base.get(number)
        planted, control = (o.planted, o.control) if o else (None, None)
        return [
            numbers.count(number),
            *(_share(e.exact if e else None) for e in (planted, control, untrained.planted if untrained else None)),
            *(_secrets(secrets_of(e)) for e in (planted, control)),
            _plain(gaps.get((arm, number))),
            _plain(gaps.get((BASE, number))),
            o.verdict.words if o else numbers.NONE,
        ]

    if found:
        yield (
            "*Recited*: continued without an error, greedily. *Secrets*: names, dates and numbers behind "
            "the prefix that come out; the interval is that of their share, mean over canaries. Both given the first "
            f"{longest_prefix(audit.extraction)}. *Gap*: log-likelihood over controls, nats per token."
        )
    recited = ["recited: planted", "controls", "base model", "secrets: planted", "controls"]
    yield _table(["copies", *recited, "gap", "gap of base model", "verdict"], [line(number) for number in copies])


def _further(audit: AuditTable, arm: str, *, guarantee: bool) -> Iterator[str]:
    """Exposure, membership and measured ε, each for the most copies; ε of a single one where there is a guarantee."""
    lines = []
    exposed = [e for e in audit.exposure if e.model == arm]
    for slot, values in dict.fromkeys((e.slot, e.values) for e in exposed):
        lines.append(_exposed([e for e in exposed if (e.slot, e.values) == (slot, values)]))
    told = [m for m in audit.membership if m.model == arm and m.copies is not None]
    scored = [m for m in told if m.score == "ratio"] or told
    if scored:
        m = max(scored, key=lambda m: m.copies or 0)
        score = f"score `{m.score}`, {numbers.counted(m.copies or 0, 'copy', 'copies')}"
        lines.append(f"Membership ({score}): AUC {_plain(m.auc)}; guessing is 0.5.")
    if known := [b for b in audit.epsilon if b.model == arm]:
        b = bounds.quoted(known, beside_guarantee=guarantee)
        only = f" ({bounds.accounted(b, guarantee=True)})" if guarantee and b.accounted is None else ""
        lines.append(
            f"Measured ε of {bounds.about(b)}: {bounds.measured(b)}{only} at {numbers.percent(b.confidence, 0)} "
            f"confidence, δ = {numbers.power(b.delta)}, {numbers.out_of(b.right, b.guesses)} guesses right."
        )
    if lines:
        yield "\n".join(f"- {line}" for line in lines)


def _exposed(rows: list[Exposure]) -> str:
    most = max(e.copies for e in rows)
    at = {e.inserted: f"{PLANTED[e.inserted]} {_plain(e.exposure)}" for e in rows if e.copies == most}
    among = f"{numbers.count(rows[0].values)} values, {numbers.counted(most, 'copy', 'copies')}"
    shown = ", ".join(at[inserted] for inserted in (True, False) if inserted in at)
    return f"Exposure of `{rows[0].slot}` ({among}), bits: {shown}; guessing is 1.44."


def _without_counts(layer: str) -> str:
    """A layer's settings without what it counted in training records.

    The counts carry no noise, and the card lies in the folder that the guarantee is about. They stand behind a colon,
    where weight noise alone has a setting.
    """
    return layer if layer.startswith("weight noise") else layer.partition(":")[0]


def _layers(privacy: PrivacyTable | None, arm: str, *, guarantee: bool) -> Iterator[str]:
    """The layers that were on, and the dearest account of each unit of protection."""
    if privacy is None:
        return
    dearest: dict[str, tuple[float, Budget]] = {}
    for b in privacy.budgets.get(arm, ()):
        if b.epsilon is not None and b.epsilon >= dearest.get(b.unit, (0.0,))[0]:
            dearest[b.unit] = (b.epsilon, b)
    lines = [_without_counts(layer) if guarantee else layer for layer in privacy.layers.get(arm, ())]
    for unit, (epsilon, b) in dearest.items():
        what = "one member with all its records" if unit == "member" else "one training record"
        noise = f"noise multiplier {numbers.number(b.noise_multiplier)}, clip {numbers.number(b.clip)}"
        noise += ", simulated noise" if b.simulated else ""
        lines.append(
            f"Accounted ε for {what}: at most {numbers.number(epsilon)} at δ = {numbers.power(b.delta)} ({noise})."
        )
    if lines:
        yield "\n".join(["Layers of privacy:", "", *(f"- {line}" for line in lines)])
    else:
        yield "No layer of privacy was on."


# --- the file


def write_card(folder: Path, section: str, *, base_model: str | None) -> None:
    """Put a section into the card of a model folder, in the place of an older one with the same heading.

    A folder without a card gets one, with the metadata that the Hugging Face Hub reads.

    Args:
        folder: of an adapter or a model.
        section: Markdown that starts with its heading; what is replaced ends at the next heading of its level or above.
        base_model: source of the base model as the recipe names it; only names that mean the same on another machine
            are written down.

    Raises:
        UserError: the card that is there is not UTF-8 text, or the folder cannot be written.
    """
    path = folder / FILE
    if not path.is_file():
        write_atomic(path, f"{_opening(folder, base_model)}\n{section}".encode())
        return
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"is not UTF-8 text (byte {error.start})", where=path, hint="Convert it, or move it away to get a new card."
        ) from error
    write_atomic(path, replaced(text, section).encode())


def replaced(text: str, section: str) -> str:
    """A Markdown text with a section in the place of that with the same heading, at the end where there is none."""
    level, title, _ = _headings(section)[0]
    headings = _headings(text)
    start = next((line for known, name, line in headings if (known, name) == (level, title)), None)
    if start is None:
        gap = "" if not text or text.endswith("\n\n") else "\n" if text.endswith("\n") else "\n\n"
        return f"{text}{gap}{section}"
    end = next((line for known, _, line in headings if line > start and known <= level), None)
    lines = re.split(r"(?<=\n)|(?<=\r)(?!\n)", text)
    rest = "".join(lines[end:]) if end is not None else ""
    return "".join(lines[:start]) + section + (f"\n{rest}" if rest else "")


def _headings(text: str) -> list[tuple[int, str, int]]:
    """Level, title and line of each heading, those inside lists, quotes and code left out."""
    tokens = MarkdownIt("commonmark").parse(text)
    return [
        (int(token.tag[1]), tokens[i + 1].content, token.map[0])
        for i, token in enumerate(tokens)
        if token.type == "heading_open" and token.level == 0 and token.map
    ]


def _opening(folder: Path, base_model: str | None) -> str:
    """Metadata for the Hub and the title."""
    adapter, mixture = ((folder / name).is_file() for name in ("adapter_config.json", "mixture.json"))
    named = "" if base_model is None or Path(base_model).exists() else base_model
    hub = None if named.lower().endswith(".gguf") else ON_THE_HUB.fullmatch(named)
    known = named if hub or FROM_A_WHEEL.fullmatch(named) else None
    lines = ["---", *([] if mixture else [f"library_name: {'peft' if adapter else 'transformers'}"])]
    lines += [f"base_model: {hub['name']}"] if hub else []
    lines += ["tags:", "- allmend", "- federated-learning", *(["- lora"] if adapter else []), "---", ""]
    kind = "Adapter" if adapter else "Mixture of LoRA experts" if mixture else "Model"
    lines += [f"# {kind} tuned with Allmend", ""]
    lines += [f"Base model: `{known}`.", ""] if known else []
    return "\n".join(lines)
