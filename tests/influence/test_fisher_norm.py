"""‖F‖² from a few records: exact where all are kept, without bias where not."""

import pytest
import torch
from tests.influence.test_methods import made

from allmend.influence import fisher_norm
from allmend.influence.blocks import fisher_blocks
from allmend.influence.fisher_norm import NormsOnTheWay
from allmend.influence.gradients import Given


def written_out(g: torch.Tensor) -> float:
    flat = g.flatten(1)
    return float((flat.T @ flat / len(flat)).square().sum())


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_it_is_the_norm_of_the_matrix_where_all_records_are_kept(batch: int) -> None:
    train = made(20, batch=batch)
    watched = NormsOnTheWay(train)
    list(watched)
    list(watched)  # a second pass begins anew
    for name, g in train.gradients.items():
        assert watched.squared_norm(name) == pytest.approx(written_out(g), rel=1e-12)


def test_the_mean_over_draws_of_a_part_is_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher_norm, "FEWEST", 2)  # with few, a wrong number of pairs would show
    train = made(24)
    found = []
    for seed in range(400):
        watched = NormsOnTheWay(train, seed=seed, most=4)
        list(watched)
        found.append(watched.squared_norm("a") or 0.0)
    values = torch.tensor(found)
    assert len(set(found)) > 300
    error = float(values.std()) / 400**0.5
    assert abs(float(values.mean()) - written_out(train.gradients["a"])) < 4 * error
    assert error < 0.04 * float(values.mean())


def test_batches_go_through_as_they_are() -> None:
    train = made(20)
    watched = NormsOnTheWay(train, most=16)
    assert len(watched) == 20
    plain, found = fisher_blocks(train), fisher_blocks(watched)
    assert all(torch.equal(plain.sums[name], found.sums[name]) for name in plain.sums)


def test_too_few_records_in_memory_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    train = made(40)
    monkeypatch.setattr(fisher_norm, "BYTES", 10 * 4 * (2 * 5 + 2 * 7))  # ten records' gradients
    watched = NormsOnTheWay(train)
    list(watched)
    assert watched.squared_norm("a") is None
    assert NormsOnTheWay(train).squared_norm("a") is None  # nobody went through it
    one = NormsOnTheWay(Given({"a": train.gradients["a"][:1]}))
    list(one)
    assert one.squared_norm("a") == pytest.approx(written_out(train.gradients["a"][:1]))
