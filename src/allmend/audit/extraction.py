"""Extraction: does a prompt with a canary's beginning bring out the rest, word for word, nearly, or its secrets?

Discoverable extraction as in Carlini et al., "Quantifying Memorization Across Neural Language Models", ICLR 2023,
with greedy continuations; BLEU above 0.75 counts as approximate, as in Ippolito et al., INLG 2023.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import sacrebleu
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from allmend.audit.likelihood import Reading
from allmend.data.canaries import Canary
from allmend.data.chat import Encoded, Encoder
from allmend.intervals import mean, mean_share, share
from allmend.results import Estimate, Extraction

APPROXIMATE = 0.75
"""BLEU above which a continuation counts as approximately extracted."""


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """How much of each text its prompt shows: a number of tokens, or a share of the text's own. The other one is 0.

    Raises:
        ValueError: there is not one of the two, a positive number or a share below 1.
    """

    tokens: int = 0
    share: float = 0.0

    def __post_init__(self) -> None:
        if not (self.share == 0 and self.tokens >= 1) and not (self.tokens == 0 and 0 < self.share < 1):
            raise ValueError(f"{self} is no beginning of a text")

    @property
    def label(self) -> str:
        """In words: `20 tokens`, `50 %`."""
        return f"{self.tokens} tokens" if self.tokens else f"{100 * self.share:g} %"

    def behind(self, text_tokens: int, suffix_tokens: int | None = None) -> range:
        """The tokens that the prompt must bring out, of a text of so many; empty if none stands behind the prefix.

        Args:
            text_tokens: of the text; a share of them is rounded, and leaves at least one token on either side.
            suffix_tokens: how many to bring out; to the text's end where None, or where it has fewer.
        """
        length = self.tokens or max(1, min(round(self.share * text_tokens), text_tokens - 1))
        start = min(length, text_tokens)
        return range(start, text_tokens if suffix_tokens is None else min(text_tokens, start + suffix_tokens))


@dataclass(frozen=True)
class Secret:
    """A secret in a text of T tokens.

    Attributes:
        slot: what it is (`name`, `record` …).
        value: its own text.
        first, last: the tokens `[first, last)` that hold it.
    """

    slot: str
    value: str
    first: int
    last: int


def locate_secrets(encoder: Encoder, canary: Canary) -> tuple[Encoded, tuple[Secret, ...]]:
    """A canary as tokens, whole, and its secrets among them.

    Raises:
        UserError: a secret's span is empty or lies outside the canary's text.
    """
    spans = canary.secret_spans
    encoded, places = encoder.locate(canary.text, [(span.start, span.end) for span in spans])
    secrets = (
        Secret(span.slot, canary.text[span.start : span.end], *place) for span, place in zip(spans, places, strict=True)
    )
    return encoded, tuple(secrets)


@dataclass(frozen=True)
class Continuation:
    """What a model makes of a text's beginning.

    Attributes:
        prefix_tokens: of the prompt.
        exact: every token behind it is right.
        matched: share of those tokens before the first wrong one.
        bleu: of the continuation against the text's own, in [0, 1].
        secrets: slot of each secret wholly behind the prefix and within what was to be brought out, and whether it
            was: token for token in its place, or as a word or words of their own anywhere in the continuation.
        text: the continuation in words.
    """

    prefix_tokens: int
    exact: bool
    matched: float
    bleu: float
    secrets: tuple[tuple[str, bool], ...]
    text: str


def exact_matches(
    readings: Sequence[Reading], prefix: Prefix, *, suffix_tokens: int | None = None
) -> list[bool | None]:
    """`Continuation.exact` of every text, with nothing generated; None where no token stands behind the prefix.

    Args:
        readings: texts under one model.
        prefix: shown of each.
        suffix_tokens: to bring out; to the text's end where None.
    """
    parts = [prefix.behind(len(reading.ids), suffix_tokens) for reading in readings]
    return [
        matched_tokens(reading, part) == len(part) if part else None
        for reading, part in zip(readings, parts, strict=True)
    ]


def matched_tokens(reading: Reading, part: range) -> int:
    """Tokens of `part` that a greedy continuation of what stands before it gets right before its first error.

    As long as every token is the most likely one, greedy decoding feeds the model the text itself; so the
    teacher-forced pass tells where it leaves it, for all prefixes at once.
    """
    return int(reading.hit[part.start - 1 : part.stop - 1].long().cumprod(0).sum())


@torch.inference_mode()
def continuations(
    model: Any,
    readings: Sequence[Reading],
    prefix: Prefix,
    *,
    secrets: Sequence[Sequence[Secret]],
    tokenizer: Any,
    suffix_tokens: int | None = None,
    batch_size: int = 64,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> list[Continuation | None]:
    """Greedy continuations of every text's beginning, and how near they come; None where no token stands behind it.

    What the readings tell is not generated: only what follows a continuation's first wrong token, and that token.

    Args:
        model: a causal language model in evaluation mode.
        readings: texts under this model.
        prefix: shown of each.
        secrets: of each text.
        tokenizer: the model's; its end token ends a continuation.
        suffix_tokens: to bring out; to the text's end where None.
        batch_size: texts continued together.
        on_tokens: told the tokens to be brought out of texts that are done, generated or not.
    """
    parts = [prefix.behind(len(reading.ids), suffix_tokens) for reading in readings]
    matched = [matched_tokens(reading, part) for reading, part in zip(readings, parts, strict=True)]
    missing = [len(part) - count for part, count in zip(parts, matched, strict=True)]
    on_tokens(sum(len(part) for part, count in zip(parts, missing, strict=True) if not count))
    generated: list[list[int]] = [[] for _ in readings]
    # a batch takes as many steps as its longest continuation
    order = sorted((index for index, count in enumerate(missing) if count), key=missing.__getitem__)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        prompts = [readings[index].ids[: parts[index].start + matched[index]] for index in batch]
        found = _greedy(model, prompts, [missing[index] for index in batch], tokenizer.eos_token_id)
        for index, tokens in zip(batch, found, strict=True):
            generated[index] = tokens
        on_tokens(sum(len(parts[index]) for index in batch))
    return [
        _continuation(reading, part, count, more, own, tokenizer) if part else None
        for reading, part, count, more, own in zip(readings, parts, matched, generated, secrets, strict=True)
    ]


def _greedy(
    model: Any, prompts: Sequence[torch.Tensor], lengths: Sequence[int], end_token: int | None
) -> list[list[int]]:
    """The most likely tokens behind each prompt, as many as its length, or up to an end token.

    Not `generate`, which heeds the model's own generation settings (a repetition penalty makes it leave the greedy
    path). Shorter prompts are padded on their left with what no token sees, and their positions count from 0.
    """
    device = next(model.parameters()).device
    ids = pad_sequence(list(prompts), batch_first=True, padding_side="left").to(device)
    visible = pad_sequence([torch.ones_like(one) for one in prompts], batch_first=True, padding_side="left").to(device)
    position = (visible.cumsum(1) - 1).clamp(min=0)
    length = torch.tensor(lengths, device=device)
    running = torch.ones_like(length, dtype=torch.bool)
    cache, found = None, []
    while running.any():
        output = model(
            input_ids=ids,
            attention_mask=visible,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        found.append(ids)
        visible, position = pad(visible, (0, 1), value=1), position[:, -1:] + 1
        running &= (len(found) < length) & (ids[:, 0] != (-1 if end_token is None else end_token))
    rows = [row[:most] for row, most in zip(torch.cat(found, 1).tolist(), lengths, strict=True)]
    return [row[: row.index(end_token)] if end_token in row else row for row in rows]


def _continuation(
    reading: Reading, part: range, matched: int, generated: list[int], secrets: Sequence[Secret], tokenizer: Any
) -> Continuation:
    truth = reading.ids[part.start : part.stop].tolist()
    tokens, exact = truth[:matched] + generated, matched == len(truth)
    # no spaces taken out before punctuation, which would change what a secret looks like
    text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def reproduced(secret: Secret) -> bool:
        place = slice(secret.first - part.start, secret.last - part.start)
        word = rf"(?<!\w){re.escape(secret.value)}(?!\w)"  # ward 2C does not stand in ward 12C
        return tokens[place] == truth[place] or re.search(word, text) is not None

    return Continuation(
        prefix_tokens=part.start,
        exact=exact,
        matched=matched / len(truth),
        # rounding in the two ways to compute may part them at a near tie
        bleu=1.0 if exact else token_bleu(tokens, truth),
        secrets=tuple(
            (secret.slot, reproduced(secret))
            for secret in secrets
            if part.start <= secret.first and secret.last <= part.stop
        ),
        text=text,
    )


def token_bleu(tokens: Sequence[int], truth: Sequence[int]) -> float:
    """BLEU-4 of one token sequence against another, in [0, 1]; 1 when they are equal."""
    texts = [" ".join(map(str, sequence)) for sequence in (tokens, truth)]
    score = sacrebleu.sentence_bleu(texts[0], [texts[1]], tokenize="none", use_effective_order=True).score
    return min(1.0, float(score) / 100)


def extraction_rows(
    model: str, canaries: Sequence[Canary], found: Sequence[Continuation | None], prefix: Prefix
) -> list[Extraction]:
    """The audit table's rows for one prefix: by number of copies, inserted canaries and controls apart."""
    rows = []
    for copies in sorted({canary.copies for canary in canaries}):
        for inserted in (True, False):
            cell = [
                continuation
                for canary, continuation in zip(canaries, found, strict=True)
                if continuation and canary.copies == copies and canary.inserted == inserted
            ]
            if not cell:
                continue
            rows.append(
                Extraction(
                    model=model,
                    copies=copies,
                    inserted=inserted,
                    prefix=prefix.label,
                    prefix_tokens=fmean(one.prefix_tokens for one in cell),
                    exact=share(sum(one.exact for one in cell), len(cell)),
                    matched=mean([one.matched for one in cell], bounds=(0, 1)),
                    bleu=mean([one.bleu for one in cell], bounds=(0, 1)),
                    approximate=share(sum(one.bleu > APPROXIMATE for one in cell), len(cell)),
                    secrets=_recovered(cell),
                )
            )
    return rows


def _recovered(cell: Sequence[Continuation]) -> dict[str, Estimate]:
    """Share of secrets reproduced, by slot; over all of them the mean of each text's share, under the empty name.

    Secrets of one text come out together or not at all: only texts are independent, and only they are counted there.
    """
    by_slot: dict[str, list[bool]] = {}
    for slot, reproduced in (secret for one in cell for secret in one.secrets):
        by_slot.setdefault(slot, []).append(reproduced)
    shares = [fmean(reproduced for _, reproduced in one.secrets) for one in cell if one.secrets]
    over_all = {"": mean_share(shares)} if shares else {}
    return over_all | {slot: share(sum(values), len(values)) for slot, values in sorted(by_slot.items())}
