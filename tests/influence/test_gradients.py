"""Gradients from factors against autograd, one record at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.influence.conftest import MakeRecords

from allmend.data.packing import pack
from allmend.errors import UserError
from allmend.influence.gradients import OfRecords, mean_gradient
from allmend.influence.methods import Gfim
from allmend.influence.scores import influence
from allmend.learn.objective import log_likelihood
from allmend.models.adapters import Trainable, full


def alone(trainable: Trainable, record: Any) -> tuple[dict[str, torch.Tensor], float]:
    (row,) = pack([record], 1)
    parameters = trainable.parameters()
    loss = -log_likelihood(trainable.model, row).sum()
    found = torch.autograd.grad(loss, list(parameters.values()))
    return {name: g.T if "lora_B" in name else g for name, g in zip(parameters, found, strict=True)}, loss.item()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=8, deadline=None)
@given(tokens=st.integers(1, 60))
def test_each_record_s_gradient_and_loss_are_autograd_s(
    tokens: int, trainable: Trainable, make_records: MakeRecords
) -> None:
    records = make_records(6, 1)
    source = OfRecords(trainable, records, tokens_per_pass=tokens)
    seen = []
    for batch in source:
        for index, place in enumerate(batch.places):
            seen.append(place)
            expected, loss = alone(trainable, records[place])
            assert float(batch.losses[index]) == pytest.approx(loss, rel=1e-5)
            assert batch.gradients.keys() == expected.keys()
            for name, g in expected.items():
                assert torch.allclose(batch.gradients[name][index], g, atol=2e-5), name
    assert sorted(seen) == list(range(6))
    assert all(parameter.grad is None for parameter in trainable.parameters().values())


def test_modules_are_chosen_by_their_names(trainable: Trainable, make_records: MakeRecords) -> None:
    records = make_records(4, 1)
    source = OfRecords(trainable, records, modules=r"v_proj.*lora_A")
    for batch in source:
        assert batch.gradients
        assert all("v_proj" in name and "lora_A" in name for name in batch.gradients)
    with pytest.raises(UserError, match="no weight that learns matches 'w_proj'"):
        OfRecords(trainable, records, modules="w_proj")


def test_both_factors_have_their_rank_in_front(trainable: Trainable, make_records: MakeRecords) -> None:
    for batch in OfRecords(trainable, make_records(4, 1)):
        assert {g.shape[1] for g in batch.gradients.values()} == {2}


def test_the_mean_of_a_group_is_the_mean(trainable: Trainable, make_records: MakeRecords) -> None:
    records = make_records(5, 1)
    names, means = mean_gradient(
        OfRecords(trainable, records), [("x", "all"), ("y", "all"), ("x", "all"), ("x", "all"), ("y", "all")]
    )
    each = [alone(trainable, record)[0] for record in records]
    assert names == ["all", "x", "y"]
    for module, mean in means.items():
        assert torch.allclose(mean[0], torch.stack([one[module] for one in each]).mean(0), atol=2e-5)
        assert torch.allclose(mean[1], (each[0][module] + each[2][module] + each[3][module]) / 3, atol=2e-5)
        assert torch.allclose(mean[2], (each[1][module] + each[4][module]) / 2, atol=2e-5)


def test_scores_of_packed_records_are_those_of_records_one_by_one(
    trainable: Trainable, make_records: MakeRecords
) -> None:
    train, target = make_records(7, 1), make_records(3, 2)
    found = [
        influence(OfRecords(trainable, train, tokens_per_pass=size), OfRecords(trainable, target), Gfim()).values
        for size in (1, 200)
    ]
    assert torch.allclose(*found, rtol=1e-4, atol=1e-5 * float(found[0].abs().max()))


def test_what_has_no_factors_or_nothing_to_learn_is_told(
    trainable: Trainable, make_tiny_model: Callable[..., Any], make_records: MakeRecords
) -> None:
    with pytest.raises(UserError, match="here everything learns"):
        OfRecords(full(make_tiny_model()), make_records(4, 1))
    from dataclasses import replace

    (first, *rest) = make_records(4, 1)
    silent = replace(first, target=torch.zeros_like(first.target))
    with pytest.raises(UserError, match="1 records have no token to learn from"):
        list(OfRecords(trainable, [silent, *rest]))


def test_a_model_that_gives_no_numbers_is_told_with_the_record(trainable: Trainable, make_records: MakeRecords) -> None:
    state = trainable.state()
    name = min(state)
    trainable.load(state | {name: torch.full_like(state[name], float("nan"))})
    with pytest.raises(UserError, match=r"the loss of record '1-[0-9]' is not finite"):
        list(OfRecords(trainable, make_records(3, 1)))
