"""The audit of one model: every measure on every canary, controls beside inserted ones, and on clients' records."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from allmend.audit.discoverable import discoverable_rows, log_probability
from allmend.audit.epsilon import epsilon_bound
from allmend.audit.exposure import RANK_ALL, expose, exposure_refusals, exposure_rows
from allmend.audit.extraction import Continuation, Prefix, Secret, continuations, extraction_rows, locate_secrets
from allmend.audit.likelihood import Reading, Scheme, check_finite, likelihood_gaps, read_texts
from allmend.audit.membership import membership_rows, refusals, scores
from allmend.data.canaries import Canary
from allmend.data.canary_kinds import KINDS, number_of_values, possible_values, random_values
from allmend.data.chat import Encoder
from allmend.data.identifiers import count_identifiers
from allmend.data.records import Record
from allmend.errors import UserError
from allmend.probes import Probe
from allmend.recipe import Audit
from allmend.results import (
    Discoverable,
    EpsilonBound,
    Exposure,
    Extraction,
    LikelihoodGap,
    Membership,
)

EXPOSURE_LIMIT = 400
"""Secrets of at most so many possible values have their exposure measured where the recipe names none."""


@dataclass(frozen=True)
class RecordGroup:
    """A client's own records: some that it trains on and some that it does not.

    Attributes:
        client: its name.
        members, non_members: the records.
    """

    client: str
    members: Sequence[Record]
    non_members: Sequence[Record]


@dataclass(frozen=True)
class Findings:
    """What the audit found in one model.

    Attributes:
        model: its name.
        extraction, discoverable, gaps, exposure, membership, epsilon: rows of the audit's tables.
        probes: one row for each canary and prefix.
        skipped: (canary, prefix) pairs whose prefix is no shorter than the canary.
        refused: figures that are missing, and why.
        identifiers: what looks like personal data in the continuations, by kind.
        readings: the canaries, and the records of each group, under this model.
    """

    model: str
    extraction: tuple[Extraction, ...]
    discoverable: tuple[Discoverable, ...]
    gaps: tuple[LikelihoodGap, ...]
    exposure: tuple[Exposure, ...]
    membership: tuple[Membership, ...]
    epsilon: tuple[EpsilonBound, ...]
    probes: tuple[Probe, ...]
    skipped: int
    refused: tuple[str, ...]
    identifiers: dict[str, int]
    readings: Sequence[Reading]
    group_readings: Sequence[Sequence[Reading]]


@dataclass(frozen=True)
class _Subject:
    """A model, and the canaries as it reads them; all sequences are in the canaries' order."""

    name: str
    model: Any
    encoder: Encoder
    canaries: Sequence[Canary]
    secrets: Sequence[Sequence[Secret]]
    readings: Sequence[Reading]


