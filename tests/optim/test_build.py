"""Optimisers by name, and several behind one step."""

import pytest
import torch
from tests.optim.test_liona import parameter, run
from torch import nn

from allmend.optim.build import BUILDERS, build_optimizer
from allmend.optim.together import Together


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("name", BUILDERS)
def test_each_lowers_a_loss_and_steps_every_parameter(name: str) -> None:
    model = network()
    inputs, outputs = torch.randn(64, 6), torch.randn(64, 3)
    optimizer = build_optimizer(name, model, lr=0.02, weight_decay=0.01)
    if name == "schedulefree":
        optimizer.train()  # type: ignore[attr-defined]
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(inputs) - outputs).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(before[key], value) for key, value in model.named_parameters())


def test_vectors_do_not_decay() -> None:
    for name in ("adamw", "radam", "sgd", "liona", "lionar", "muon"):
        model = network()
        optimizer = build_optimizer(name, model, lr=0.01, weight_decay=0.3)
        decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert {decays[id(p)] for p in model.parameters() if p.dim() < 2} == {0.0}, name
        assert {decays[id(p)] for p in model.parameters() if p.dim() >= 2} == {0.3}, name


def test_a_name_that_is_not_there_is_told_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no optimiser 'muonn' .* did you mean muon\?"):
        build_optimizer("muonn", network(), lr=0.1)
    with pytest.raises(TypeError):
        build_optimizer("liona", network(), lr=0.1, bogus=1)


def test_together_is_each_by_itself() -> None:
    ours, alone = (parameter(4, 4), parameter(3)), (parameter(4, 4), parameter(3))
    both = Together(torch.optim.SGD([ours[0]], lr=0.1, momentum=0.9), torch.optim.AdamW([ours[1]], lr=0.01))
    apart = [torch.optim.SGD([alone[0]], lr=0.1, momentum=0.9), torch.optim.AdamW([alone[1]], lr=0.01)]
    scheduler = torch.optim.lr_scheduler.StepLR(both, 1, 0.5)
    run(both, 1)
    for one in apart:
        run(one, 1)
        one.param_groups[0]["lr"] *= 0.5
    scheduler.step()
    saved = both.state_dict()
    run(both, 2)
    for one in apart:
        run(one, 2)
    for mine, other in zip(ours, alone, strict=True):
        assert torch.equal(mine, other)
    again = Together(torch.optim.SGD([parameter(4, 4)], lr=9.0), torch.optim.AdamW([parameter(3)], lr=9.0))
    again.load_state_dict(saved)
    assert [group["lr"] for group in again.param_groups] == pytest.approx([0.05, 0.005])
    with pytest.raises(ValueError, match="of 1 optimisers, and there are 2"):
        again.load_state_dict({"parts": [{}]})
    with pytest.raises(ValueError, match="more than one parameter group"):
        Together(torch.optim.SGD([ours[0]], lr=0.1), torch.optim.SGD([ours[0]], lr=0.1))
