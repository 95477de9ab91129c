"""What a model thinks of a text it may have seen: every token's likelihood in one teacher-forced pass."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from allmend.data.canaries import Canary
from allmend.data.chat import Encoded
from allmend.data.packing import pack
from allmend.errors import UserError
from allmend.intervals import difference, mean
from allmend.learn.objective import logits_at_sources
from allmend.results import LikelihoodGap


@dataclass(frozen=True)
class Scheme:
    """How continuations are sampled: from the softmax of logits / `temperature`, over the `top_k` largest logits.

    Exactly `top_k` tokens stay; of tokens that tie for the last place, those with the lowest ids, as in an argmax. So
    `top_k` = 1 is greedy decoding. 0 stands for all tokens.

    Raises:
        ValueError: the temperature is not positive, or `top_k` is negative.
    """

    temperature: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.top_k < 0:
            raise ValueError(f"no sampling with temperature {self.temperature} and top_k {self.top_k}")


@dataclass(frozen=True)
class Reading:
    """One text under one model, at its N targets in order: N = T − 1 in a running text, all tokens but the first.

    p is the model's distribution over the vocabulary in a target's place.

    Attributes:
        ids: the text's tokens, int64 [T].
        log_likelihood: log p of the targets (nats), float64 [N].
        hit: whether each of them is the model's most likely token, bool [N].
        mean: Σ_v p_v log p_v, what log p is expected to be (nats), float64 [N].
        deviation: standard deviation of log p under p (nats), float64 [N].
        sampled: log-probability of the targets under the sampling scheme (nats); −inf of what is never sampled.
            float64 [N].
    """

    ids: torch.Tensor
    log_likelihood: torch.Tensor
    hit: torch.Tensor
    mean: torch.Tensor
    deviation: torch.Tensor
    sampled: torch.Tensor


@torch.inference_mode()
def read_texts(
    model: Any,
    encoded: Sequence[Encoded],
    *,
    scheme: Scheme = Scheme(),
    tokens_per_pass: int = 512,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> list[Reading]:
    """Read texts once each, packed.

    Args:
        model: a causal language model in evaluation mode.
        encoded: running texts, whose every token is a target, or records as in training.
        scheme: what `Reading.sampled` is about.
        tokens_per_pass: capacity of a packed row.
        on_tokens: told the tokens of each pass.
    """
    device = next(model.parameters()).device
    none = torch.zeros(0, dtype=torch.float64)
    readings = [Reading(text.ids, none, none.bool(), none, none, none) for text in encoded]
    for row in pack(encoded, tokens_per_pass):
        there = row.to(device)
        values = _values(logits_at_sources(model, there), there.source_of, there.targets, scheme)
        for owner in sorted(set(row.owner.tolist())):
            readings[owner] = Reading(encoded[owner].ids, *(value[row.owner == owner] for value in values))
        on_tokens(row.tokens)
    return readings


def check_finite(likelihoods: Iterable[torch.Tensor], *, of: str, where: str | None = None) -> None:
    """Refuse a model that gives no probabilities: every figure would be wrong, or none.

    Args:
        likelihoods: log-likelihoods, of any shapes.
        of: what of, in words.
        where: the model's name.

    Raises:
        UserError: one of them is no finite number.
    """
    if not all(bool(values.isfinite().all()) for values in likelihoods):
        what = f"the model's log-likelihoods of {of} are no finite numbers"
        hint = "Its weights are damaged, or its training has diverged: lower the learning rate."
        raise UserError(what, where=where, hint=hint)


_NEVER = -200.0
"""A log-probability whose exponential is 0 in float32: it keeps 0 · log 0 at 0 where a logit is as good as −inf."""


def _values(
    logits: torch.Tensor, source_of: torch.Tensor, targets: torch.Tensor, scheme: Scheme
) -> tuple[torch.Tensor, ...]:
    """What a `Reading` holds besides ids, on the CPU: logits [U, V], two indices [N], to five values [N]."""
    # several passes over so wide a tensor cost about one if a block of it stays in the processor's cache
    size = max(1, (2**18 if logits.device.type == "cpu" else 2**24) // logits.shape[-1])
    blocks = (slice(start, start + size) for start in range(0, len(targets), size))
    parts = [_block(logits[source_of[block]], targets[block], scheme) for block in blocks]
    return tuple(
        value.cpu() if value.dtype == torch.bool else value.cpu().double()
        for value in (torch.cat(column) for column in zip(*parts, strict=True))
    )


def _block(logits: torch.Tensor, targets: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, ...]:
    """`_values` of targets with logits [B, V] of their own, which are overwritten."""
    largest, best = logits.max(-1, keepdim=True)
    z = logits.sub_(largest)
    chosen = z.gather(1, targets[:, None])[:, 0]
    sampled = _sampled(z, chosen, targets, scheme)
    p = z.exp()
    total = p.sum(-1, keepdim=True)
    p.div_(total)
    log_p = z.sub_(total.log()).clamp_(min=_NEVER)
    mean = torch.linalg.vecdot(p, log_p)
    from_mean = log_p.sub_(mean[:, None])
    deviation = torch.linalg.vecdot(p.mul_(from_mean), from_mean).sqrt()
    return chosen - total[:, 0].log(), best[:, 0] == targets, mean, deviation, sampled


def _sampled(z: torch.Tensor, chosen: torch.Tensor, targets: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Log-probabilities [B] of `targets`, whose logits are `chosen`, under the scheme; z [B, V] has maximum 0."""
    if not 0 < scheme.top_k < z.shape[-1]:
        return chosen / scheme.temperature - (z / scheme.temperature).logsumexp(-1)
    kept = z.topk(scheme.top_k).values
    inside = chosen > kept[:, -1]
    # a target with the smallest logit that is kept stays if the tokens before it leave room
    last = (chosen == kept[:, -1]).nonzero()[:, 0]
    others, own = z[last], chosen[last, None]
    lower_id = torch.arange(z.shape[-1], device=z.device) < targets[last, None]
    inside[last] = ((others > own) | ((others == own) & lower_id)).sum(-1) < scheme.top_k
    return torch.where(inside, chosen / scheme.temperature - (kept / scheme.temperature).logsumexp(-1), -torch.inf)


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
