"""Layers on records against their own modules, and noise on parameters against the normal distribution."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scipy import stats

from allmend.data.duplicates import without_duplicates
from allmend.federation.member import Member
from allmend.federation.privacy.layers import noisy, protected
from allmend.learn.goldfish import goldfish
from allmend.recipe import Deduplicate, Goldfish, Privacy

MakeMember = Callable[..., Member]


@pytest.fixture
def members(make_member: MakeMember) -> list[Member]:
    """`a` has each of its records twice, `b` none; one record stands at both."""
    a, b = make_member("a", records=6), make_member("b", records=5)
    again = [replace(record, id=f"{record.id} again") for record in a.records]
    return [replace(a, records=[*a.records, *again]), replace(b, records=[*b.records, a.records[0]])]


def test_no_layer_leaves_everything_as_it_is(members: list[Member]) -> None:
    found, words = protected(members, Privacy())
    assert found == members
    assert words == ()


def test_equal_records_of_a_client_are_learnt_once_and_copies_at_two_clients_stay(members: list[Member]) -> None:
    found, (words,) = protected(members, Privacy(deduplicate=Deduplicate(similarity=1.0)))
    assert [len(member.records) for member in found] == [6, 6]
    assert [record.id for record in found[0].records] == [record.id for record in members[0].records[:6]]
    assert "6 equal and 0 similar of 18 records" in words
    for member in found:
        kept, counts = without_duplicates(member.records, similarity=1.0)
        assert (kept, counts.exact) == (list(member.records), 0)


def test_goldfish_leaves_out_the_same_tokens_at_every_client_and_counts_them(members: list[Member]) -> None:
    settings = Goldfish(k=2, context=2)
    found, (words,) = protected(members, Privacy(goldfish=settings))
    targets = sum(int(record.target.sum()) for member in members for record in member.records)
    left = sum(int(record.target.sum()) for member in found for record in member.records)
    assert 0 < left < targets
    assert f"{1 - left / targets:.1%} of {targets:,} tokens left out" in words
    assert torch.equal(found[0].records[0].target, found[1].records[5].target)  # the record that stands at both
    assert torch.equal(found[0].records[0].target, found[0].records[6].target)
    for member, before in zip(found, members, strict=True):
        assert [record.ids.tolist() for record in member.records] == [record.ids.tolist() for record in before.records]
        assert (member.name, member.seed, member.noise) == (before.name, before.seed, before.noise)


def test_records_that_goldfish_cannot_touch_are_told(members: list[Member]) -> None:
    short = sum(len(record) <= 5 for member in members for record in member.records)
    _, (words,) = protected(members, Privacy(goldfish=Goldfish(context=5)))
    assert 0 < short < 18
    assert f"nothing in {short} records that are not longer than h" in words
    _, (words,) = protected(members, Privacy(goldfish=Goldfish(context=1)))
    assert "not longer" not in words


def test_duplicates_go_before_tokens_are_left_out(members: list[Member]) -> None:
    """The variant `random` tosses other coins for a copy: after it, copies would not be equal any more."""
    layers = Privacy(deduplicate=Deduplicate(similarity=1.0), goldfish=Goldfish(k=2, variant="random"))
    found, (first, second) = protected(members, layers)
    assert [len(member.records) for member in found] == [6, 6]
    assert first.startswith("deduplication")
    assert second.startswith("Goldfish")
    alone, _ = goldfish(members[0].records[:6], layers.goldfish or Goldfish())
    for record, expected in zip(found[0].records, alone, strict=True):
        assert torch.equal(record.target, expected.target)


def test_noise_on_weights_is_told_as_what_it_is() -> None:
    assert protected([], Privacy(weight_noise=0.01)) == (
        [],
        ("weight noise: Gaussian, standard deviation 0.01; no formal guarantee",),
    )


# --- noise on parameters

TENSORS = {"a": torch.zeros(100, 80), "b": torch.ones(40, dtype=torch.bfloat16)}


def test_noise_is_normal_with_its_deviation() -> None:
    for deviation in (0.01, 3.0):
        found = noisy(TENSORS, Privacy(weight_noise=deviation), 1, None)
        assert found is not None
        noise = found["a"].flatten() / deviation
        assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-3
        assert noise.std().item() == pytest.approx(1, abs=4.5 / math.sqrt(2 * noise.numel()))
        assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in TENSORS.items()}


def test_seeded_noise_repeats_by_seed_and_member_in_any_order() -> None:
    privacy = Privacy(weight_noise=0.5)

    def draw(seed: int, member: str | None, tensors: dict[str, torch.Tensor] = TENSORS) -> torch.Tensor:
        found = noisy(tensors, privacy, seed, member)
        assert found is not None
        return found["a"]

    assert torch.equal(draw(1, None), draw(1, None))
    assert torch.equal(draw(1, None), draw(1, None, dict(reversed(TENSORS.items()))))
    others = [draw(2, None), draw(1, "north"), draw(1, "south")]
    for index, one in enumerate(others):
        assert not torch.equal(one, draw(1, None))
        assert all(not torch.equal(one, other) for other in others[:index])
        assert abs(torch.corrcoef(torch.stack([one.flatten(), draw(1, None).flatten()]))[0, 1]) < 0.06


def test_secure_noise_never_repeats_and_nothing_stays_nothing() -> None:
    privacy = Privacy(weight_noise=0.5, randomness="secure")
    one, other = (noisy(TENSORS, privacy, 1, None) for _ in range(2))
    assert one is not None
    assert other is not None
    assert not torch.equal(one["a"], other["a"])
    assert noisy(None, privacy, 1, None) is None
    assert torch.equal(TENSORS["a"], torch.zeros(100, 80))
