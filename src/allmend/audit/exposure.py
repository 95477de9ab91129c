"""Exposure: how far up a secret ranks among all values that it could have had, by the model's likelihood.

Carlini, Liu, Erlingsson, Kos, Song, "The Secret Sharer: Evaluating and Testing Unintended Memorization in Neural
Networks", USENIX Security 2019: with R the set of possible values, exposure = log2 |R| − log2 rank. Where R is too
large to rank, its values are sampled (their section 4.3, "approximation by sampling" and "by distribution modelling").
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats

from allmend.audit.likelihood import check_finite
from allmend.data.canaries import Canary, SecretSpan
from allmend.data.chat import Encoded, Encoder
from allmend.data.packing import pack
from allmend.errors import UserError
from allmend.intervals import mean
from allmend.learn.objective import log_likelihood
from allmend.results import Exposure

RANK_ALL = 10_000
"""Number of possible values up to which all of them are to be ranked, not a sample."""

POOR_FIT = 0.01
"""p-value of the Kolmogorov-Smirnov test below which a fit is not believed."""

FIT_FROM = 100
"""Number of values below which that test could hardly refuse a fit, so that none is believed."""


@dataclass(frozen=True)
class SecretExposure:
    """How far one secret of one text is exposed.

    Attributes:
        slot: which secret.
        values: number of possible values, |R|.
        compared: values that were ranked, the true one among them; |R| where all were.
        bits: log2 `compared` − log2 of the true value's rank among them.
        fitted: the same from a skew-normal fitted to the other values' likelihoods; None where all were ranked.
        poor_fit: whether the fit is not believed; `fitted` is then `bits`.
    """

    slot: str
    values: int
    compared: int
    bits: float
    fitted: float | None = None
    poor_fit: bool = False


def expose(
    model: Any,
    encoder: Encoder,
    text: str,
    secret: SecretSpan,
    candidates: Sequence[str],
    *,
    values: int,
    tokens_per_pass: int = 512,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> SecretExposure | None:
    """Rank a text's secret among candidates for its place; None where nothing stands before it to predict it from.

    Args:
        model: a causal language model in evaluation mode.
        encoder: as in training.
        text: the whole text.
        secret: its place.
        candidates: all values that the secret could have had, or at least 1,000 random ones of more than `RANK_ALL`;
            repeated ones, and the true one, count once.
        values: number of possible values, |R|.
        tokens_per_pass: capacity of a packed row.
        on_tokens: told the tokens of each pass.

    Raises:
        UserError: the secret is none of its possible values, or gets a likelihood that is no number.
    """
    true = text[secret.start : secret.end]
    others = list(dict.fromkeys(value for value in candidates if value != true))
    if len(others) >= values:
        raise UserError(
            f"{true!r} is none of the {values} values that {secret.slot!r} can have",
            where="canaries",
            hint="Audit the canaries with the version of Allmend that planted them.",
        )
    likelihood = value_likelihoods(
        model, encoder, text, secret, [true, *others], tokens_per_pass=tokens_per_pass, on_tokens=on_tokens
    )
    if likelihood is None:
        return None
    return exposure(likelihood[0].item(), likelihood[1:], slot=secret.slot, values=values)


@torch.inference_mode()
def value_likelihoods(
    model: Any,
    encoder: Encoder,
    text: str,
    secret: SecretSpan,
    candidates: Sequence[str],
    *,
    tokens_per_pass: int = 512,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> torch.Tensor | None:
    """log-likelihood of each candidate in the secret's place, given the text before it (nats), float64 [candidates].

    The text is tokenised whole with each candidate, since a value's ends may merge with what surrounds them, and cut
    behind the last token that holds a part of the value. The tokens that all candidates begin with are the prompt; the
    likelihood is that of those behind it. Candidates share a pass as branches of one trunk. There is none (None) where
    not even the first token is common to all: nothing predicts a text's first token.

    Raises:
        UserError: a likelihood is no finite number.
    """
    paths = [_path(encoder, text, secret, candidate) for candidate in candidates]
    shared = next(
        (at for at, tokens in enumerate(zip(*paths, strict=False)) if len(set(tokens)) > 1), min(map(len, paths))
    )
    if not shared:
        return None
    branches = [path[shared:] for path in paths]
    chunks = _chunks([len(branch) for branch in branches], tokens_per_pass - shared)
    trees = [_tree(paths[0][:shared], [branches[index] for index in chunk]) for chunk in chunks]
    first = torch.tensor([chunk.start for chunk in chunks])
    device = next(model.parameters()).device
    found = torch.zeros(len(candidates), dtype=torch.float64)
    for row in pack(trees, tokens_per_pass):
        likelihood = log_likelihood(model, row.to(device)).cpu().double()
        found.index_add_(0, first[row.owner] + row.branch - 1, likelihood)
        on_tokens(row.tokens)
    check_finite([found], of=f"values of {secret.slot!r}")
    return found


def _path(encoder: Encoder, text: str, secret: SecretSpan, value: str) -> list[int]:
    """Tokens of the text with this value in the secret's place, up to the last that holds a part of the value."""
    whole = text[: secret.start] + value + text[secret.end :]
    encoded, ((_, last),) = encoder.locate(whole, [(secret.start, secret.start + len(value))])
    ids: list[int] = encoded.ids[:last].tolist()
    return ids


