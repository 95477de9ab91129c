"""Gradients from factors against autograd, one record at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.influence.conftest import MakeRecords

from allmend.data.chat import Encoded
from allmend.data.packing import pack
from allmend.errors import UserError
from allmend.influence import gradients as source_module
from allmend.influence.gradients import OfRecords, mean_gradient
from allmend.influence.kept import keep
from allmend.influence.methods import Gfim
from allmend.influence.scores import influence
from allmend.learn.objective import log_likelihood
from allmend.models.adapters import Trainable, add_lora, full


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


# torch.func goes through attention one record after the other, and says so
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore::FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_torch_func(checkpointing: bool, make_tiny_model: Callable[..., Any]) -> None:
    trainable = trained_double(make_tiny_model)
    generator = torch.Generator().manual_seed(5)
    place = torch.arange(7)
    records = [
        Encoded(str(i), torch.randint(0, 256, (7,), generator=generator), place > 1, torch.zeros_like(place), place)
        for i in range(4)
    ]
    names = {name.replace(".weight", ".default.weight"): name for name in trainable.parameters()}  # PEFT's own
    parameters = {own: trainable.parameters()[name].detach() for own, name in names.items()}

    def loss(parameters: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        call = {"input_ids": ids[None], "use_cache": False}
        logits = torch.func.functional_call(trainable.model, parameters, (), call).logits[0]
        return -logits[1:-1].log_softmax(-1).gather(1, ids[2:, None]).sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, torch.stack([r.ids for r in records]))
    if checkpointing:
        trainable.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trainable.model.train()
    (batch,) = OfRecords(trainable, records)
    assert trainable.model.training is checkpointing
    for own, name in names.items():
        expected = each[own][list(batch.places)]
        expected = expected.mT if ".lora_B." in name else expected
        assert float((batch.gradients[name] - expected).abs().max() / expected.abs().max()) < 1e-8


def trained_double(make_tiny_model: Callable[..., Any], turn: torch.Tensor | None = None) -> Trainable:
    """An adapter in double precision; with `turn` Q [r, r] the same one as Q A and B Qᵀ."""
    made = add_lora(make_tiny_model().double(), rank=2, alpha=4.0, targets=["q_proj", "v_proj"], seed=0)
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.3 * torch.randn(one.shape, generator=generator).double() for name, one in made.state().items()}
    if turn is not None:
        state = {name: turn @ one if ".lora_A." in name else one @ turn.T for name, one in state.items()}
    made.load(state)
    made.model.eval()
    return made


def test_another_basis_of_the_same_adapter_leaves_the_scores(
    make_tiny_model: Callable[..., Any], make_records: MakeRecords
) -> None:
    q, _ = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    train, target = make_records(6, 1), make_records(3, 2)
    found = []
    for turn in (None, q):
        trainable = trained_double(make_tiny_model, turn)
        found.append(influence(OfRecords(trainable, train), OfRecords(trainable, target), Gfim()).values)
    assert torch.allclose(*found, rtol=0, atol=1e-9 * float(found[0].abs().max()))


def test_scores_in_passes_are_those_of_gradients_in_memory(
    make_tiny_model: Callable[..., Any], make_records: MakeRecords
) -> None:
    trainable = trained_double(make_tiny_model)
    streamed = [OfRecords(trainable, make_records(n, n), tokens_per_pass=20) for n in (7, 3)]
    held = [keep(source) for source in streamed]
    found, expected = (influence(*sources, Gfim()).values for sources in (streamed, held))
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-10 * float(expected.abs().max()))


def test_a_gradient_that_is_not_finite_is_told_with_its_record(
    trainable: Trainable, make_records: MakeRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = source_module._each

    def spoilt(x: torch.Tensor, delta: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        found = each(x, delta, lengths)
        found[1, 0, 0] = float("inf")
        return found

    monkeypatch.setattr(source_module, "_each", spoilt)
    records = make_records(4, 1)
    (row,) = pack(records, 512)
    second = records[row.record.unique_consecutive()[1]].id
    with pytest.raises(UserError, match=f"the gradient of record '{second}' is not finite"):
        list(OfRecords(trainable, records))


def test_an_adapter_whose_factors_b_are_zero_is_untrained(trainable: Trainable, make_records: MakeRecords) -> None:
    source = OfRecords(trainable, make_records(3, 1))
    assert not source.untrained
    trainable.load({name: one * (".lora_A." in name) for name, one in trainable.state().items()})
    assert source.untrained
    found = influence(source, source, Gfim())
    assert found.solved.skipped == tuple(name for name in source.names if ".lora_A." in name)
    assert found.values.abs().min() > 0


def test_a_frozen_factor_has_no_gradients_and_is_nothing_to_wait_for(
    make_tiny_model: Callable[..., Any], trainable: Trainable, make_records: MakeRecords
) -> None:
    alone = add_lora(make_tiny_model(), rank=2, alpha=4.0, targets=["q_proj", "v_proj"], learns="b", seed=0)
    records = make_records(3, 1)
    assert not OfRecords(alone, records).untrained
    # as B of both, beside the same A
    both = add_lora(make_tiny_model(), rank=2, alpha=4.0, targets=["q_proj", "v_proj"], seed=0)
    tensors = {name: trainable.state()[name] for name in alone.parameters()}
    alone.load(tensors)
    both.load(both.state() | tensors)
    (found,), (expected,) = (list(OfRecords(one, records)) for one in (alone, both))
    assert found.gradients.keys() == tensors.keys()
    assert all(torch.equal(gradients, expected.gradients[name]) for name, gradients in found.gradients.items())


def test_what_is_no_regular_expression_is_told(trainable: Trainable, make_records: MakeRecords) -> None:
    with pytest.raises(UserError, match=r"'\[' is no regular expression"):
        OfRecords(trainable, make_records(3, 1), modules="[")


def test_a_model_that_gives_no_numbers_is_told_with_the_record(trainable: Trainable, make_records: MakeRecords) -> None:
    state = trainable.state()
    name = min(state)
    trainable.load(state | {name: torch.full_like(state[name], float("nan"))})
    with pytest.raises(UserError, match=r"the loss of record '1-[0-9]' is not finite"):
        list(OfRecords(trainable, make_records(3, 1)))
