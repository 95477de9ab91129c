"""The strategy protocol: sums that cannot be taken apart, and declarations that hold."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allmend.strategy import Declaration, Reply, Seen, Sums, grouped, of_group


def reply(seed: int, members: int = 1) -> Reply:
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** (seed % 9)
    tensors = {"u/a": torch.randn(3, 2, generator=generator) * scale, "u/b": torch.randn((), generator=generator)}
    return Reply(tensors, {"weight": float(seed + 1)})


@given(st.permutations(range(6)))
def test_the_order_of_adding_does_not_matter(order: list[int]) -> None:
    sums = Sums()
    for seed in order:
        sums.add(reply(seed))
    assert sums.members == 6
    assert set(sums) == {"u/a", "u/b"}
    assert sums.fact("weight") == 21
    for name in sums:
        terms = torch.stack([reply(seed).summed[name].double() for seed in range(6)])
        assert sums[name].dtype == torch.float64
        exact = torch.tensor([math.fsum(column) for column in terms.reshape(6, -1).T.tolist()]).reshape(terms.shape[1:])
        bound = 6 * torch.finfo(torch.float64).eps * terms.abs().sum(0)
        assert ((sums[name] - exact).abs() <= bound + exact.abs() * 1e-7).all()


def test_float32_terms_are_summed_in_float64() -> None:
    sums = Sums()
    for value in (1e8, 1.0, -1e8):
        sums.add(Reply({"x": torch.tensor([value], dtype=torch.float32)}))
    assert sums["x"].item() == 1.0  # float32 would give 0


def test_sums_keep_no_member_and_offer_no_way_to_one() -> None:
    """After adding, nothing that a sum holds is a reply's value, or as many values as there were replies."""
    replies = [reply(seed) for seed in range(3)]
    sums = Sums()
    for one in replies:
        sums.add(one)
    public = {name for name in dir(sums) if not name.startswith("_")}
    assert public == {"add", "cut", "fact", "members", "of"}
    held = [value for value in vars(sums).values() if isinstance(value, dict)]
    tensors = [t for values in held for t in values.values() if isinstance(t, torch.Tensor)]
    assert len(tensors) == 2
    memory = {t.untyped_storage().data_ptr() for one in replies for t in one.summed.values()}
    for tensor, one in itertools.product(tensors, replies):
        assert tensor.untyped_storage().data_ptr() not in memory
        assert not any(tensor.shape == t.shape and torch.equal(tensor, t.double()) for t in one.summed.values())


def test_adding_changes_no_reply() -> None:
    first, second = reply(1), reply(2)
    before = first.summed["u/a"].clone()
    sums = Sums()
    sums.add(Reply({"u/a": first.summed["u/a"].double()}))
    sums.add(second)
    assert torch.equal(first.summed["u/a"], before)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (Reply({"u/a": torch.zeros(3, 2), "u/b": torch.tensor(math.nan)}), "'u/b'.*NaN"),
        (Reply({"u/a": torch.full((3, 2), math.inf)}), "'u/a'"),
        (Reply({"u/b": torch.tensor(1.0), "u/a": torch.zeros(2, 3)}), r"'u/a'.*\(2, 3\).*\(3, 2\)"),
        (Reply({"u/b": torch.tensor(1.0)}, {"weight": math.nan}), "'weight'"),
        (Reply({}, {"weight": -math.inf}), "'weight'"),
    ],
)
def test_what_cannot_be_summed_is_refused_by_name_and_adds_nothing(bad: Reply, words: str) -> None:
    sums, untouched = Sums(), Sums()
    sums.add(reply(0))
    untouched.add(reply(0))
    with pytest.raises(ValueError, match=words):
        sums.add(bad)
    assert sums.members == 1
    assert all(torch.equal(sums[name], untouched[name]) for name in untouched)
    assert sums.fact("weight") == untouched.fact("weight")


def test_what_nobody_sent() -> None:
    sums = Sums()
    assert sums.fact("weight") == 0
    assert "weight" not in sums
    with pytest.raises(KeyError):
        sums["u/a"]


def test_different_members_may_send_different_tensors() -> None:
    sums = Sums()
    sums.add(Reply({"a": torch.ones(2)}))
    sums.add(Reply({"b": torch.ones(3)}))
    sums.add(Reply({"b": torch.ones(3)}))
    assert sums["a"].tolist() == [1, 1]
    assert sums["b"].tolist() == [2, 2, 2]
    assert "a" in sums
    assert "c" not in sums


def test_a_number_that_was_sent_is_there_even_if_it_is_0() -> None:
    sums = Sums()
    sums.add(Reply(summed_facts={"loss": 0.0}))
    assert "loss" in sums
    assert "weight" not in sums


def test_what_is_not_declared_in_its_group_is_found() -> None:
    declaration = Declaration(sent="", summed={"update": "w", "weight": "w"}, seen={"model": "w", "loss": "w"})
    one = torch.zeros(1)
    assert declaration.undeclared(Reply({"update/x": one}, {"weight": 1.0}, {"model/x": one}, {"loss": 1.0})) == []
    assert declaration.undeclared(Reply({"model/x": one}, {"loss": 1.0})) == ["loss", "model"]
    assert declaration.undeclared(Reply(seen={"update/x": one}, seen_facts={"weight": 1})) == ["update", "weight"]
    assert declaration.undeclared(Reply({"updates": one})) == ["updates"]


def test_groups_are_prefixes() -> None:
    tensors = {"a.b/c": torch.zeros(1), "d": torch.ones(1)}
    mixed = grouped("model", tensors) | grouped("modelling", {"d": torch.zeros(2)})
    assert of_group("model", mixed) == tensors
    assert of_group("other", mixed) == {}
    assert Seen({}, {}).tensors == {}
