"""Whose records: counts by client, what was dropped or cut, warnings of the run."""

from allmend.report import numbers
from allmend.report.evidence import Evidence
from allmend.report.markup import Cell, Html, Rows, paragraph, section, table, tag


def records(evidence: Evidence) -> Html:
    """The section."""
    start = evidence.start
    warnings = [tag("li", warning) for warning in evidence.warnings]
    told = [tag("h3", "Warnings"), tag("ul", *warnings, class_="warnings")] if warnings else []
    if start is None:
        return section("data", "The data", paragraph("Not loaded yet.", class_="missing"), *told)
    kinds = list(dict.fromkeys(kind for notes in start.notes.values() for kind in notes))
    names = dict.fromkeys((*start.clients, *start.held_out, *start.notes))

    def line(name: str, train: int | None, held_out: int | None, notes: dict[str, int]) -> list[str | Cell]:
        values = [train, held_out, *(notes.get(kind, 0) for kind in kinds)]
        cells = [Cell(numbers.NONE) if v is None else Cell(numbers.count(v), value=v) for v in values]
        return [name, *cells]

    body: Rows = [
        line(name, start.clients.get(name), start.held_out.get(name), start.notes.get(name, {})) for name in names
    ]
    if len(names) > 1:
        sums = {kind: sum(notes.get(kind, 0) for notes in start.notes.values()) for kind in kinds}
        body.append(line("all", sum(start.clients.values()), sum(start.held_out.values()), sums))
    if not names:
        words = (
            "Members keep the numbers of their records to themselves." if evidence.offered else "No client is known."
        )
        return section("data", "The data", paragraph(words), *told)
    head = ["Client", "Training records", "Held-out records", *(kind.replace("_", " ").capitalize() for kind in kinds)]
    words = "Training records include planted canaries. "
    words += "The other columns count what happened to records while they were read." if kinds else ""
    return section("data", "The data", paragraph(words), table("Records by client", head, body), *told)
