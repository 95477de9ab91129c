"""Folded layers that are trained a little, against a control that is trained as much."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from allmend.data.windows import Windows
from allmend.depth import recover as module
from allmend.depth.apply import apply_plan
from allmend.depth.architectures import layers_of
from allmend.depth.correction import measured, row_of
from allmend.depth.measure import Measured
from allmend.depth.plan import Plan, stretch_plan
from allmend.depth.recover import Recovery, Training, divergence_from, recover, text_loss
from allmend.errors import UserError
from allmend.learn.loop import DivergedError, Step

MakeDecoder = Callable[..., Any]

PLAN = Plan(((0,), (1, 2), (3,), (4, 5)))
ALONE = stretch_plan(6, 0, 0)
FOLDED = ("model.layers.1.", "model.layers.3.")
SHORT = Training(steps=3, rank=4, learning_rate=1e-2)


def text(seed: int, windows: int = 6, *, tokens: int = 20) -> Windows:
    """A language of 12 words, whose next word follows from the last but for one time in eight."""
    generator = torch.Generator().manual_seed(seed)
    jumps = torch.where(
        torch.rand(windows, tokens, generator=generator) < 1 / 8,
        torch.randint(12, (windows, tokens), generator=generator),
        1,
    )
    return Windows(7 * (jumps.cumsum(1) % 12) + 5, f"text {seed}", str(seed))


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture
def model(make_decoder: MakeDecoder) -> Any:
    return make_decoder(dtype=torch.float32)


@pytest.fixture
def paired(model: Any) -> Any:
    return apply_plan(model, PLAN)


@pytest.mark.parametrize("loss", ["causal", "kl"])
def test_the_original_is_left_as_it_was(model: Any, loss: Any) -> None:
    next(model.parameters()).requires_grad_(False)
    paired = apply_plan(model, PLAN)
    before, learns = tensors(model), [parameter.requires_grad for parameter in model.parameters()]
    modules = [type(one) for one in model.modules()]

    recover(paired, model, PLAN, text(1), report=text(2), training=Training(3, loss=loss, rank=4))

    assert same(tensors(model), before)
    assert [parameter.requires_grad for parameter in model.parameters()] == learns
    assert [type(one) for one in model.modules()] == modules
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in (*model.modules(), *paired.modules()))
    layers_of(model)  # refuses a model with an adapter
    assert all(parameter.grad is None for one in (model, paired) for parameter in one.parameters())


def test_all_matrices_of_folded_layers_learn_and_nothing_else(decoder: Any) -> None:
    paired = apply_plan(decoder.float(), PLAN)
    before = tensors(paired)
    shared = {name: p.data_ptr() for name, p in paired.named_parameters() if not name.startswith(FOLDED)}

    recover(paired, decoder, PLAN, text(1), report=text(2), training=SHORT)

    after = tensors(paired)
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    matrices = {
        f"{name}.weight"
        for name, one in paired.named_modules()
        if isinstance(one, torch.nn.Linear) and name.startswith(FOLDED)
    }
    assert changed == matrices
    assert {name: p.data_ptr() for name, p in paired.named_parameters() if name in shared} == shared
    for name in changed:
        strengths = torch.linalg.svdvals((after[name] - before[name]).double())
        assert int((strengths > 1e-4 * strengths[0]).sum()) <= SHORT.rank


def test_both_learn_the_language_and_the_gap_is_told_against_the_control(model: Any, paired: Any) -> None:
    report = text(2)
    other = apply_plan(model, PLAN)
    training = Training(steps=40, batch_size=2, rank=8, learning_rate=1e-2)
    steps: list[tuple[str, Step]] = []

    found = recover(paired, model, PLAN, text(1), report=report, training=training, on_step=lambda *s: steps.append(s))

    assert found.paired.after.value < 0.5 * found.paired.before.value
    assert found.control.after.value < 0.5 * found.control.before.value
    sequential, lossy, better = (measured(*one, report) for one in ((model, ALONE), (other, PLAN), (paired, PLAN)))
    for perplexity, one in (
        (found.control.before, sequential),
        (found.paired.before, lossy),
        (found.paired.after, better),
    ):
        assert perplexity.value == pytest.approx(np.exp(one.loss), rel=1e-5)
    logs = {name: np.log(getattr(found, name).after.value) for name in ("paired", "control")}
    assert found.gap_before.value == pytest.approx(lossy.loss - sequential.loss, abs=1e-6)
    assert found.gap_after.value == pytest.approx(logs["paired"] - logs["control"], abs=1e-6)
    windows = [float(a.mean() - b.mean()) for a, b in zip(lossy.losses, sequential.losses, strict=True)]
    assert found.gap_before.n == len(windows)
    assert found.gap_before.low < found.gap_before.value < found.gap_before.high
    assert min(windows) < found.gap_before.value < max(windows)
    for name in ("sequential", "paired"):
        taken = [step for who, step in steps if who == name]
        assert [step.number for step in taken] == list(range(1, 41))
        assert np.allclose([step.learning_rate for step in taken], 1e-2 * (1 - np.arange(40) / 40))
        assert sum(step.tokens for step in taken) == found.tokens == 40 * 2 * 20
        assert np.mean([step.loss for step in taken[-5:]]) < np.mean([step.loss for step in taken[:5]])
    assert [who for who, _ in steps] == ["sequential"] * 40 + ["paired"] * 40


def test_the_sequential_model_is_a_teacher_and_its_own_control(model: Any, paired: Any) -> None:
    windows, report = text(1), text(2)
    rows = [row_of(window) for window in report.ids]
    divergence = divergence_from(model)
    with torch.no_grad():
        before = sum(float(divergence(paired, row)) for row in rows)
    steps: list[str] = []

    found = recover(
        paired,
        model,
        PLAN,
        windows,
        report=report,
        training=Training(steps=40, batch_size=2, rank=8, loss="kl", learning_rate=5e-3),
        on_step=lambda who, step: steps.append(who),
    )

    with torch.no_grad():
        assert sum(float(divergence(paired, row)) for row in rows) < 0.5 * before
        assert abs(float(divergence(model, rows[0]))) < 1e-4
    assert found.control.after == found.control.before
    assert steps == ["paired"] * 40
    assert found.loss == "kl"


def test_a_teacher_has_nothing_to_learn_from_itself(model: Any) -> None:
    """So training a control on the divergence would change nothing."""
    row = row_of(text(1).ids[0])

    divergence_from(model)(model, row).backward()
    own = [parameter.grad.norm() for parameter in model.parameters()]
    model.zero_grad()
    text_loss(model, row).backward()

    for found, other in zip(own, (parameter.grad.norm() for parameter in model.parameters()), strict=True):
        assert found < 1e-4 * other


def test_losses_are_those_of_the_logits(model: Any, paired: Any) -> None:
    ids = text(1).ids[:1]
    with torch.no_grad():
        logs, expected = ((one(ids).logits[:, :-1].log_softmax(-1)) for one in (paired, model))
        divergence = float((expected.exp() * (expected - logs)).sum())
        loss = -float(logs.gather(2, ids[:, 1:, None]).sum())

        assert float(divergence_from(model)(paired, row_of(ids[0]))) == pytest.approx(divergence, rel=1e-4)
        assert float(text_loss(paired, row_of(ids[0]))) == pytest.approx(loss, rel=1e-5)


def test_everything_follows_from_the_seed(model: Any) -> None:
    def recovered(seed: int) -> tuple[dict[str, torch.Tensor], Recovery]:
        paired = apply_plan(model, PLAN)
        training = Training(steps=3, rank=4, learning_rate=1e-2, seed=seed)
        found = recover(paired, model, PLAN, text(1), report=text(2), training=training)
        return tensors(paired), found

    torch.manual_seed(0)
    one = recovered(1)
    torch.manual_seed(1)
    two, three = recovered(1), recovered(2)

    assert same(one[0], two[0])
    assert one[1] == two[1]
    assert one[1].paired.after != three[1].paired.after


def test_steps_start_from_the_models_as_they_are_and_drop_nothing_out(make_decoder: MakeDecoder) -> None:
    model = make_decoder(dtype=torch.float32, attention_dropout=0.5)
    paired, windows = apply_plan(model, PLAN), text(1)
    starts = [measured(*one, windows).loss for one in ((model, ALONE), (paired, PLAN))]
    steps: list[Step] = []
    training = Training(steps=1, batch_size=len(windows), rank=4)

    recover(paired, model, PLAN, windows, report=text(2), training=training, on_step=lambda _, step: steps.append(step))

    assert [step.loss for step in steps] == pytest.approx(starts, rel=1e-5)
    assert [step.targets for step in steps] == [6 * 19] * 2


def test_the_order_of_windows_follows_from_the_seed(model: Any) -> None:
    windows = text(1)
    alone = [measured(model, ALONE, Windows(window[None], "", "")).loss for window in windows.ids]
    firsts: list[float] = []
    for seed in range(5):
        steps: list[Step] = []
        recover(
            apply_plan(model, PLAN),
            model,
            PLAN,
            windows,
            report=text(2, 1),
            training=Training(steps=1, rank=4, seed=seed),
            on_step=lambda _, step, steps=steps: steps.append(step),  # type: ignore[misc]
        )
        firsts.append(steps[0].loss or 0.0)

    assert all(min(abs(first - one) for one in alone) < 1e-5 for first in firsts)
    assert max(firsts) - min(firsts) > 1e-3


@pytest.mark.parametrize(
    ("rate", "words"),
    [(30.0, r"step [2-8]: loss [\d.]+ after [\d.]+"), (1e30, "step [1-8]")],
    ids=["losses that rise", "what is not finite"],
)
def test_training_that_diverges_leaves_both_as_they_were(model: Any, paired: Any, rate: float, words: str) -> None:
    before = tensors(model), tensors(paired)
    training = Training(steps=8, rank=4, learning_rate=rate)

    with pytest.raises(DivergedError, match=f"recovery diverged at {words}") as raised:
        recover(paired, model, PLAN, text(1), report=text(2), training=training)

    assert "Choose a lower learning rate." in str(raised.value)
    assert same(tensors(model), before[0])
    assert same(tensors(paired), before[1])
    layers_of(model)


@pytest.mark.parametrize(
    ("losses", "closed", "notes"),
    [
        # sequential, paired; control, paired after training
        ((2.0, 3.0, 1.0, 1.25), 0.75, []),
        ((2.0, 3.0, 1.0, 2.5), -0.5, ["training widened the gap"]),
        ((2.0, 1.0, 2.0, 2.5), None, ["training widened the gap"]),
    ],
)
def test_the_share_closed_is_of_the_gap_to_the_control(
    model: Any,
    paired: Any,
    monkeypatch: pytest.MonkeyPatch,
    losses: tuple[float, ...],
    closed: float | None,
    notes: list[str],
) -> None:
    """Where there was no gap, none is closed."""
    left = iter(losses)

    def measured(*_: object) -> Any:
        return Measured((), [np.full(4, next(left), dtype=np.float32)])

    monkeypatch.setattr(module, "measured", measured)

    found = recover(paired, model, PLAN, text(1), report=text(2, 1), training=SHORT)

    assert found.gap_before.value == losses[1] - losses[0]
    assert found.gap_after.value == losses[3] - losses[2]
    assert found.closed == closed
    assert list(found.notes) == ["one window to report on gives no interval", *notes]


def test_a_gap_within_its_error_is_told(model: Any, paired: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = iter([(1.0, 1.0), (0.5, 2.0), (1.0, 1.0), (1.0, 1.1)])

    def measured(*_: object) -> Any:
        return Measured((), [np.full(4, loss, dtype=np.float32) for loss in next(windows)])

    monkeypatch.setattr(module, "measured", measured)

    found = recover(paired, model, PLAN, text(1), report=text(2, 2), training=SHORT)

    assert found.notes == ("the gap before training is within its own error: the share closed says little",)


def test_what_is_refused(model: Any, paired: Any) -> None:
    def asked(training: Training, *, plan: Plan = PLAN, windows: Windows | None = None) -> Recovery:
        return recover(paired, model, plan, windows or text(1), report=text(2), training=training)

    with pytest.raises(UserError, match="no layers of the plan run side by side"):
        asked(SHORT, plan=ALONE)
    with pytest.raises(UserError, match=r"text 2: the text to report on is that of the recovery"):
        asked(SHORT, windows=text(2))
    for wrong in ({"steps": 0}, {"batch_size": 0}, {"rank": 0}, {"alpha": -1.0}, {"learning_rate": 0.0}):
        name = next(iter(wrong))
        with pytest.raises(UserError, match=f"{name} of the recovery is {wrong[name]} and must be above 0"):
            asked(Training(**({"steps": 1} | wrong)))
    with pytest.raises(UserError, match="rank 64 is larger than the smaller dimension"):
        asked(Training(steps=1, rank=64))
