"""TracIn: of one checkpoint Hessian-free, of several the weighted sum, and what one step of gradient descent does."""

from collections.abc import Callable

import pytest
import torch
from tests.influence.conftest import MakeRecords

from allmend.influence.gradients import Given, OfRecords
from allmend.influence.methods import HessianFree
from allmend.influence.scores import influence
from allmend.influence.tracin import tracin
from allmend.learn.objective import log_likelihood
from allmend.models.adapters import Trainable, add_lora

Pair = tuple[Given, Given]


def pair(seed: int, n: int = 7, q: int = 4) -> Pair:
    generator = torch.Generator().manual_seed(seed)

    def made(count: int) -> Given:
        shapes = {"a": (2, 5), "b": (2, 3)}
        drawn = {
            name: torch.randn(count, *shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
        }
        return Given(drawn, torch.rand(count, generator=generator, dtype=torch.float64), batch=3)

    return made(n), made(q)


def test_of_one_checkpoint_with_rate_one_it_is_hessian_free() -> None:
    train, target = pair(0)
    groups = [("x",), ("y",), ("x",), ("y",)]
    found, plain = (
        tracin([(train, target)], [1.0], groups=groups),
        influence(train, target, HessianFree(), groups=groups),
    )
    assert torch.equal(found.values, plain.values)
    assert torch.equal(tracin([(train, target)], groups=groups).values, plain.values)
    assert (found.targets, found.method) == (("x", "y"), "tracin")
    assert "hessian_free" in found.solved.notes[0]


def test_it_is_the_weighted_sum_over_checkpoints_whatever_their_order() -> None:
    pairs, rates = [pair(seed) for seed in range(3)], [0.5, 2.0, 0.1]
    found = tracin(iter(pairs), rates)
    expected = torch.zeros(7, 1, dtype=torch.float64)
    for rate, (train, target) in zip(rates, pairs, strict=True):
        for name, g in train.gradients.items():
            expected += rate * torch.einsum("nrd,rd->n", g, target.gradients[name].mean(0))[:, None]
    assert torch.allclose(found.values, expected, rtol=1e-12)
    assert torch.equal(found.losses, pairs[-1][0].losses)
    assert found.solved.notes == ()
    turned = tracin(reversed(pairs), rates[::-1])
    assert torch.allclose(turned.values, expected, rtol=1e-12)


def test_it_foretells_small_steps_along_single_records(
    make_tiny_model: Callable[..., torch.nn.Module], make_records: MakeRecords
) -> None:
    """Gradient descent on one record at a time: the target's loss falls by Σ η ⟨v, g⟩ of the records gone through."""
    trainable = add_lora(make_tiny_model(), rank=2, alpha=4.0, targets=["q_proj", "v_proj"], seed=0)
    generator = torch.Generator().manual_seed(0)
    trainable.load({name: 0.3 * torch.randn(one.shape, generator=generator) for name, one in trainable.state().items()})
    records, target, rate = make_records(3, 1), make_records(2, 2), 1e-3
    checkpoints = []
    before = loss_of(trainable, target)
    for record in records:
        checkpoints.append(trainable.state())
        (batch,) = OfRecords(trainable, [record])
        parameters = trainable.parameters()
        with torch.no_grad():
            for name, g in batch.gradients.items():
                parameters[name] -= rate * (g[0].T if ".lora_B." in name else g[0])
    fell = before - loss_of(trainable, target)

    def each():  # type: ignore[no-untyped-def]
        for place, state in enumerate(checkpoints):
            trainable.load(state)
            yield OfRecords(trainable, records[place : place + 1]), OfRecords(trainable, target)

    scores = tracin(each(), [rate] * 3).values
    assert fell == pytest.approx(float(scores.sum()), rel=0.02)
    assert abs(fell) > 1e-5


def loss_of(trainable: Trainable, records: list) -> float:  # type: ignore[type-arg]
    from allmend.data.packing import pack

    with torch.no_grad():
        rows = pack(records, 512)
        return -sum(float(log_likelihood(trainable.model, row).double().sum()) for row in rows) / len(records)


def test_what_makes_no_sum_is_refused() -> None:
    with pytest.raises(ValueError, match="no checkpoint"):
        tracin([])
    for rates in ([1.0], [1.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match="zip"):
            tracin([pair(0), pair(1)], rates)
    with pytest.raises(ValueError, match="checkpoint 2 has scores"):
        tracin([pair(0), pair(1, n=6)])
