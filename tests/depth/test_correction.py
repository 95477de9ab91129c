"""A folded layer's output projections, fitted: against stacked least squares, and what may not change."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allmend.data.windows import Windows
from allmend.depth.apply import apply_plan
from allmend.depth.architectures import architecture_of
from allmend.depth.correction import Normal, correct, measured, normal_of, row_of
from allmend.depth.decoder import Decoder
from allmend.depth.interventions import SideBySide, attention_update
from allmend.depth.plan import Plan, pairs_plan, stretch_plan
from allmend.errors import UserError

MakeDecoder = Callable[..., Any]

PLAN = Plan(((0,), (1, 2), (3, 4, 5)))
ALONE = stretch_plan(6, 0, 0)


def text(seed: int, windows: int = 8, *, tokens: int = 24, digest: str = "") -> Windows:
    """Random tokens."""
    ids = torch.randint(1, 97, (windows, tokens), generator=torch.Generator().manual_seed(seed))
    return Windows(ids, f"text {seed}", digest or str(seed))


def said_by(model: Any, seed: int, windows: int, *, tokens: int = 24) -> Windows:
    """What a model says: no other model has a lower loss on it, up to chance."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 97, (windows, 1), generator=generator)
    with torch.no_grad():
        while ids.shape[1] < tokens:
            chances = model(ids, use_cache=False).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return Windows(ids, f"said {seed}", f"said {seed}")


@contextmanager
def heard(modules: Sequence[torch.nn.Module]) -> Iterator[list[torch.Tensor]]:
    """What modules are given, [tokens, inputs] of each call."""
    calls: list[torch.Tensor] = []
    handles = [module.register_forward_pre_hook(lambda _, given: calls.append(given[0][0])) for module in modules]
    yield calls
    for handle in handles:
        handle.remove()


def added_up(V: torch.Tensor, R: torch.Tensor, *, pieces: int = 1) -> Normal:
    normal = Normal.empty(V.shape[1], R.shape[1], V.device)
    for inputs, missing in zip(V.chunk(pieces), R.chunk(pieces), strict=True):
        normal.add(inputs, missing)
    return normal


def ridge(V: np.ndarray, U: np.ndarray, W0: np.ndarray, ridge: float) -> np.ndarray:
    """argmin ‖U − V Wᵀ‖² + λ ‖W − W₀‖², as least squares with the ridge's rows below."""
    inputs = V.shape[1]
    left = np.concatenate([V, np.sqrt(ridge) * np.eye(inputs)])
    right = np.concatenate([U, np.sqrt(ridge) * W0.T])
    solved: np.ndarray = np.linalg.lstsq(left, right, rcond=None)[0].T
    return solved


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(4, 40),
    inputs=st.integers(1, 12),
    outputs=st.integers(1, 5),
    log_rho=st.floats(-3, 3),
    seed=st.integers(0, 1000),
)
def test_a_fit_is_ridge_regression(tokens: int, inputs: int, outputs: int, log_rho: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    V, U, W0 = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((tokens, inputs), (tokens, outputs), (outputs, inputs))
    )
    normal = added_up(V, U - V @ W0.T, pieces=3)
    strength = 10**log_rho * float(V.square().sum(0).mean())

    D = normal.change(10**log_rho)

    assert np.allclose(W0 + D, ridge(V.numpy(), U.numpy(), W0.numpy(), strength), atol=1e-7)
    assert normal.error(D) == pytest.approx(float((U - V @ (W0 + D).T).square().sum()), rel=1e-7, abs=1e-7)


def test_rho_leads_from_least_squares_to_no_change() -> None:
    generator = torch.Generator().manual_seed(0)
    V, R = (torch.randn(50, size, generator=generator, dtype=torch.float64) for size in (6, 3))
    normal = added_up(V, R)

    assert np.allclose(normal.change(1e-13), np.linalg.lstsq(V.numpy(), R.numpy(), rcond=None)[0].T, atol=1e-9)
    assert float(normal.change(1e13).abs().max()) < 1e-12
    sizes = [float(normal.change(rho).norm()) for rho in (0.01, 0.1, 1.0, 10.0)]
    assert sizes == sorted(sizes, reverse=True)


def test_a_ridge_that_is_lost_in_rounding_is_refused() -> None:
    V = torch.ones(2, 8, dtype=torch.float64)

    with pytest.raises(UserError, match="too small"):
        added_up(V, V[:, :1]).change(1e-25)


