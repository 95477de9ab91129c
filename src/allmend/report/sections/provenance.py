"""Where the figures come from: the run's head line, what is missing and how to go on, recipe, versions, machine."""

from allmend import __version__
from allmend.events import RunFinished, Stopped
from allmend.report import numbers
from allmend.report.evidence import Evidence
from allmend.report.markup import Cell, Html, Rows, code, details, join, paragraph, section, table, tag, text


def state(evidence: Evidence) -> tuple[str, str]:
    """How the run ended: a word for the style sheet and words for the reader."""
    if not evidence.is_run:
        return "finished", "audit of a model"
    match evidence.end:
        case RunFinished():
            return "finished", "finished"
        case Stopped():
            return "stopped", "stopped"
    return ("unfinished", "running") if evidence.running else ("unfinished", "ended without notice")


def name(evidence: Evidence) -> str:
    """The run's name, or its folder's."""
    return evidence.start.run if evidence.start else evidence.run.resolve().name


def head(evidence: Evidence) -> Html:
    """Title, state and the facts of the run."""
    kind, words = state(evidence)
    start = evidence.start
    facts: list[tuple[str, str]] = []
    if start:
        facts.append(("Model", start.model))
        trained = {name for rounds in evidence.rounds.values() for one in rounds for name in one.clients}
        facts.append(("Members", f"{len(start.clients or trained or evidence.offered)}"))
    if evidence.arms:
        facts.append(("Arms", ", ".join(evidence.arms)))
    if evidence.begun is not None and evidence.latest is not None:
        facts.append(("Started", numbers.moment(evidence.begun)))
        took = evidence.end.seconds if isinstance(evidence.end, RunFinished) else evidence.latest - evidence.begun
        resumed = evidence.sessions - 1
        again = f", resumed {numbers.counted(resumed, 'time')}" if resumed > 0 else ""
        facts.append(("Took" if kind == "finished" else "Lasted so far", numbers.duration(took) + again))
    facts.append(("Allmend", start.allmend if start else __version__))
    pairs = [tag("div", tag("dt", term), tag("dd", value)) for term, value in facts]
    return join(
        [
            paragraph("Allmend run report" if evidence.is_run else "Allmend audit report", class_="kicker"),
            tag("h1", name(evidence)),
            paragraph(words, class_=f"state {kind}"),
            tag("dl", *pairs, class_="facts"),
        ]
    )


def missing(evidence: Evidence) -> Html | None:
    """What the run still owes, and what to type; None when nothing is missing."""
    kind, _ = state(evidence)
    if not evidence.is_run:
        return None
    lacks = []
    if evidence.start is None:
        lacks.append("The event log (events.jsonl) is missing or empty: no curves, no exchange, no data notes.")
    if evidence.utility is None:
        lacks.append("Utility was not measured (results/utility.json).")
    if evidence.audit is None and "[canaries]" in (evidence.recipe or "[canaries]"):
        lacks.append("Memorisation was not audited (results/audit.json).")
    if evidence.recipe is None:
        lacks.append("The recipe (recipe.toml) is missing.")
    if kind == "finished" and not lacks:
        return None
    hopeless = not evidence.running and isinstance(evidence.end, Stopped) and not evidence.end.resumable
    if evidence.running or hopeless:
        onward = None
    elif kind == "finished":
        onward = code(f"allmend audit {evidence.run}") if evidence.audit is None else None
    elif evidence.offered:
        onward = text("start it again with the same command")
    else:
        onward = code(f"allmend tune --resume {evidence.run}")
    stopped = evidence.end if isinstance(evidence.end, Stopped) and not evidence.running else None
    title = "This run is complete, but not everything is here" if kind == "finished" else "This run is not complete"
    title = "This run goes on" if evidence.running else title
    shares = {phase: share for phase, share in evidence.progress.items() if kind != "finished"}
    progress = table(
        "Progress by phase",
        ["Phase", "Done"],
        [[phase, Cell(numbers.percent(share, 0), value=share)] for phase, share in shares.items()],
    )
    return tag(
        "aside",
        tag("h2", title, id="missing-title"),
        paragraph(f"It stopped: {stopped.cause}.") if stopped else None,
        tag("ul", *(tag("li", lack) for lack in lacks)) if lacks else None,
        paragraph("To go on: ", onward) if onward else None,
        paragraph("Going on would only meet the same end: start a new run.") if hopeless else None,
        details("How far it got", progress) if progress else None,
        class_="missing",
        aria_labelledby="missing-title",
    )


def provenance(evidence: Evidence) -> Html:
    """The section."""
    start = evidence.start
    parts: list[Html | None] = []
    if evidence.recipe is not None:
        parts.append(details("Recipe (recipe.toml)", tag("pre", tag("code", evidence.recipe), tabindex=0)))
    if start is not None:
        threads = numbers.counted(start.threads, "thread")
        parts.append(paragraph(f"Machine: {start.machine}, {threads}."))
        named = {"allmend": start.allmend} | start.versions
        versions: Rows = [[package, version] for package, version in named.items()]
        parts.append(table("Versions", ["Package", "Version"], versions))
    seeds = [
        f"{kind} {results.seed}"
        for kind, results in (("utility", evidence.utility), ("audit", evidence.audit))
        if results is not None
    ]
    if seeds:
        parts.append(paragraph(f"Seeds of the measurements: {', '.join(seeds)}."))
    parts.append(paragraph("Folder: ", code(str(evidence.run)), f". Page written by allmend {__version__}."))
    return section("provenance", "Recipe and versions" if evidence.is_run else "Where the figures come from", *parts)
