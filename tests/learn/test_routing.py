"""Gates of a mixture on records, against a softmax by hand over the MLP's own inputs."""

import pytest
import torch
from tests.conftest import MakeModel
from transformers import LlamaForCausalLM

from allmend.data.chat import Encoded
from allmend.learn.routing import layers_with_experts, token_gates, usage
from allmend.models.mixture import Mixture, apply_mixture
from allmend.models.mixture_layers import MixtureConfig


@pytest.fixture
def mixture(make_tiny_model: MakeModel) -> Mixture:
    config = MixtureConfig(generalists=1, specialists=2, rank=2)
    made = apply_mixture(make_tiny_model(num_hidden_layers=3), config, seed=1, specialist_seed=2, digest="")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters().values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made


def record(id: str, *ids: int) -> Encoded:
    length = len(ids)
    return Encoded(
        id,
        torch.tensor(ids, dtype=torch.int64),
        torch.ones(length, dtype=torch.bool),
        torch.zeros(length, dtype=torch.int64),
        torch.arange(length),
    )


def by_hand(mixture: Mixture, ids: torch.Tensor) -> torch.Tensor:
    """softmax(R u) [layers, T, E] from the inputs of each MLP, caught by hooks."""
    model = mixture.model
    assert isinstance(model, LlamaForCausalLM)
    inputs: list[torch.Tensor] = []
    hooks = [
        layer.post_attention_layernorm.register_forward_hook(lambda module, args, out: inputs.append(out[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=ids[None])
    for hook in hooks:
        hook.remove()
    routers = [mixture.parameters()[f"model.layers.{layer}.mlp.router"] for layer in range(len(inputs))]
    return torch.stack([(u @ router.T).softmax(-1) for u, router in zip(inputs, routers, strict=True)])


def test_gates_are_the_softmax_of_the_routers_logits(mixture: Mixture) -> None:
    ids = torch.arange(5, 17)
    assert torch.allclose(token_gates(mixture, ids), by_hand(mixture, ids), atol=1e-6)


def test_usage_sums_each_record_by_itself(mixture: Mixture) -> None:
    records = [record("a", 1, 2, 3), record("b", 9, 8, 7, 6, 5), record("c", 4)]

    found = usage(mixture, records)

    assert found is not None
    assert found.tokens == (3, 5, 1)
    for place, one in enumerate(records):
        assert torch.allclose(found.gates[place], by_hand(mixture, one.ids).double().sum(1), atol=1e-5)
    together = torch.cat([by_hand(mixture, one.ids) for one in records], dim=1).double().mean(1)
    assert torch.allclose(found.mean, together, atol=1e-6)
    assert torch.allclose(found.mean.sum(-1), torch.ones(3, dtype=torch.float64))


def test_the_first_records_up_to_a_number_of_tokens_are_read_and_one_at_least(mixture: Mixture) -> None:
    records = [record("a", 1, 2, 3), record("b", 9, 8, 7), record("c", 4)]
    read = {most: used.tokens for most in (1, 5, 6, 7) if (used := usage(mixture, records, most=most))}
    assert read == {1: (3,), 5: (3,), 6: (3, 3), 7: (3, 3, 1)}
    assert usage(mixture, []) is None
    assert usage(mixture, [record("empty")]) is None


def test_layers_have_their_numbers(make_tiny_model: MakeModel) -> None:
    config = MixtureConfig(rank=2, targets=["model.layers.1.mlp.up_proj", "model.layers.4.mlp.up_proj"])
    mixture = apply_mixture(make_tiny_model(num_hidden_layers=6), config, seed=0, specialist_seed=0, digest="")
    assert layers_with_experts(mixture) == [1, 4]
    assert token_gates(mixture, torch.arange(4)).shape == (2, 4, 2)


def test_a_single_expert_has_all_the_weight(make_tiny_model: MakeModel) -> None:
    config = MixtureConfig(generalists=1, specialists=0, rank=2)
    mixture = apply_mixture(make_tiny_model(), config, seed=0, specialist_seed=0, digest="")
    assert torch.equal(token_gates(mixture, torch.arange(4)), torch.ones(2, 4, 1))
