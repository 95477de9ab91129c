"""How many steps deep a run's models must be: what fewer cost, and the plan that was chosen."""

from allmend.report.depth_figures import LIMITS, depths, loss_by_depth, plan_in_words, told
from allmend.report.evidence import Evidence
from allmend.report.markup import Html, join, paragraph, section, tag
from allmend.results import DepthSearch


def depth(evidence: Evidence) -> Html:
    """The section; nothing where no model was searched."""
    searches = evidence.depth.searches if evidence.depth else ()
    if not searches:
        return Html("")
    intro = (
        "How many steps must the model take one after the other? Neighbouring layers that run side by side make one "
        "wider layer: fewer steps, the same parameters, no training. What that costs was measured on text that the "
        "search had not seen."
    )
    return section(
        "depth",
        "How deep it must be",
        paragraph(intro),
        *(_arm(one, many=len(searches) > 1) for one in searches),
        paragraph(LIMITS),
    )


def _arm(found: DepthSearch, *, many: bool) -> Html:
    return join(
        [
            tag("h3", found.arm) if many else None,
            paragraph(f"{told(found)} {plan_in_words(found)}"),
            depths(found.frontier, loss_by_depth(found.frontier)),
            *(paragraph(note, class_="missing") for note in found.frontier.notes),
        ]
    )
