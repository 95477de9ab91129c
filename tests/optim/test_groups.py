"""Which parameters rotate, and why."""

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from allmend.models.adapters import add_lora
from allmend.optim import LionAR, parameter_groups
from allmend.optim.groups import placed


def test_linear_weights_rotate_and_embeddings_norms_and_biases_do_not(make_tiny_model: object) -> None:
    model: LlamaForCausalLM = make_tiny_model()  # type: ignore[operator]
    found = {one.name: one for one in placed(model)}
    assert found["model.layers.0.self_attn.q_proj.weight"].rotational
    assert found["model.layers.1.mlp.down_proj.weight"].rotational
    tied = found["model.embed_tokens.weight"]
    assert (tied.rotational, tied.decays) == (False, True)
    norm = found["model.norm.weight"]
    assert (norm.rotational, norm.decays) == (False, False)
    assert {one.why for one in found.values() if not one.rotational} == {
        "a vector has no rows",
        "an embedding's rows are tokens, whose norms carry the logits or stand still for long",
    }
    untied: LlamaForCausalLM = make_tiny_model(tied=False)  # type: ignore[operator]
    assert {one.name: one for one in placed(untied)}["lm_head.weight"].rotational


def test_factors_of_lora_do_not_rotate(make_tiny_model: object) -> None:
    trainable = add_lora(make_tiny_model(), rank=2, alpha=4.0, targets=["q_proj"], seed=0)  # type: ignore[operator]
    found = placed(trainable.model)
    assert found
    assert not any(one.rotational for one in found)
    assert all("lora_" in one.name for one in found)  # what is frozen is left out


def test_groups_cover_everything_that_learns_once_and_make_an_optimiser(make_tiny_model: object) -> None:
    model: LlamaForCausalLM = make_tiny_model()  # type: ignore[operator]
    groups = parameter_groups(model, weight_decay=0.2)
    named = [pair for group in groups for pair in group["params"]]
    assert {name for name, _ in named} == {name for name, _ in model.named_parameters()}
    assert len({id(parameter) for _, parameter in named}) == len(named)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.2}
    LionAR(groups, lr=1e-3)
    torch.optim.AdamW(groups, lr=1e-3)  # keys that it does not know do no harm


def test_transposed_layers_are_seen() -> None:
    model = nn.Sequential(nn.Linear(4, 3), Conv1D(5, 3))
    dims = {one.name: one.neuron_dim for one in placed(model) if one.rotational}
    assert dims == {"0.weight": 0, "1.weight": 1}


def test_one_may_choose() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    chosen = placed(model, rotational=lambda name, module, parameter: name == "1.weight")
    assert [one.name for one in chosen if one.rotational] == ["1.weight"]
    assert not any(one.rotational for one in placed(model, rotational="none"))
    with pytest.raises(ValueError, match="rotational must be"):
        placed(model, rotational="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no parameter of the model learns"):
        parameter_groups(model.requires_grad_(False))
