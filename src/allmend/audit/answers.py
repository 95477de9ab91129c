"""What a model answers when it is asked for canaries: each once, however many tables are made of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from allmend.audit.discoverable import discoverable_rows, log_probability
from allmend.audit.exposure import RANK_ALL, SecretExposure, expose, exposure_refusals, exposure_rows
from allmend.audit.extraction import Continuation, Prefix, Secret, continuations, extraction_rows
from allmend.audit.likelihood import Reading
from allmend.data.canaries import Canary, SecretSpan
from allmend.data.canary_kinds import KINDS, number_of_values, possible_values, random_values
from allmend.data.chat import Encoder
from allmend.probes import Probe
from allmend.recipe import Audit
from allmend.results import Discoverable, Exposure, Extraction

EXPOSURE_LIMIT = 400
"""Secrets of at most so many possible values have their exposure measured where the recipe names none."""


@dataclass(frozen=True)
class Answers:
    """One model's answers; all sequences are in the canaries' order.

    Attributes:
        model: its name.
        canaries: that it was asked for.
        readings: of them, as running texts.
        continuations: of each prefix; None where no token stands behind it.
        spans: the secrets whose exposure is measured.
        exposures: of these; None of one that could not be measured.
    """

    model: str
    canaries: Sequence[Canary]
    readings: Sequence[Reading]
    continuations: Mapping[Prefix, Sequence[Continuation | None]]
    spans: Sequence[Sequence[SecretSpan]]
    exposures: Sequence[Sequence[SecretExposure | None]]

    def of(self, chosen: Callable[[Canary], bool]) -> "Answers":
        """Those about some canaries."""
        places = [place for place, canary in enumerate(self.canaries) if chosen(canary)]
        return Answers(
            self.model,
            [self.canaries[place] for place in places],
            [self.readings[place] for place in places],
            {prefix: [found[place] for place in places] for prefix, found in self.continuations.items()},
            [self.spans[place] for place in places],
            [self.exposures[place] for place in places],
        )

    @property
    def skipped(self) -> int:
        """(canary, prefix) pairs whose prefix is no shorter than the canary."""
        return sum(one is None for found in self.continuations.values() for one in found)

    @property
    def texts(self) -> list[str]:
        """All continuations."""
        return [one.text for found in self.continuations.values() for one in found if one is not None]

    def extraction(self) -> list[Extraction]:
        """Rows of extraction by greedy continuation."""
        parts = (extraction_rows(self.model, self.canaries, found, p) for p, found in self.continuations.items())
        return [row for rows in parts for row in rows]

    def discoverable(self, settings: Audit) -> list[Discoverable]:
        """Rows of (n, p)-discoverable extraction."""
        draws, tokens = sorted(set(settings.draws)), settings.suffix_tokens
        return [
            row
            for prefix in self.continuations
            for row in discoverable_rows(
                self.model, self.canaries, self.readings, prefix, draws=draws, suffix_tokens=tokens
            )
        ]

    def exposure(self) -> list[Exposure]:
        """Rows of exposure."""
        return exposure_rows(self.model, self.canaries, self.exposures)

    def not_exposed(self) -> list[str]:
        """Why secrets are missing from the rows of exposure."""
        return exposure_refusals(self.spans, self.exposures)

    def probes(self, settings: Audit) -> Iterator[Probe]:
        """One row for each canary and prefix that leaves a token."""
        for prefix, found in self.continuations.items():
            for canary, reading, one in zip(self.canaries, self.readings, found, strict=True):
                if one is not None:
                    yield _probe(self.model, canary, reading, one, prefix, settings)


def ask(
    name: str,
    model: Any,
    encoder: Encoder,
    canaries: Sequence[Canary],
    secrets: Sequence[Sequence[Secret]],
    readings: Sequence[Reading],
    settings: Audit,
    *,
    seed: int,
    on_tokens: Callable[[int], None],
) -> Answers:
    """Have a model continue canaries from each prefix and rank their secrets.

    Args:
        name: of the model.
        model: a causal language model in evaluation mode.
        encoder: as in training.
        canaries: to ask for.
        secrets: of each, in tokens.
        readings: of each, under this model.
        settings: the audit's design.
        seed: of sampled values.
        on_tokens: told the tokens read or generated.
    """
    found = {
        prefix: continuations(
            model,
            readings,
            prefix,
            secrets=secrets,
            tokenizer=encoder.tokenizer,
            suffix_tokens=settings.suffix_tokens,
            on_tokens=on_tokens,
        )
        for prefix in prefixes_of(settings)
    }
    spans = [
        [span for span in canary.secret_spans if span.slot in slots_of(canary.kind, settings)] for canary in canaries
    ]
    exposures = [
        [
            expose(
                model,
                encoder,
                canary.text,
                span,
                _candidates(canary.kind, span.slot, settings, seed),
                values=number_of_values(canary.kind, span.slot),
                on_tokens=on_tokens,
            )
            for span in own
        ]
        for canary, own in zip(canaries, spans, strict=True)
    ]
    return Answers(name, canaries, readings, found, spans, exposures)


def prefixes_of(settings: Audit) -> list[Prefix]:
    """The prompts that try to bring out a canary, the shortest first."""
    tokens = [Prefix(tokens=length) for length in sorted(set(settings.prefix_tokens))]
    return tokens + [Prefix(share=share) for share in sorted(set(settings.prefix_shares))]


def slots_of(kind: str, settings: Audit) -> list[str]:
    """Secrets of a kind whose exposure is measured."""
    slots = KINDS[kind].slots if kind in KINDS else {}
    if settings.exposure is not None:
        return [slot for slot in slots if slot in settings.exposure]
    return [slot for slot, values in slots.items() if values.size <= EXPOSURE_LIMIT]


def _candidates(kind: str, slot: str, settings: Audit, seed: int) -> list[str]:
    """All values that a secret can have, or random ones of too many; the same for every canary and model."""
    every = possible_values(kind, slot, limit=RANK_ALL)
    return every if every is not None else random_values(kind, slot, settings.exposure_samples, seed=seed)


def _probe(model: str, canary: Canary, reading: Reading, found: Continuation, prefix: Prefix, settings: Audit) -> Probe:
    log_p = log_probability(reading, prefix.behind(len(reading.ids), settings.suffix_tokens))
    return Probe(
        model=model,
        canary=canary.id,
        kind=canary.kind,
        client=canary.client,
        copies=canary.copies,
        inserted=canary.inserted,
        prefix=prefix.label,
        prefix_tokens=found.prefix_tokens,
        exact=found.exact,
        matched=found.matched,
        bleu=found.bleu,
        secrets_out=sum(out for _, out in found.secrets),
        secrets=len(found.secrets),
        log_discovered=log_p,
        log_likelihood=reading.log_likelihood.mean().item(),
    )
