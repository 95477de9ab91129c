"""One self-contained page per run: `RUN/report.html`.

The page needs nothing beside itself, asks the network for nothing (its content security policy forbids it)
and is complete without scripts. It reads the run's files and no other state, so it can be written at any time,
also for a run that stopped half-way.
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

from allmend.report.evidence import Evidence, read_evidence
from allmend.report.markup import Html, join, paragraph, tag, text
from allmend.report.sections.collaborators import collaborators
from allmend.report.sections.depth import depth
from allmend.report.sections.exchange import exchange
from allmend.report.sections.influence import influence
from allmend.report.sections.learning import learning
from allmend.report.sections.memorisation import memorisation
from allmend.report.sections.personalised import personalised
from allmend.report.sections.privacy import privacy
from allmend.report.sections.provenance import head, missing, name, provenance
from allmend.report.sections.records import records
from allmend.report.sections.routing import routing
from allmend.report.sections.utility import utility
from allmend.report.summary import summary
from allmend.run import write_atomic

FILE = "report.html"
SECTIONS = (
    ("utility", "Utility", utility),
    ("personalised", "Personalised", personalised),
    ("learning", "Learning", learning),
    ("collaborators", "Collaborators", collaborators),
    ("routing", "Routers", routing),
    ("memorisation", "Memorisation", memorisation),
    ("influence", "Influence", influence),
    ("depth", "Depth", depth),
    ("privacy", "Privacy", privacy),
    ("exchange", "Exchange", exchange),
    ("data", "Data", records),
    ("provenance", "Provenance", provenance),
)
OF_AN_AUDIT = ("memorisation", "provenance")
"""Sections of a page about a model that was made elsewhere."""


def write_report(run: Path | str) -> Path:
    """Write the page of a run and return its path.

    Args:
        run: the run's folder. Its event log, results and recipe may each be missing; the page says what is.

    Raises:
        UserError: the folder holds nothing of a run, one of its files is broken, or it cannot be written.
    """
    path = Path(run) / FILE
    write_atomic(path, page(read_evidence(Path(run))).encode())
    return path


def page(evidence: Evidence) -> str:
    """The whole page as text."""
    parts = [part for part in SECTIONS if evidence.is_run or part[0] in OF_AN_AUDIT]
    made = [(anchor, title, section(evidence)) for anchor, title, section in parts]
    shown = [part for part in made if part[2]]
    return fill(
        title=f"{name(evidence)} · allmend",
        head=head(evidence),
        contents=[(anchor, title) for anchor, title, _ in shown],
        missing=missing(evidence),
        summary=summary(evidence),
        sections=[section for *_, section in shown],
    )


def head_of(kicker: str, title: str, facts: Sequence[tuple[str, str]]) -> Html:
    """What stands on top of a page: what kind of page it is, its title, and terms with what they are here."""
    return join(
        [
            paragraph(kicker, class_="kicker"),
            tag("h1", title),
            tag("dl", *(tag("div", tag("dt", term), tag("dd", value)) for term, value in facts), class_="facts"),
        ]
    )


def fill(
    *,
    title: str,
    head: Html,
    contents: Sequence[tuple[str, str]],
    summary: Html,
    sections: Sequence[Html],
    missing: Html | None = None,
) -> str:
    """A page with this content.

    Args:
        title: of the window.
        head: what stands on top.
        contents: anchors and titles of the sections.
        summary: before them.
        sections: what there is to read.
        missing: what is not there, and how to come by it.
    """
    own = files("allmend.report")
    return Template(own.joinpath("page.html").read_text()).substitute(
        title=text(title),
        style=Html(own.joinpath("page.css").read_text()),
        head=head,
        contents=join(tag("li", tag("a", name, href=f"#{anchor}")) for anchor, name in contents),
        missing=missing or "",
        summary=summary,
        sections=join(sections),
        script=Html(own.joinpath("page.js").read_text()),
    )
