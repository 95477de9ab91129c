"""Retraining: it begins as a fresh adapter does and is the same each time; checkpoints are of the same training."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allmend.attribution.retraining import (
    Retraining,
    checkpoint_rates,
    checkpoints,
    fresh,
    retrain,
    target_losses,
)
from allmend.data.chat import Encoded
from allmend.errors import UserError
from allmend.learn.loop import Step
from allmend.models.adapters import Trainable, add_lora, learning_adapter, remove_lora

MakeModel = Callable[..., torch.nn.Module]


def records(count: int, seed: int = 0) -> list[Encoded]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = int(torch.randint(4, 12, (), generator=generator))
        ids, place = torch.randint(0, 256, (length,), generator=generator), torch.arange(length)
        made.append(Encoded(f"{index}", ids, place > 0, torch.zeros_like(place), place))
    return made


@pytest.fixture
def trainable(make_tiny_model: MakeModel) -> Trainable:
    return add_lora(make_tiny_model(), rank=2, alpha=4.0, targets=["q_proj", "v_proj"], seed=3)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_it_begins_as_a_new_adapter_does(make_tiny_model: MakeModel, tmp_path: Path) -> None:
    """Also where the shape is read from a folder, and not every layer has the same rank."""
    made = add_lora(make_tiny_model(), rank=2, alpha=4.0, targets=["q_proj", "down_proj"], seed=7)
    begun = made.state()
    assert same(fresh(made, seed=7), begun)
    assert not same(fresh(made, seed=8), begun)
    made.save(tmp_path / "adapter", {name: one + 1 for name, one in begun.items()}, base="tiny")
    with learning_adapter(remove_lora(made), tmp_path / "adapter") as again:
        assert not same(again.state(), begun)
        assert same(fresh(again, seed=7), begun)


def test_a_factor_that_does_not_learn_is_kept(make_tiny_model: MakeModel) -> None:
    made = add_lora(make_tiny_model(), rank=2, alpha=4.0, targets=["q_proj"], learns="b", seed=7)
    digest = made.frozen_digest
    assert same(fresh(made, seed=8), made.state())
    trained = retrain(made, records(5), Retraining(learning_rate=0.01, epochs=1, batch_size=2), seed=8)
    assert made.frozen_digest == digest
    assert all(one.any() for one in trained.values())


def test_what_the_adapter_was_before_does_not_matter_and_each_seed_has_an_order(trainable: Trainable) -> None:
    settings = Retraining(learning_rate=0.01, epochs=2, batch_size=2)
    first = retrain(trainable, records(7), settings, seed=1)
    assert same(retrain(trainable, records(7), settings, seed=1), first)
    assert same(trainable.state(), first)
    assert not same(retrain(trainable, records(7), settings, seed=2), first)
    # all records in each batch have no order
    whole = Retraining(learning_rate=0.01, epochs=2, batch_size=7)
    one, other = (retrain(trainable, records(7), whole, seed=seed) for seed in (1, 2))
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_checkpoints_are_of_the_same_training_and_rates_those_of_its_steps(trainable: Trainable) -> None:
    settings, steps = Retraining(learning_rate=0.01, epochs=3, batch_size=2), list[Step]()
    whole = retrain(trainable, records(5), settings, seed=1, on_step=steps.append)
    assert len(steps) == settings.steps(5) == 9
    half, end = checkpoints(trainable, records(5), settings, seed=1, shares=(0.5, 1.0))
    assert same(end, whole)
    assert not same(half, whole)
    rates = checkpoint_rates(5, settings, (0.5, 1.0))
    assert sum(rates) == pytest.approx(sum(step.learning_rate for step in steps))
    assert rates[0] == pytest.approx(sum(step.learning_rate for step in steps[:4]))
    assert rates[0] > rates[1]  # the rate falls


def test_losses_are_those_of_each_record_read_alone(
    trainable: Trainable, log_probs: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
) -> None:
    trainable.load({name: one + 0.1 for name, one in trainable.state().items()})
    some, seen = records(6), list[int]()
    found = target_losses(trainable, some, 20, on_tokens=seen.append)
    for record, loss in zip(some, found, strict=True):
        assert loss == pytest.approx(-log_probs(trainable.model, record.ids).sum().item(), rel=1e-4)
    assert sum(seen) == sum(map(len, some))
    assert len(seen) > 1


def test_training_lowers_the_losses_of_what_is_trained_on(trainable: Trainable) -> None:
    some = records(4)
    trainable.load(fresh(trainable, seed=0))
    before = sum(target_losses(trainable, some, 64))
    retrain(trainable, some, Retraining(learning_rate=0.02, epochs=10, batch_size=4), seed=0)
    assert sum(target_losses(trainable, some, 64)) < before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learning_rate": 0.0}, "--learning-rate: must be a number above 0, got 0"),
        ({"learning_rate": float("nan")}, "--learning-rate: must be a number above 0, got nan"),
        ({"epochs": 0}, "--epochs: must be 1 or more, got 0"),
        ({"batch_size": -1}, "--batch-size: must be 1 or more, got -1"),
    ],
)
def test_numbers_out_of_range_are_told(settings: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Retraining(**settings)  # type: ignore[arg-type]


def test_a_training_that_diverges_says_what_to_do(trainable: Trainable) -> None:
    with pytest.raises(UserError, match="--learning-rate"):
        retrain(trainable, records(4), Retraining(learning_rate=1e38, epochs=5, batch_size=1), seed=0)


def test_a_model_without_numbers_has_no_losses(trainable: Trainable) -> None:
    trainable.load({name: one * float("nan") for name, one in trainable.state().items()})
    with pytest.raises(UserError, match="loss of target record '0' is not finite"):
        target_losses(trainable, records(3), 64)
