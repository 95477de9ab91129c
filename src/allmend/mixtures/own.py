"""What a member of a run among organisations keeps to itself of its mixture's routing: figures and a page."""

from pathlib import Path
from typing import Any

from allmend.federation.member import Member
from allmend.learn.routing import layers_with_experts
from allmend.mixtures.coloured import routed_text
from allmend.mixtures.routing import TABLE, as_arm, routing_of_member
from allmend.models.mixture import Mixture
from allmend.report.routing_page import write_own_routing
from allmend.run import write_atomic

PAGE = "routing.html"

SHOWN = 5
"""Records of its own that a member sees coloured."""


def keep_own(folder: Path, mixture: Mixture, member: Member, tokenizer: Any, *, arm: str) -> Path | None:
    """Measure who answers in a member's mixture, write it to `routing.json` and `routing.html`, return the page's path.

    Args:
        folder: where to; it is the member's own.
        mixture: with the member's state.
        member: its records; those that it holds out are read, or else its target.
        tokenizer: of the base.
        arm: whose mixture it is.

    Returns:
        None where the member has no record to read.

    Raises:
        UserError: the operating system refused.
    """
    found = routing_of_member(mixture, member)
    if found is None:
        return None
    routing = as_arm(arm, layers_with_experts(mixture), [found])
    records = [record for record in member.held_out or member.target if len(record)][:SHOWN]
    texts = [routed_text(mixture, tokenizer, record.ids, title=record.id) for record in records]
    write_atomic(folder / f"{TABLE}.json", routing.model_dump_json(indent=1).encode(), mode=0o600)
    return write_own_routing(folder / PAGE, routing, texts)
