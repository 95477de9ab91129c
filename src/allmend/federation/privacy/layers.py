"""Layers of protection that act on a member's records before training, and on the parameters after it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from allmend.data.duplicates import without_duplicates
from allmend.federation.member import Member
from allmend.learn.goldfish import goldfish
from allmend.learn.noise import noise_source
from allmend.models.tensors import Tensors
from allmend.recipe import Deduplicate, Goldfish, Privacy

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class RecordLayer(Generic[Settings]):
    """A layer on the records that a member trains on, or on which of their tokens teach.

    Attributes:
        key: of its section under `[privacy]`.
        describe: the layer with its settings, in words.
        apply: the members as the layer leaves them, and what it did to their records, in words.
    """

    key: str
    describe: Callable[[Settings], str]
    apply: Callable[[Sequence[Member], Settings], tuple[list[Member], str]]


def _deduplicated(members: Sequence[Member], settings: Deduplicate) -> tuple[list[Member], str]:
    found = [without_duplicates(member.records, similarity=settings.similarity) for member in members]
    before = sum(len(member.records) for member in members)
    exact, near = sum(counts.exact for _, counts in found), sum(counts.near for _, counts in found)
    kept = [replace(member, records=records) for member, (records, _) in zip(members, found, strict=True)]
    return kept, f"{exact:,} equal and {near:,} similar of {before:,} records left out"


def _masked(members: Sequence[Member], settings: Goldfish) -> tuple[list[Member], str]:
    found = [goldfish(member.records, settings) for member in members]
    targets, dropped = sum(counts.targets for _, counts in found), sum(counts.dropped for _, counts in found)
    short, emptied = sum(counts.short for _, counts in found), sum(counts.emptied for _, counts in found)
    share = dropped / targets if targets else 0.0
    words = f"{share:.1%} of {targets:,} tokens left out of the loss"
    words += f"; nothing in {short:,} records that are not longer than h" if short else ""
    words += f"; everything in {emptied:,} records, which teach nothing" if emptied else ""
    kept = [
        replace(member, records=records, target=goldfish(member.target, settings)[0])
        for member, (records, _) in zip(members, found, strict=True)
    ]
    return kept, words


def _deduplication(settings: Deduplicate) -> str:
    bound = "equal ones only" if settings.similarity == 1 else f"similarity {settings.similarity:g} and above"
    return f"deduplication within each client ({bound})"


def _goldfish(settings: Goldfish) -> str:
    return f"Goldfish loss (k = {settings.k}, h = {settings.context}, {settings.variant})"


RECORD_LAYERS: tuple[RecordLayer[Any], ...] = (
    RecordLayer("deduplicate", _deduplication, _deduplicated),
    RecordLayer("goldfish", _goldfish, _masked),
)
"""In the order in which they act."""


def protected(members: Sequence[Member], privacy: Privacy) -> tuple[list[Member], tuple[str, ...]]:
    """The members with the records that training may see and the tokens that it may learn, and each layer in words."""
    members, words = list(members), []
    for layer, settings in _present(privacy):
        members, did = layer.apply(members, settings)
        words.append(f"{layer.describe(settings)}: {did}")
    return members, (*words, *_on_what_leaves(privacy))


def in_words(privacy: Privacy) -> tuple[str, ...]:
    """Each layer in words, for whoever does not see what it does to the members' records."""
    words = (f"{layer.describe(found)}; members keep the counts to themselves" for layer, found in _present(privacy))
    return (*words, *_on_what_leaves(privacy))


def _present(privacy: Privacy) -> list[tuple[RecordLayer[Any], Any]]:
    found = [(layer, getattr(privacy, layer.key)) for layer in RECORD_LAYERS]
    return [(layer, settings) for layer, settings in found if settings is not None]


def _on_what_leaves(privacy: Privacy) -> list[str]:
    words = []
    if (layer := privacy.secure_aggregation) is not None:
        clip = privacy.member.clip if privacy.member is not None else layer.clip
        words.append(
            f"secure aggregation: changes cut to ±{clip:g}, summed as integers over {layer.fewest} members or more"
        )
    if privacy.weight_noise:
        words.append(f"weight noise: Gaussian, standard deviation {privacy.weight_noise:g}; no formal guarantee")
    return words


def noisy(tensors: Tensors | None, privacy: Privacy, seed: int, member: str | None) -> Tensors | None:
    """Parameters with Gaussian noise of standard deviation `privacy.weight_noise` on each.

    Source: Bossy et al., "Mitigating Unintended Memorization with LoRA in Federated Learning for LLMs", TMLR 2026.
    """
    if tensors is None:
        return None
    source = noise_source(privacy.randomness, seed, "weights", member or "")
    return {
        name: (tensor + privacy.weight_noise * source.normal(tensor.shape)).to(tensor.dtype)
        for name, tensor in sorted(tensors.items())
    }