@pytest.mark.parametrize("group", PLAN.together, ids=str)
def test_projections_are_fitted_to_the_layers_one_after_the_other(decoder: Any, group: tuple[int, ...]) -> None:
    """V, R and the fit from the layers themselves, none of them folded, on the streams of layers side by side."""
    windows, architecture = text(3, 6), architecture_of(decoder.model.layers[0])
    paired = apply_plan(decoder, PLAN)
    place = PLAN.groups.index(group)
    folded = paired.model.layers[place]
    V: dict[str, list[torch.Tensor]] = {"attention": [], "perceptron": []}
    U: dict[str, list[torch.Tensor]] = {"attention": [], "perceptron": []}
    layers = [decoder.model.layers[layer] for layer in group]
    norms, outputs = ({name: getattr(getattr(architecture, name), part) for name in V} for part in ("norm", "output"))
    with torch.no_grad():
        for window in windows.ids:
            trunk = Decoder(decoder).trunk(window[None])
            stream, named = trunk.states[1], trunk.named[group[0]]
            if group[0] > 1:
                stream = SideBySide(decoder.model.layers[1:3])(stream, **trunk.named[1])
            one_by_one = [
                attention_update(architecture, decoder.model.layers[layer], trunk.states[layer], **named)
                for layer in group
            ]
            U["attention"].append(sum(one_by_one)[0])
            with heard([layer.get_submodule(outputs["attention"]) for layer in layers]) as inputs:
                at_once = [
                    layer.self_attn(layer.get_submodule(norms["attention"])(stream), **named)[0] for layer in layers
                ]
            V["attention"].append(torch.cat(inputs, dim=1))
            middle = stream + sum(at_once)
            U["perceptron"].append((trunk.states[group[-1] + 1] - middle)[0])
            read = stream if architecture.at_once else middle
            with heard([layer.get_submodule(outputs["perceptron"]) for layer in layers]) as inputs:
                for layer in layers:
                    layer.mlp(layer.get_submodule(norms["perceptron"])(read))
            V["perceptron"].append(torch.cat(inputs, dim=1))
    for name in V:
        projection = folded.get_submodule(outputs[name])
        given, wanted = torch.cat(V[name]).numpy(), torch.cat(U[name]).numpy()
        if projection.bias is not None:
            wanted = wanted - projection.bias.detach().numpy()
        before = projection.weight.detach().numpy()
        expected = ridge(given, wanted, before, 0.1 * np.square(given).sum(0).mean())

        found = before + normal_of(Decoder(decoder), paired, PLAN, place, outputs[name], windows).change(0.1).numpy()

        assert np.abs(expected - before).max() > 1e-3
        assert np.allclose(found, expected, atol=1e-8)


def test_a_correction_closes_part_of_the_gap_and_touches_nothing_else(make_decoder: MakeDecoder) -> None:
    model = make_decoder()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    paired = apply_plan(model, PLAN)
    other = apply_plan(model, PLAN)
    seen: list[Any] = []
    report, held_out = said_by(model, 3, 60), said_by(model, 2, 40)

    found = correct(paired, model, PLAN, said_by(model, 1, 60), held_out=held_out, on_fit=seen.append)

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(one._forward_hooks for one in (*model.modules(), *paired.modules()))
    changed = {
        name
        for (name, one), two in zip(paired.state_dict().items(), other.state_dict().values(), strict=True)
        if not torch.equal(one, two)
    }
    places = {group: PLAN.groups.index(group) for group in PLAN.together}
    assert changed == {f"model.layers.{places[f.layers]}.{f.projection}.weight" for f in found.fits if f.applied}
    assert changed
    assert seen == list(found.fits)
    assert len(seen) == 2 * len(PLAN.together)
    plain, lossy, better = (measured(*one, report).loss for one in ((model, ALONE), (other, PLAN), (paired, PLAN)))
    assert better - plain < 0.8 * (lossy - plain)
    held = [measured(*one, held_out).loss for one in ((model, ALONE), (other, PLAN), (paired, PLAN))]
    assert found.gap_before.value == pytest.approx(held[1] - held[0], abs=1e-6)
    assert found.gap_after.value == pytest.approx(held[2] - held[0], abs=1e-6)


