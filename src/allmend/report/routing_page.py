"""Who answers as a page of its own: of all clients' mixtures, or of the one that a member keeps to itself."""

from collections.abc import Sequence
from pathlib import Path

from allmend import __version__
from allmend.report import numbers
from allmend.report.markup import Cell, Html, figure, in_figures, join, paragraph, section, table, tag
from allmend.report.page import fill, head_of
from allmend.report.routed_text import RoutedText, in_words, scale_of, shades_of, text_block
from allmend.report.sections.routing import expert_map, experts_of, of_arm, read_in_words, weight
from allmend.results import ArmRouting, MemberRouting
from allmend.run import write_atomic

INTRO = (
    "In each layer a router weighs the experts for each token: the generalists, which all clients share, and the "
    "client’s own specialists. A large weight does not say that an expert helps."
)


def write_routing_page(path: Path, arm: ArmRouting, *, run: str) -> Path:
    """Write a page with who answers in an arm's mixtures, and return its path.

    Args:
        path: where to.
        arm: with one member at least.
        run: what the run is called.

    Raises:
        UserError: the operating system refused.
    """
    facts = [("Run", run), ("Arm", arm.arm), ("Clients", numbers.count(len(arm.members))), ("Allmend", __version__)]
    page = fill(
        title=f"{run}: who answers · allmend",
        head=head_of("Allmend, routers", f"Who answers in {run}", facts),
        contents=[("clients", "All clients"), *((f"client-{i}", one.member) for i, one in enumerate(arm.members))],
        summary=paragraph(INTRO),
        sections=[
            section("clients", "All clients", *of_arm(arm)),
            *(section(f"client-{i}", one.member, *_experts(one, arm.layers)) for i, one in enumerate(arm.members)),
        ],
    )
    write_atomic(path, page.encode())
    return path


def write_own_routing(path: Path, arm: ArmRouting, texts: Sequence[RoutedText]) -> Path:
    """Write a member's own page, which only it can read, and return its path.

    Args:
        path: where to.
        arm: with this member alone.
        texts: of its own, as its mixture reads them.

    Raises:
        UserError: the operating system refused.
    """
    (member,) = arm.members
    facts = [("Member", member.member), ("Arm", arm.arm), ("Records", numbers.count(member.records))]
    colours = shades_of(texts)
    own = [join([tag("h3", text.title), paragraph(in_words(text)), text_block(text, colours)]) for text in texts]
    page = fill(
        title=f"{member.member}: who answers · allmend",
        head=head_of(
            "Allmend, this member’s own page", f"Who answers at {member.member}", [*facts, ("Allmend", __version__)]
        ),
        contents=[("experts", "Experts"), *([("texts", "Your records")] if own else [])],
        summary=join(
            [
                paragraph(
                    "The mixture, its router and the records below have not left the member: the coordinator cannot "
                    "make this page."
                ),
                paragraph(INTRO),
                *(paragraph(warning, class_="warning") for warning in arm.warnings),
            ]
        ),
        sections=[
            section("experts", "Experts", paragraph(read_in_words([member])), *_experts(member, arm.layers)),
            *([section("texts", "Your records", scale_of(colours), *own)] if own else []),
        ],
    )
    write_atomic(path, page.encode(), mode=0o600)
    return path


def _experts(member: MemberRouting, layers: Sequence[int]) -> list[Html]:
    names = experts_of(member)
    rows = table(
        "Mean weight of each expert",
        ["Layer", *names],
        [
            [f"layer {layer}", *(Cell(weight(gate), value=gate) for gate in gates)]
            for layer, gates in zip(layers, member.gates, strict=True)
        ],
    )
    return [
        paragraph(
            f"The generalists have {weight(member.overall.value)} of the weight over all layers "
            f"({numbers.evidence(member.overall, weight)} tokens)."
        ),
        tag("div", figure("Weight of each expert", expert_map(member, layers)), class_="charts"),
        in_figures(rows, len(layers)),
    ]
