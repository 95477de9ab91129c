"""What a model thinks of a text it may have seen: token log-likelihoods in one teacher-forced pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from allmend.data.canaries import Canary
from allmend.data.chat import Encoded
from allmend.data.packing import pack
from allmend.intervals import difference, mean
from allmend.learn.objective import log_likelihood_and_hit
from allmend.results import LikelihoodGap


@dataclass(frozen=True)
class Reading:
    """One text under one model.

    Attributes:
        ids: its tokens, int64 [T].
        log_likelihood: of the tokens from the second on (nats), float64 [T − 1].
        hit: whether each of them is the model's most likely token, bool [T − 1].
    """

    ids: torch.Tensor
    log_likelihood: torch.Tensor
    hit: torch.Tensor


@torch.inference_mode()
def read_texts(
    model: Any,
    encoded: Sequence[Encoded],
    *,
    tokens_per_pass: int = 512,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> list[Reading]:
    """Read running texts once each, packed.

    Args:
        model: a causal language model in evaluation mode.
        encoded: texts whose every token is a target.
        tokens_per_pass: capacity of a packed row.
        on_tokens: told the tokens of each pass.
    """
    device = next(model.parameters()).device
    values = [torch.zeros(max(0, len(text) - 1), dtype=torch.float64) for text in encoded]
    hits = [torch.zeros(max(0, len(text) - 1), dtype=torch.bool) for text in encoded]
    for row in pack(encoded, tokens_per_pass):
        likelihood, hit = (part.cpu() for part in log_likelihood_and_hit(model, row.to(device)))
        for owner in sorted(set(row.owner.tolist())):
            mine = row.owner == owner
            values[owner][row.target_at[mine] - 1] = likelihood[mine].double()
            hits[owner][row.target_at[mine] - 1] = hit[mine]
        on_tokens(row.tokens)
    return [Reading(text.ids, value, hit) for text, value, hit in zip(encoded, values, hits, strict=True)]


def likelihood_gaps(model: str, canaries: Sequence[Canary], readings: Sequence[Reading]) -> list[LikelihoodGap]:
    """Counterfactual memorisation by number of copies: inserted minus control, mean log-likelihood per token.

    A model that never saw any canary has a gap of 0 within its interval, because a coin decided which was inserted.
    A number of copies that lacks inserted canaries or controls has no gap.
    """
    per_token = [reading.log_likelihood.mean().item() for reading in readings]
    gaps = []
    for copies in sorted({canary.copies for canary in canaries}):
        groups: dict[bool, list[float]] = {True: [], False: []}
        for canary, value in zip(canaries, per_token, strict=True):
            if canary.copies == copies:
                groups[canary.inserted].append(value)
        if not all(groups.values()):
            continue
        gaps.append(
            LikelihoodGap(
                model=model,
                copies=copies,
                inserted=mean(groups[True]),
                control=mean(groups[False]),
                gap=difference(groups[True], groups[False]),
            )
        )
    return gaps