def test_a_fit_that_does_not_help_is_not_kept(make_decoder: MakeDecoder) -> None:
    """Two windows tell less than the projections have inputs, and without a ridge they are learnt by heart."""
    model = make_decoder()
    paired, before = (apply_plan(model, PLAN).float() for _ in range(2))
    model = model.float()
    held_out = said_by(model, 2, 20)

    found = correct(paired, model, PLAN, text(1, 2), held_out=held_out, grid=[1e-9])

    left = [fit for fit in found.fits if not fit.applied]
    assert left
    for fit in left:
        name = f"model.layers.{PLAN.groups.index(fit.layers)}.{fit.projection}.weight"
        assert torch.equal(paired.state_dict()[name], before.state_dict()[name])
        assert any(fit.projection in note and "stays as it was" in note for note in found.notes)
    assert any("48 tokens are few" in note for note in found.notes)
    assert found.gap_after.value <= found.gap_before.value
    assert measured(paired, PLAN, held_out).loss <= measured(before, PLAN, held_out).loss


def test_rho_is_that_of_the_smallest_held_out_error(make_decoder: MakeDecoder) -> None:
    model = make_decoder()
    windows, held_out, grid = text(1, 4), text(2, 4), (1e-6, 0.1, 1e6)

    found = correct(apply_plan(model, PLAN), model, PLAN, windows, held_out=held_out, grid=grid)

    first = found.fits[0]
    paired = apply_plan(model, PLAN)
    fitted, judged = (
        normal_of(Decoder(model), paired, PLAN, 1, first.projection, some) for some in (windows, held_out)
    )
    errors = {rho: judged.error(fitted.change(rho)) for rho in grid}
    assert first.rho == min(errors, key=lambda rho: errors[rho])
    assert first.explained == pytest.approx(1 - errors[first.rho] / judged.energy)


def test_an_exact_pair_needs_no_correction(make_decoder: MakeDecoder) -> None:
    model = make_decoder()
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[2].get_submodule(name).weight.zero_()
    plan = pairs_plan(6, [1])
    paired, other = apply_plan(model, plan), apply_plan(model, plan)

    correct(paired, model, plan, text(1), held_out=text(2))

    assert all(
        torch.allclose(one, two, atol=1e-10) for one, two in zip(paired.parameters(), other.parameters(), strict=True)
    )


def test_losses_are_those_of_the_logits(make_decoder: MakeDecoder) -> None:
    model, windows = make_decoder(), text(1)
    paired = apply_plan(model, PLAN)
    with torch.no_grad():
        logits = paired(windows.ids).logits[:, :-1].float()
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows.ids[:, 1:], reduction="none")

    found = measured(paired, PLAN, windows)

    assert np.allclose(np.stack(found.losses), expected, atol=1e-6)
    assert found.depth == 3
    assert row_of(windows.ids[0]).targets.tolist() == windows.ids[0, 1:].tolist()


def test_what_is_refused(make_decoder: MakeDecoder) -> None:
    model = make_decoder()
    paired, windows, held_out = apply_plan(model, PLAN), text(1), text(2)
    with pytest.raises(UserError, match="no layers of the plan run side by side"):
        correct(paired, model, ALONE, windows, held_out=held_out)
    with pytest.raises(UserError, match=r"widths \[1, 2, 3\], the plan's groups \[1, 1, 1, 1, 2\]"):
        correct(paired, model, pairs_plan(6, [4]), windows, held_out=held_out)
    with pytest.raises(UserError, match="widths None"):
        correct(model, model, PLAN, windows, held_out=held_out)
    both = Windows(torch.cat([held_out.ids, windows.ids[:2]]), "both", "3")
    with pytest.raises(UserError, match="both: 2 of 10 held-out windows"):
        correct(paired, model, PLAN, windows, held_out=both)
    for grid in ([], [0.0], [1.0, float("inf")], [-1.0]):
        with pytest.raises(UserError, match="grid of ρ"):
            correct(paired, model, PLAN, windows, held_out=held_out, grid=grid)


def test_a_model_that_overflows_is_refused(make_decoder: MakeDecoder) -> None:
    model = make_decoder()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf

    with pytest.raises(UserError, match=r"layers \[1, 2\] put out what is not finite"):
        correct(apply_plan(model, PLAN), model, PLAN, text(1), held_out=text(2))
