"""Layers of protection that act on a member's records before training, and on the parameters after it."""

from collections.abc import Sequence
from dataclasses import replace

from allmend.data.duplicates import without_duplicates
from allmend.federation.member import Member
from allmend.learn.goldfish import goldfish
from allmend.learn.noise import noise_source
from allmend.models.tensors import Tensors
from allmend.recipe import Goldfish, Privacy


def protected(members: Sequence[Member], privacy: Privacy) -> tuple[list[Member], tuple[str, ...]]:
    """The members with the records that training may see and the tokens that it may learn, and each layer in words."""
    members, words = list(members), []
    if privacy.deduplicate is not None:
        similarity = privacy.deduplicate.similarity
        found = [without_duplicates(member.records, similarity=similarity) for member in members]
        before = sum(len(member.records) for member in members)
        exact, near = sum(counts.exact for _, counts in found), sum(counts.near for _, counts in found)
        members = [replace(member, records=kept) for member, (kept, _) in zip(members, found, strict=True)]
        words.append(
            f"{_deduplication(similarity)}: {exact:,} equal and {near:,} similar of {before:,} records left out"
        )
    if privacy.goldfish is not None:
        settings = privacy.goldfish
        masked = [goldfish(member.records, settings) for member in members]
        members = [replace(member, records=records) for member, (records, _) in zip(members, masked, strict=True)]
        targets, dropped = sum(counts.targets for _, counts in masked), sum(counts.dropped for _, counts in masked)
        short, emptied = sum(counts.short for _, counts in masked), sum(counts.emptied for _, counts in masked)
        share = dropped / targets if targets else 0.0
        words.append(
            f"{_goldfish(settings)}: {share:.1%} of {targets:,} tokens left out of the loss"
            + (f"; nothing in {short:,} records that are not longer than h" if short else "")
            + (f"; everything in {emptied:,} records, which teach nothing" if emptied else "")
        )
    return members, (*words, *_on_what_leaves(privacy))


def in_words(privacy: Privacy) -> tuple[str, ...]:
    """Each layer in words, for whoever does not see what it does to the members' records."""
    words = []
    if privacy.deduplicate is not None:
        words.append(f"{_deduplication(privacy.deduplicate.similarity)}; members keep the counts to themselves")
    if privacy.goldfish is not None:
        words.append(f"{_goldfish(privacy.goldfish)}; members keep the counts to themselves")
    return (*words, *_on_what_leaves(privacy))


def _deduplication(similarity: float) -> str:
    bound = "equal ones only" if similarity == 1 else f"similarity {similarity:g} and above"
    return f"deduplication within each client ({bound})"


def _goldfish(settings: Goldfish) -> str:
    return f"Goldfish loss (k = {settings.k}, h = {settings.context}, {settings.variant})"


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
