"""What a member keeps to itself: the scores of its own records, as a table and as a page."""

from collections.abc import Mapping
from pathlib import Path

import torch

from allmend.attribution.pages import PAGE
from allmend.federation.member import Member
from allmend.influence.table import ROWS, Row, write_scores
from allmend.report.influence_figures import ScoredRecord
from allmend.report.own import write_own
from allmend.strategy import State


def keep_own(folder: Path, member: Member, state: State, texts: Mapping[str, str], *, arm: str, method: str) -> Path:
    """Write a member's scores to `influence.parquet` and `influence.html`, and return the page's path.

    Args:
        folder: where to; it is the member's own.
        member: with the records that were scored, in their order.
        state: of the member after the last leg.
        texts: of the records, by id.
        arm: whose weights influence was measured at.
        method: of the scores.

    Raises:
        UserError: the operating system refused.
    """
    values, losses = (state.tensors[f"influence/{what}"] for what in ("scores", "losses"))
    tokens = torch.tensor([max(1, int(one.target.sum())) for one in member.records], dtype=torch.float64)
    scored: list[ScoredRecord] = []
    for place, target in enumerate(str(state.facts["names"]).split("\n")):
        column = values[:, place]
        ranks = torch.empty(len(column), dtype=torch.int64)
        ranks[column.argsort(descending=True, stable=True)] = torch.arange(1, len(column) + 1)
        scored += [
            ScoredRecord(record.id, target, float(value), int(rank), float(loss), texts.get(record.id, ""))
            for record, value, rank, loss in zip(member.records, column, ranks, losses / tokens, strict=True)
        ]
    rows = [Row(one.id, member.name, one.target, one.score, one.rank, one.loss, method) for one in scored]
    write_scores(folder / ROWS, rows)
    return write_own(folder / PAGE, scored, client=member.name, arm=arm)
