import copy
from typing import Any

import pytest
import torch

from allmend.depth.apply import apply_plan
from allmend.depth.fold import Gain, fold_group
from allmend.depth.interventions import SideBySide, intervene
from allmend.depth.plan import Plan, pairs_plan, stretch_plan
from allmend.errors import UserError

PLANS = {
    "pairs": stretch_plan(6, 1, 5),
    "a pair and a triple": Plan(((0,), (1, 2), (3, 4, 5))),
    "everything at once": Plan((tuple(range(6)),)),
}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("gain", ["geometric", "one"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_folded_groups_equal_the_layers_side_by_side(decoder: Any, ids: torch.Tensor, plan: Plan, gain: Gain) -> None:
    with torch.no_grad():
        expected = intervene(decoder, plan)(ids).logits
        found = apply_plan(decoder, plan, gain=gain)(ids).logits

    assert relative(found, expected) < 1e-12
    assert relative(found, decoder(ids).logits) > 1e-3  # side by side is something else than one after the other


def test_a_plan_without_groups_changes_no_bit(decoder: Any, ids: torch.Tensor) -> None:
    found = apply_plan(decoder, stretch_plan(6, 2, 2))

    assert torch.equal(found(ids).logits, decoder(ids).logits)


def test_half_precision_is_folded_in_single(make_decoder: Any, ids: torch.Tensor) -> None:
    model = make_decoder(dtype=torch.bfloat16)
    plan = PLANS["pairs"]
    exact = intervene(copy.deepcopy(model).double(), plan)(ids).logits

    found = apply_plan(model, plan)(ids).logits

    assert found.dtype == torch.bfloat16
    assert relative(found.double(), exact) < 3e-2


def test_layers_of_a_pair_can_be_swapped(decoder: Any, ids: torch.Tensor) -> None:
    layers = list(decoder.model.layers)
    hidden = torch.randn(2, 5, 32, dtype=torch.float64)
    named = {"position_embeddings": decoder.model.rotary_emb(hidden, torch.arange(5)[None]), "attention_mask": None}

    one, other = (fold_group(some)(hidden, **named) for some in (layers[1:3], layers[2:0:-1]))

    assert relative(one, other) < 1e-12
    assert relative(one, SideBySide(layers[1:3])(hidden, **named)) < 1e-12


def test_a_partner_without_output_makes_a_pair_exact(decoder: Any, ids: torch.Tensor) -> None:
    model = copy.deepcopy(decoder)
    with torch.no_grad():
        for name, parameter in model.model.layers[3].named_parameters():
            if name.split(".")[1] in ("o_proj", "down_proj", "dense", "fc2", "c_proj"):
                parameter.zero_()

    found = apply_plan(model, pairs_plan(6, [2]))(ids).logits

    assert relative(found, model(ids).logits) < 1e-12


def test_parameters_but_for_the_gains_of_the_norms(decoder: Any) -> None:
    plan = PLANS["pairs"]
    found = apply_plan(decoder, plan)

    def count(model: Any) -> int:
        return sum(p.numel() for name, p in model.named_parameters() if "norm" not in name and "bias" not in name)

    assert count(found) == count(decoder)


def test_a_pair_has_two_norms_less(make_decoder: Any) -> None:
    model = make_decoder("llama")
    found = apply_plan(model, PLANS["pairs"])

    less = 2 * 32 * 2  # two norms of 32 gains for each of two pairs
    assert sum(p.numel() for p in found.parameters()) == sum(p.numel() for p in model.parameters()) - less


def test_layers_that_stay_alone_are_shared(make_decoder: Any) -> None:
    model = make_decoder("llama")
    found = apply_plan(model, PLANS["pairs"])

    shared = {p.data_ptr() for p in model.parameters()}
    own = [name for name, p in found.named_parameters() if p.data_ptr() not in shared]
    assert {name.split(".")[2] for name in own} == {"1", "2"}


def test_a_gradient_is_that_of_the_layers_side_by_side(make_decoder: Any, ids: torch.Tensor) -> None:
    """Mapped through the fold: rows of q, k, v, gate and up carry the gains, columns of o and down are as they are."""
    model, plan = make_decoder("llama"), stretch_plan(6, 2, 4)
    apart, folded = intervene(model, plan), apply_plan(model, plan)
    for one in (apart, folded):
        one(ids, labels=ids).loss.backward()

    pair = folded.model.layers[2]
    for place, layer in enumerate((2, 3)):
        alone = model.model.layers[layer]
        rows = slice(40 * place, 40 * (place + 1))
        gain = alone.post_attention_layernorm.weight / pair.post_attention_layernorm.weight
        assert relative(pair.mlp.down_proj.weight.grad[:, rows], alone.mlp.down_proj.weight.grad) < 1e-8
        assert relative(pair.mlp.up_proj.weight.grad[rows] * gain, alone.mlp.up_proj.weight.grad) < 1e-8


def test_unknown_layers_are_refused(make_decoder: Any) -> None:
    with pytest.raises(UserError, match="Linear"):
        fold_group([torch.nn.Linear(2, 2)] * 2)
    with pytest.raises(UserError, match="different kinds"):
        fold_group([make_decoder("llama").model.layers[0], make_decoder("qwen2").model.layers[0]])