def audit_model(
    name: str,
    model: Any,
    encoder: Encoder,
    canaries: Sequence[Canary],
    settings: Audit,
    *,
    seed: int,
    reference: Findings | None = None,
    groups: Sequence[RecordGroup] = (),
    unseen: Collection[str] = (),
    delta: float = 0.0,
    accounted: float | None = None,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> Findings:
    """Measure one model.

    Args:
        name: of the model, for the tables.
        model: a causal language model in evaluation mode.
        encoder: as in training.
        canaries: inserted ones and controls.
        settings: the audit's design.
        seed: of bootstraps and sampled values.
        reference: findings of the base model on the same canaries and groups; None for the base model itself, or
            where there is none, and then there are no scores relative to it.
        groups: clients' records that membership is inferred for.
        unseen: ids of inserted canaries that training never drew. They count in the bound on ε, whose coins they
            keep, and nowhere else.
        delta: of the bound on ε.
        accounted: the accountant's ε for one record, shown beside the bound.
        on_tokens: told the tokens read or generated.

    Raises:
        UserError: there are no inserted canaries or no controls, so that no figure would have its null; or a
            canary's secret lies outside its text; or the model's likelihoods are no finite numbers.
    """
    if not any(canary.inserted for canary in canaries) or all(canary.inserted for canary in canaries):
        raise UserError(
            "an audit needs inserted canaries and controls; one of the two is missing",
            where="canaries",
            hint="Plant more canaries (canaries.count): a coin for each decides.",
        )
    located = [locate_secrets(encoder, canary) for canary in canaries]
    readings = read_texts(model, [text for text, _ in located], scheme=_scheme(settings), on_tokens=on_tokens)
    check_finite([reading.log_likelihood for reading in readings], of="the canaries", where=name)
    records = [encoder.for_training(record) for group in groups for record in (*group.members, *group.non_members)]
    read_records = read_texts(model, records, on_tokens=on_tokens)
    check_finite([reading.log_likelihood for reading in read_records], of="the clients' records", where=name)
    read = iter(read_records)
    group_readings = [[next(read) for _ in (*group.members, *group.non_members)] for group in groups]
    membership, refused = _membership(name, canaries, readings, unseen, reference, seed)
    for place, group in enumerate(groups):
        base = reference.group_readings[place] if reference else None
        membership += _membership_of(group, name, group_readings[place], base, seed)
    seen = [place for place, canary in enumerate(canaries) if canary.id not in unseen]
    subject = _Subject(
        name,
        model,
        encoder,
        [canaries[place] for place in seen],
        [located[place][1] for place in seen],
        [readings[place] for place in seen],
    )
    if unseen:
        refused.append(
            f"{name}: any measure but the bound on ε of planted canaries that Poisson sampling never drew "
            f"({len(unseen)})"
        )
    extraction, discoverable, probes, skipped, texts = _extraction(subject, settings, on_tokens)
    exposure, not_exposed = _exposure(subject, settings, seed, on_tokens)
    if reference is None:  # say it once, for the base model
        refused += not_exposed
    return Findings(
        model=name,
        extraction=tuple(extraction),
        discoverable=tuple(discoverable),
        gaps=tuple(likelihood_gaps(name, subject.canaries, subject.readings)),
        exposure=tuple(exposure),
        membership=tuple(membership),
        epsilon=tuple(_epsilon(name, canaries, readings, reference, delta, accounted)),
        probes=tuple(probes),
        skipped=skipped,
        refused=tuple(refused),
        identifiers=count_identifiers(texts),
        readings=readings,
        group_readings=group_readings,
    )


def no_prefix_fits(canaries: Sequence[Canary], encoder: Encoder, settings: Audit) -> str:
    """Why there would be nothing to bring out of any canary; empty if there is something."""
    longest = max(len(encoder.for_evaluation(Record(canary.id, text=canary.text))) for canary in canaries)
    if any(prefix.behind(longest, settings.suffix_tokens) for prefix in _prefixes(settings)):
        return ""
    shortest = _prefixes(settings)[0].label
    return f"no canary has more than {longest} tokens, so that nothing stands behind a prefix of {shortest}"


def tokens_to_read(
    canaries: Sequence[Canary], encoder: Encoder, settings: Audit, groups: Sequence[RecordGroup]
) -> float:
    """What `audit_model` reads and generates, about, in tokens."""
    lengths = [len(encoder.for_evaluation(Record(canary.id, text=canary.text))) for canary in canaries]
    total = float(sum(lengths))
    for prefix in _prefixes(settings):
        total += sum(len(prefix.behind(length, settings.suffix_tokens)) for length in lengths)
    for canary, length in zip(canaries, lengths, strict=True):
        slots = _slots(canary.kind, settings)
        for span in canary.secret_spans:
            if span.slot in slots:
                values = number_of_values(canary.kind, span.slot)
                compared = values if values <= RANK_ALL else settings.exposure_samples
                # a value has as large a share of the tokens as it has of the characters
                total += compared * max(1, length * (span.end - span.start) / len(canary.text))
    records = (record for group in groups for record in (*group.members, *group.non_members))
    return total + sum(len(encoder.for_training(record)) for record in records)


def _prefixes(settings: Audit) -> list[Prefix]:
    tokens = [Prefix(tokens=length) for length in sorted(set(settings.prefix_tokens))]
    return tokens + [Prefix(share=share) for share in sorted(set(settings.prefix_shares))]


def _scheme(settings: Audit) -> Scheme:
    return Scheme(settings.temperature, settings.top_k)


def _extraction(
    subject: _Subject, settings: Audit, on_tokens: Callable[[int], None]
) -> tuple[list[Extraction], list[Discoverable], list[Probe], int, list[str]]:
    """Rows of extraction and of (n, p)-discoverable extraction, probes, skipped pairs, and all continuations."""
    rows: list[Extraction] = []
    discoverable: list[Discoverable] = []
    probes: list[Probe] = []
    texts: list[str] = []
    skipped = 0
    for prefix in _prefixes(settings):
        found = continuations(
            subject.model,
            subject.readings,
            prefix,
            secrets=subject.secrets,
            tokenizer=subject.encoder.tokenizer,
            suffix_tokens=settings.suffix_tokens,
            on_tokens=on_tokens,
        )
        skipped += sum(one is None for one in found)
        rows += extraction_rows(subject.name, subject.canaries, found, prefix)
        discoverable += discoverable_rows(
            subject.name,
            subject.canaries,
            subject.readings,
            prefix,
            draws=sorted(set(settings.draws)),
            suffix_tokens=settings.suffix_tokens,
        )
        for canary, reading, one in zip(subject.canaries, subject.readings, found, strict=True):
            if one is not None:
                probes.append(_probe(subject.name, canary, reading, one, prefix, settings))
                texts.append(one.text)
    return rows, discoverable, probes, skipped, texts


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


def _membership(
    name: str,
    canaries: Sequence[Canary],
    readings: Sequence[Reading],
    unseen: Collection[str],
    reference: Findings | None,
    seed: int,
) -> tuple[list[Membership], list[str]]:
    """Inserted canaries of each number of copies against all controls, which come from the same generator."""
    scored = [
        (canary, scores(reading, canary.text, base=reference.readings[place] if reference else None))
        for place, (canary, reading) in enumerate(zip(canaries, readings, strict=True))
        if canary.id not in unseen
    ]
    controls = [found for canary, found in scored if not canary.inserted]
    rows: list[Membership] = []
    refused: list[str] = []
    for copies in sorted({canary.copies for canary in canaries}):
        inserted = [found for canary, found in scored if canary.inserted and canary.copies == copies]
        rows += membership_rows(
            name, records="canaries", copies=copies, members=inserted, non_members=controls, seed=seed
        )
        if not inserted:
            refused.append(f"{name}: all but ε of canaries with {copies} copies: none was inserted and seen")
        if all(canary.inserted for canary in canaries if canary.copies == copies):
            refused.append(f"{name}: likelihood gap of canaries with {copies} copies: none of them is a control")
    if reference is None:  # say it once, for the base model
        refused += refusals(records="canaries", copies=None, members=1, non_members=len(controls))
    return rows, refused


def _membership_of(
    group: RecordGroup, name: str, readings: Sequence[Reading], base: Sequence[Reading] | None, seed: int
) -> list[Membership]:
    records = (*group.members, *group.non_members)
    found = [
        scores(reading, record.response, base=base[place] if base else None)
        for place, (record, reading) in enumerate(zip(records, readings, strict=True))
    ]
    members = len(group.members)
    return membership_rows(
        name,
        records=f"records of {group.client}",
        copies=None,
        members=found[:members],
        non_members=found[members:],
        seed=seed,
    )


def _slots(kind: str, settings: Audit) -> list[str]:
    """Secrets of a kind whose exposure is measured."""
    slots = KINDS[kind].slots if kind in KINDS else {}
    if settings.exposure is not None:
        return [slot for slot in slots if slot in settings.exposure]
    return [slot for slot, values in slots.items() if values.size <= EXPOSURE_LIMIT]


def _exposure(
    subject: _Subject, settings: Audit, seed: int, on_tokens: Callable[[int], None]
) -> tuple[list[Exposure], list[str]]:
    """Rows of exposure, and why secrets are missing from them."""
    spans = [
        [span for span in canary.secret_spans if span.slot in _slots(canary.kind, settings)]
        for canary in subject.canaries
    ]
    found = [
        [
            expose(
                subject.model,
                subject.encoder,
                canary.text,
                span,
                _candidates(canary.kind, span.slot, settings, seed),
                values=number_of_values(canary.kind, span.slot),
                on_tokens=on_tokens,
            )
            for span in own
        ]
        for canary, own in zip(subject.canaries, spans, strict=True)
    ]
    refused = exposure_refusals(spans, found)
    return exposure_rows(subject.name, subject.canaries, found), refused


def _candidates(kind: str, slot: str, settings: Audit, seed: int) -> list[str]:
    """All values that a secret can have, or random ones of too many; the same for every canary and model."""
    every = possible_values(kind, slot, limit=RANK_ALL)
    return every if every is not None else random_values(kind, slot, settings.exposure_samples, seed=seed)


def _epsilon(
    name: str,
    canaries: Sequence[Canary],
    readings: Sequence[Reading],
    reference: Findings | None,
    delta: float,
    accounted: float | None,
) -> Iterator[EpsilonBound]:
    """The bound from the canaries of each number of copies, and from all of them."""
    values = [reading.log_likelihood.mean().item() for reading in readings]
    if reference is not None:
        before = [reading.log_likelihood.mean().item() for reading in reference.readings]
        values = [value - base for value, base in zip(values, before, strict=True)]
    numbers = Counter(canary.copies for canary in canaries)
    for copies in [*sorted(numbers), None] if len(numbers) > 1 else sorted(numbers):
        chosen = [place for place, canary in enumerate(canaries) if copies in (None, canary.copies)]
        yield epsilon_bound(
            [values[place] for place in chosen],
            [canaries[place].inserted for place in chosen],
            model=name,
            copies=copies,
            delta=delta,
            accounted=accounted if copies == 1 else None,
            score="loss" if reference is None else "ratio",
        )
