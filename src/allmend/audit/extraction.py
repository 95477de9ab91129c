"""Extraction: does a prompt with a canary's beginning bring out the rest, word for word or nearly?

Discoverable extraction as in Carlini et al., "Quantifying Memorization Across Neural Language Models", ICLR 2023,
with greedy continuations; BLEU above 0.75 counts as approximate, as in Ippolito et al., INLG 2023.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sacrebleu
import torch

from allmend.audit.likelihood import Reading
from allmend.data.canaries import Canary
from allmend.intervals import mean, share
from allmend.results import Extraction

APPROXIMATE = 0.75
"""BLEU above which a continuation counts as approximately extracted."""


@dataclass(frozen=True)
class Continuation:
    """What a model makes of a canary's first tokens.

    Attributes:
        exact: every further token is right.
        matched: share of the further tokens before the first wrong one.
        bleu: of the continuation against the canary's own, in [0, 1].
    """

    exact: bool
    matched: float
    bleu: float


def matched_tokens(reading: Reading, prefix: int) -> int:
    """Tokens that a greedy continuation of the first `prefix` tokens gets right before its first error.

    As long as every token is the most likely one, greedy decoding feeds the model the text itself; so the
    teacher-forced pass tells where it leaves it, for all prefixes at once.
    """
    return int(reading.hit[prefix - 1 :].long().cumprod(0).sum())


@torch.inference_mode()
def continuations(
    model: Any,
    readings: Sequence[Reading],
    prefix: int,
    *,
    end_token: int | None,
    batch_size: int = 64,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> list[Continuation]:
    """Greedy continuations of every text's first `prefix` tokens, to its length, and how near they come.

    Args:
        model: a causal language model in evaluation mode.
        readings: texts longer than `prefix`, under this model.
        prefix: tokens of the prompt; all prompts have this length, so that no padding is needed.
        end_token: ends a continuation, if there is such a token.
        batch_size: texts continued together.
        on_tokens: told the tokens generated for each batch.
    """
    device = next(model.parameters()).device
    found = []
    for start in range(0, len(readings), batch_size):
        batch = readings[start : start + batch_size]
        longest = max(len(reading.ids) for reading in batch) - prefix
        prompts = torch.stack([reading.ids[:prefix] for reading in batch]).to(device)
        generated = _greedy(model, prompts, longest).tolist()
        for reading, tokens in zip(batch, generated, strict=True):
            truth = reading.ids[prefix:].tolist()
            tokens = tokens[: len(truth)]
            if end_token in tokens:
                tokens = tokens[: tokens.index(end_token)]
            matched = matched_tokens(reading, prefix)
            exact = matched == len(truth)
            # rounding in the two ways to compute may part them at a near tie
            bleu = 1.0 if exact else token_bleu(tokens, truth)
            found.append(Continuation(exact=exact, matched=matched / len(truth), bleu=bleu))
        on_tokens(longest * len(batch))
    return found


def _greedy(model: Any, prompts: torch.Tensor, length: int) -> torch.Tensor:
    """The `length` most likely tokens behind each prompt, [B, prefix] to [B, length].

    Not `generate`, which heeds the model's own generation settings (a repetition penalty makes it leave the greedy
    path).
    """
    ids, cache, found = prompts, None, []
    for _ in range(length):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        found.append(ids)
    return torch.cat(found, 1)


def token_bleu(tokens: Sequence[int], truth: Sequence[int]) -> float:
    """BLEU-4 of one token sequence against another, in [0, 1]; 1 when they are equal."""
    texts = [" ".join(map(str, sequence)) for sequence in (tokens, truth)]
    score = sacrebleu.sentence_bleu(texts[0], [texts[1]], tokenize="none", use_effective_order=True).score
    return min(1.0, float(score) / 100)


def extraction_rows(
    model: str, canaries: Sequence[Canary], found: Sequence[Continuation], prefix: int
) -> list[Extraction]:
    """The audit table's rows for one prefix length: by number of copies, inserted canaries and controls apart."""
    rows = []
    for copies in sorted({canary.copies for canary in canaries}):
        for inserted in (True, False):
            cell = [
                continuation
                for canary, continuation in zip(canaries, found, strict=True)
                if canary.copies == copies and canary.inserted == inserted
            ]
            if not cell:
                continue
            rows.append(
                Extraction(
                    model=model,
                    copies=copies,
                    inserted=inserted,
                    prefix_tokens=prefix,
                    exact=share(sum(one.exact for one in cell), len(cell)),
                    matched=mean([one.matched for one in cell], bounds=(0, 1)),
                    bleu=mean([one.bleu for one in cell], bounds=(0, 1)),
                    approximate=share(sum(one.bleu > APPROXIMATE for one in cell), len(cell)),
                )
            )
    return rows
