"""Evaluation by log-likelihood: perplexity of responses and accuracy on multiple-choice questions.

A question goes through the model once: its prompt is shared by all choices, each of which is a branch behind it,
many questions share a pass, and logits are computed on the choices' tokens only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from allmend.data.chat import Encoded
from allmend.data.packing import pack
from allmend.data.records import Record
from allmend.intervals import exp_mean, share
from allmend.learn.objective import log_likelihood
from allmend.results import Estimate, Utility


@dataclass(frozen=True)
class Score:
    """One held-out record under one model.

    Attributes:
        id: the record's.
        kind: the record's.
        nll: negative log-likelihood of the (right) response, summed over its tokens (nats).
        tokens: of the response.
        choice: the choice with the highest log-likelihood per token; None where there are no choices.
        answer: the right choice; None where there are none.
        choices: how many there are.
    """

    id: str
    kind: str
    nll: float
    tokens: int
    choice: int | None = None
    answer: int | None = None
    choices: int = 0

    @property
    def right(self) -> bool:
        return self.choice is not None and self.choice == self.answer


@torch.inference_mode()
def score(
    model: Any,
    records: Sequence[Record],
    encoded: Sequence[Encoded],
    *,
    tokens_per_pass: int = 512,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> list[Score]:
    """Score every record: `encoded[i]` is `records[i]` as `Encoder.for_evaluation` gives it.

    Args:
        model: a causal language model in evaluation mode.
        records: held-out records.
        encoded: the same, encoded.
        tokens_per_pass: capacity of a packed row.
        on_tokens: told the tokens of each pass.
    """
    device = next(model.parameters()).device
    width = 1 + max((len(record.choices) for record in records), default=0)
    total = torch.zeros(len(records), width, dtype=torch.float64)
    count = torch.zeros(len(records), width, dtype=torch.int64)
    for row in pack(encoded, tokens_per_pass):
        values = log_likelihood(model, row.to(device)).cpu().double()
        at = (row.owner, row.branch)
        total.index_put_(at, values, accumulate=True)
        count.index_put_(at, torch.ones_like(row.owner), accumulate=True)
        on_tokens(row.tokens)
    return [_score(record, total[index], count[index]) for index, record in enumerate(records)]


def _score(record: Record, total: torch.Tensor, count: torch.Tensor) -> Score:
    if not record.choices or record.answer is None:
        return Score(record.id, record.kind, -total[0].item(), int(count[0]))
    branches = slice(1, 1 + len(record.choices))
    # a choice without a token to score has no likelihood; it must not win with a sum of nothing
    per_token = torch.where(count[branches] > 0, total[branches] / count[branches], -torch.inf)
    answer = 1 + record.answer
    return Score(
        record.id,
        record.kind,
        -total[answer].item(),
        int(count[answer]),
        choice=int(per_token.argmax()),
        answer=record.answer,
        choices=len(record.choices),
    )


def accuracy(scores: Sequence[Score]) -> Estimate | None:
    """Share of questions answered right; None when there are no questions."""
    asked = [score for score in scores if score.answer is not None]
    return share(sum(score.right for score in asked), len(asked)) if asked else None


def utility(scores: Sequence[Score], *, model: str, held_out: str, member: str | None = None) -> Utility:
    """The row of the utility table for one model on one held-out set."""
    learnt = [score for score in scores if score.tokens]
    guesses = [1 / score.choices for score in scores if score.choices]
    kinds = sorted({score.kind for score in scores if score.kind and score.answer is not None})
    by_kind = {kind: accuracy([score for score in scores if score.kind == kind]) for kind in kinds}
    return Utility(
        model=model,
        member=member,
        held_out=held_out,
        perplexity=exp_mean([s.nll for s in learnt], [s.tokens for s in learnt]) if learnt else None,
        accuracy=accuracy(scores),
        by_kind={kind: estimate for kind, estimate in by_kind.items() if estimate},
        chance=sum(guesses) / len(guesses) if guesses else None,
    )
