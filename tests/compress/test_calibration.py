"""Products of inputs against inputs that were kept."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from allmend.compress.calibration import input_products, portions
from allmend.models.load import linear_layers_of


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def ids(windows: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50, (windows, 11), generator=torch.Generator().manual_seed(seed))


def kept(model: LlamaForCausalLM, some: torch.Tensor) -> dict[str, torch.Tensor]:
    found: dict[str, list[torch.Tensor]] = {}
    handles = []
    for name in linear_layers_of(model):

        def keep(_: Any, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
            found.setdefault(name, []).append(inputs[0].reshape(-1, inputs[0].shape[-1]).double())

        handles.append(model.get_submodule(name).register_forward_pre_hook(keep))
    with torch.no_grad():
        model(some)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def test_they_are_those_of_all_inputs(model: LlamaForCausalLM) -> None:
    some, layers = ids(5), list(linear_layers_of(model))
    windows = []
    found = input_products(model, some, layers, on_window=lambda: windows.append(1))
    assert len(windows) == 5
    assert list(found) == layers
    for name, x in kept(model, some).items():
        assert torch.allclose(found[name].matrix.double(), x.T @ x, rtol=1e-4, atol=1e-4), name
        assert torch.allclose(found[name].norms.double(), x.norm(dim=0), rtol=1e-4, atol=1e-4)
        assert found[name].tokens == 55
    shared = {id(found[name].matrix) for name in layers}
    assert len(shared) == 2 * 4  # of each layer: attention, its output, gate and up, down
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_those_of_two_texts_add_up(model: LlamaForCausalLM) -> None:
    layers = list(linear_layers_of(model))
    one, other = (input_products(model, ids(3, seed), layers) for seed in (1, 2))
    both = input_products(model, torch.cat([ids(3, 1), ids(3, 2)]), layers)
    for name in layers:
        total = one[name] + other[name]
        assert torch.allclose(total.matrix, both[name].matrix, rtol=1e-5, atol=1e-5)
        assert total.tokens == both[name].tokens


def test_some_layers_alone(model: LlamaForCausalLM) -> None:
    layers = list(linear_layers_of(model))
    whole = input_products(model, ids(2), layers)
    for part in portions(linear_layers_of(model), room=4 * 16**2 * 3):
        for name, found in input_products(model, ids(2), part).items():
            assert torch.equal(found.matrix, whole[name].matrix)


def test_what_is_not_finite_is_named(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"inputs of model\.layers\.1\.self_attn\.q_proj are not finite"):
        input_products(model, ids(1), list(linear_layers_of(model)))


def test_a_layer_that_is_not_used_is_named(model: LlamaForCausalLM) -> None:
    model.add_module("spare", torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="spare got no input"):
        input_products(model, ids(1), ["spare", "model.layers.0.mlp.up_proj"])


def test_portions_fit_and_hold_one_at_least() -> None:
    shapes = {"a": (1, 10), "b": (1, 10), "c": (1, 100), "d": (1, 10)}
    assert portions(shapes, room=800) == [["a", "b"], ["c"], ["d"]]
    assert portions(shapes, room=10**6) == [["a", "b", "c", "d"]]
    assert portions({}, room=1) == []
