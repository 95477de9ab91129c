"""The monitor measures what brute force does, says who wants a warmup, and leaves no trace."""

import csv
import io
import json
import math

import pytest
import torch
from torch import nn

from allmend.optim import LionA, LionAR, UpdateMonitor, parameter_groups
from allmend.optim.closed_forms import direction_scale, first_step_spike
from allmend.optim.monitor import angle_between_rows


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 20))


def noisy_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Gradients that are noise; the forward pass is for the layers' inputs."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        model(torch.randn(8, 30, generator=generator)).sum().backward()
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()


def test_lengths_angles_and_changes_of_outputs_are_those_of_brute_force() -> None:
    model, inputs = network(), torch.randn(6, 30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = model[0].weight
    with UpdateMonitor(model, optimizer, outputs=True, probe=lambda: model(inputs)) as monitor:
        model(inputs).square().sum().backward()
        before, said = weight.detach().clone(), model(inputs).detach()
        optimizer.step()
    after = weight.detach()
    (found,) = (one for one in monitor.updates if one.name == "0.weight")
    assert found.length == pytest.approx((after - before).norm().item(), rel=1e-5)
    cosines = nn.functional.cosine_similarity(before.double(), after.double())
    assert found.angle == pytest.approx(cosines.acos().square().mean().sqrt().item(), rel=1e-4)
    assert found.largest_angle == pytest.approx(cosines.acos().max().item(), rel=1e-4)
    change = (inputs @ (after - before).T).norm() / (inputs @ before.T).norm()
    assert found.output_change == pytest.approx(change.item(), rel=1e-4)
    assert monitor.logits[1] == pytest.approx(((model(inputs) - said).norm() / said.norm()).item(), rel=1e-4)


def test_small_angles_are_not_lost() -> None:
    a = torch.randn(5, 40, dtype=torch.float64)
    x = a / a.norm(dim=1, keepdim=True)
    side = torch.randn(5, 40, dtype=torch.float64)
    side -= (side * x).sum(1, keepdim=True) * x
    side /= side.norm(dim=1, keepdim=True)
    for angle in (1e-5, 0.3, 3.0):
        b = x * math.cos(angle) + side * math.sin(angle)
        assert angle_between_rows(a, b).tolist() == pytest.approx([angle] * 5, rel=1e-4)
    assert angle_between_rows(torch.zeros(1, 3), torch.ones(1, 3)).item() == 0


def test_adamw_in_noise_wants_a_warmup_and_liona_does_not() -> None:
    model = network()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    with UpdateMonitor(model, adamw) as monitor:
        noisy_steps(model, adamw, 60)
    report = monitor.report()
    assert report.expected_spike == pytest.approx(first_step_spike(0.9))
    assert 3.6 < report.spike < 5.4
    assert "wants a warmup, or a momentum ramp" in report.verdict
    model = network()
    liona = LionA(model.parameters(), lr=1e-3, weight_decay=0.0)
    with UpdateMonitor(model, liona) as monitor:
        noisy_steps(model, liona, 60)
    report = monitor.report()
    assert report.spike == pytest.approx(1, rel=0.02)
    length = 1e-3 * direction_scale(0.9) * math.sqrt(sum(p.numel() for p in model.parameters()))
    assert report.whole[1] == pytest.approx(length, rel=1e-4)


def test_turning_too_far_at_first_is_told_even_where_lengths_are_even() -> None:
    """Rows that are still small turn far under updates of constant length."""
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    liona = LionA(model.parameters(), lr=1e-3)
    with UpdateMonitor(model, liona) as monitor:
        noisy_steps(model, liona, 40)
    assert "as far as their equilibrium" in monitor.report().verdict
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    lionar = LionAR(parameter_groups(model), lr=1e-3)
    with UpdateMonitor(model, lionar) as monitor:
        noisy_steps(model, lionar, 40)
    report = monitor.report()
    assert "a warmup has nothing to do here" in report.verdict
    for tensor in report.tensors:
        if tensor.equilibrium:
            assert tensor.first_angle == pytest.approx(tensor.equilibrium, rel=1e-3)


def test_decay_is_told_apart_from_the_update() -> None:
    model = network()
    liona = LionA(model.parameters(), lr=1e-3, weight_decay=5.0)
    with UpdateMonitor(model, liona) as monitor:
        noisy_steps(model, liona, 1)
    for one in monitor.updates:
        count = dict(model.named_parameters())[one.name].numel()
        assert one.without_decay == pytest.approx(1e-3 * direction_scale(0.9) * math.sqrt(count), rel=1e-3)
        assert one.length != pytest.approx(one.without_decay, rel=1e-3) or "bias" in one.name


def test_it_looks_at_the_first_steps_and_then_now_and_again_and_changes_nothing() -> None:
    watched, alone = network(), network()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (watched, alone)]
    with UpdateMonitor(watched, optimizers[0], every=7, outputs=True) as monitor:
        noisy_steps(watched, optimizers[0], 15)
    noisy_steps(alone, optimizers[1], 15)
    assert sorted({one.step for one in monitor.updates}) == [1, 2, 3, 7, 14]
    for one, other in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)
    seen = len(monitor.updates)
    noisy_steps(watched, optimizers[0], 3)  # after it is closed
    assert len(monitor.updates) == seen


def test_what_was_seen_is_written_as_json_and_csv() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with UpdateMonitor(model, optimizer) as monitor:
        noisy_steps(model, optimizer, 2)
    found = json.loads(monitor.report().to_json())
    assert {one["name"] for one in found["tensors"]} == {name for name, _ in model.named_parameters()}
    assert found["spike"] is None  # nothing moved
    assert "Too few" in found["verdict"]
    rows = list(csv.DictReader(io.StringIO(monitor.to_csv())))
    assert len(rows) == len(monitor.updates) == 8


def test_another_models_optimiser_is_refused() -> None:
    model, other = network(), network()
    with pytest.raises(ValueError, match="no parameter of this model"):
        UpdateMonitor(model, torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="every must be 1 or more"):
        UpdateMonitor(model, torch.optim.SGD(model.parameters(), lr=0.1), every=0)