def _chunks(sizes: Sequence[int], room: int) -> list[range]:
    """Runs of consecutive branches that fit together behind a trunk; one by itself where it does not fit."""
    borders, left = [0], room
    for index, size in enumerate(sizes):
        if size > left and index > borders[-1]:
            borders.append(index)
            left = room
        left -= size
    return [range(start, stop) for start, stop in zip(borders, [*borders[1:], len(sizes)], strict=True)]


def _tree(trunk: Sequence[int], branches: Sequence[Sequence[int]]) -> Encoded:
    """A trunk with branches, whose every token is a target."""
    branch = [0] * len(trunk) + [number for number, tokens in enumerate(branches, start=1) for _ in tokens]
    position = [*range(len(trunk)), *(len(trunk) + at for tokens in branches for at in range(len(tokens)))]
    ids = [*trunk, *(token for tokens in branches for token in tokens)]
    of = torch.tensor(branch)
    return Encoded("", torch.tensor(ids), of > 0, of, torch.tensor(position))


def exposure(likelihood: float, others: torch.Tensor, *, slot: str, values: int) -> SecretExposure:
    """Exposure of a secret from its own log-likelihood and those of `others`, distinct values that it might have had.

    The rank is 1, plus the number of others that are more likely, plus half of those as likely: the mean over breaking
    ties by lot, so that a model that knows nothing exposes nothing.

    Where the others are all that are possible, this is the exposure itself. Where they are n random ones, the rank
    among n + 1 values over n + 1 stands in for the rank over |R|. It is uniform for a secret like any other value, as
    the rank in R is; for every secret, E[(n + 1) / rank among n + 1] ≤ |R| / rank in R, so that by Jensen's inequality
    exposure is understated on average; and it cannot exceed log2 (n + 1).

    A skew-normal fitted to the sample's log-perplexities by maximum likelihood goes beyond that bound: exposure is
    then −log2 of the share that it gives to values at least as likely as the secret, at most log2 |R|. The test of the
    fit uses parameters from the sample that it tests, so it refuses less often than its p-value says.

    Args:
        likelihood: log-likelihood of the true value.
        others: the same of other values, [n].
        slot: which secret.
        values: number of possible values, |R| ≥ n + 1.
    """
    better, equal = (others > likelihood).sum().item(), (others == likelihood).sum().item()
    compared = len(others) + 1
    bits = math.log2(compared) - math.log2(1 + better + equal / 2)
    if compared == values:
        return SecretExposure(slot, values, compared, bits)
    fitted = _fitted(-likelihood, -others, values)
    return SecretExposure(slot, values, compared, bits, bits if fitted is None else fitted, poor_fit=fitted is None)


def _fitted(perplexity: float, others: torch.Tensor, values: int) -> float | None:
    """−log2 of the share of log-perplexities up to this one, by a skew-normal fitted to others; None if it fits ill."""
    sample = others.numpy()
    if len(sample) < FIT_FROM or sample.min() == sample.max():
        return None
    try:
        fit = stats.skewnorm(*stats.skewnorm.fit(sample))
    except stats.FitError:
        return None
    if stats.kstest(sample, fit.cdf).pvalue < POOR_FIT:
        return None
    share = max(float(fit.cdf(perplexity)), 1 / values)
    return min(math.log2(values), max(0.0, -math.log2(share)))


def exposure_refusals(
    spans: Sequence[Sequence[SecretSpan]], found: Sequence[Sequence[SecretExposure | None]]
) -> list[str]:
    """Why secrets are missing from `exposure_rows`, in words.

    Args:
        spans: of each canary, the secrets that were to be measured.
        found: of each canary, their exposure.
    """
    pairs = [pair for own, secrets in zip(spans, found, strict=True) for pair in zip(own, secrets, strict=True)]
    every = Counter(span.slot for span, _ in pairs)
    missing = Counter(span.slot for span, one in pairs if one is None)
    return [
        f"exposure of {slot!r} in {missing[slot]:,} of {every[slot]:,} canaries: it begins the text, so that nothing "
        "predicts it"
        for slot in sorted(missing)
    ]


def exposure_rows(
    model: str, canaries: Sequence[Canary], found: Sequence[Sequence[SecretExposure | None]]
) -> list[Exposure]:
    """The audit table's rows: by number of copies, inserted canaries and controls apart, and by slot.

    Args:
        model: its name.
        canaries: inserted ones and controls.
        found: of each canary, the exposure of its secrets; None for one that could not be measured.
    """
    cells: dict[tuple[int, bool, str, int], list[SecretExposure]] = {}
    for canary, secrets in zip(canaries, found, strict=True):
        for one in filter(None, secrets):
            cells.setdefault((canary.copies, not canary.inserted, one.slot, one.values), []).append(one)
    rows = []
    for (copies, control, slot, values), cell in sorted(cells.items()):
        bounds = (0, math.log2(values))
        fitted = [one.fitted for one in cell if one.fitted is not None]
        rows.append(
            Exposure(
                model=model,
                copies=copies,
                inserted=not control,
                slot=slot,
                values=values,
                compared=min(one.compared for one in cell),
                exposure=mean([one.bits for one in cell], bounds=bounds),
                fitted=mean(fitted, bounds=bounds) if fitted else None,
                poor_fits=sum(one.poor_fit for one in cell),
            )
        )
    return rows
