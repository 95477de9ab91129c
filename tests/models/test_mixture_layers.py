"""The layers against loops over experts, LoRA merged by hand, and each other."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from allmend.data.chat import Encoded
from allmend.data.packing import pack
from allmend.learn.objective import log_likelihood
from allmend.models.mixture import PRESENT, Mixture, apply_mixture, role
from allmend.models.mixture_layers import MixtureConfig, MixtureLinear, routing, watched_gates
from allmend.models.tensors import Tensors

MakeModel = Callable[..., LlamaForCausalLM]
CONFIG = MixtureConfig(generalists=2, specialists=2, rank=3, scale=1.5)
FAMILIES = {
    "mistral": (MistralForCausalLM, MistralConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    "phi3": (Phi3ForCausalLM, Phi3Config),
    "phi": (PhiForCausalLM, PhiConfig),
}


def family(name: str, make_model: MakeModel) -> PreTrainedModel:
    if name == "llama":
        return make_model()
    model, config = FAMILIES[name]
    facts: dict[str, Any] = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 256,
        "attn_implementation": "sdpa",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(config(**facts)).eval()


def mixed(model: PreTrainedModel, config: MixtureConfig = CONFIG, *, seed: int = 1, **tensors: Any) -> Mixture:
    """With experts and routers that do something."""
    mixture = apply_mixture(model, config, seed=3, specialist_seed=4, digest="of the base")
    mixture.load(noisy(mixture, seed=seed) | tensors)
    return mixture


def noisy(mixture: Mixture, *, seed: int = 1, scale: float = 0.3) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor if name == PRESENT else tensor + scale * torch.randn(tensor.shape, generator=generator)
        for name, tensor in mixture.state().items()
    }


def merged(layer: MixtureLinear, weights: torch.Tensor) -> torch.Tensor:
    """W + s Σ_e w_e B_e A_e in double precision, expert by expert; weights [E]."""
    found = layer.base.weight.double().clone()
    for expert, (A, B) in enumerate(experts(layer)):
        found += layer.scale * weights[expert].double() * (B.double() @ A.double())
    return found


def experts(layer: MixtureLinear) -> list[tuple[torch.Tensor, torch.Tensor]]:
    A = [one for own in ("generalist_A", "specialist_A") if (one := getattr(layer, own, None)) is not None]
    B = [one for own in ("generalist_B", "specialist_B") if (one := getattr(layer, own, None)) is not None]
    return list(zip(torch.cat(A).split(layer.ranks), torch.cat(B, dim=1).split(layer.ranks, dim=1), strict=True))


@given(
    generalists=st.integers(0, 3),
    specialists=st.integers(0, 3),
    rank=st.integers(1, 4),
    specialist_rank=st.sampled_from([None, 1, 2, 5]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_stacked_experts_are_a_loop_over_experts(
    generalists: int, specialists: int, rank: int, specialist_rank: int | None, bias: bool, seed: int
) -> None:
    if not generalists + specialists:
        return
    generator = torch.Generator().manual_seed(seed)
    base = nn.Linear(7, 9, bias=bias, dtype=torch.float64).requires_grad_(False)
    layer = MixtureLinear(base, MixtureConfig(generalists, specialists, rank, specialist_rank, scale=0.7))
    for own, parameter in layer.named_parameters():
        if not own.startswith("base"):
            nn.init.normal_(parameter, generator=generator)
    draw = {"generator": generator, "dtype": torch.float64}
    x = torch.randn(2, 5, 7, **draw).requires_grad_(True)
    gates = torch.randn(2, 5, generalists + specialists, **draw).softmax(-1).requires_grad_(True)
    upstream = torch.randn(2, 5, 9, **draw)
    leaves = [x, gates, *(one for own, one in layer.named_parameters() if not own.startswith("base"))]
    found = layer(x, gates)
    expected = base(x)
    for expert, (A, B) in enumerate(experts(layer)):
        expected = expected + 0.7 * gates[..., expert : expert + 1] * (x @ A.T @ B.T)
    torch.testing.assert_close(found, expected)
    of_found = torch.autograd.grad(found, leaves, upstream)
    for one, other in zip(of_found, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(one, other)


def test_several_experts_without_gates_are_refused() -> None:
    with pytest.raises(ValueError, match="2 experts need gates"):
        MixtureLinear(nn.Linear(4, 4), MixtureConfig(rank=2))(torch.zeros(1, 4))


def test_an_mlp_reads_each_token_through_its_own_weights(make_model: MakeModel) -> None:
    model = make_model()
    mixture = mixed(model)
    mlp = model.model.layers[1].mlp
    u = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    R = mixture.state()["model.layers.1.mlp.router"].double()
    for token, y in zip(u, mlp(u), strict=True):
        logits = [sum(R[e, k] * token[k].double() for k in range(32)) for e in range(4)]
        shares = torch.tensor([math.exp(one) for one in logits])
        gates = shares / shares.sum()
        gate, up, down = (merged(mlp.linears[name], gates) for name in ("gate_proj", "up_proj", "down_proj"))
        expected = down @ (nn.functional.silu(gate @ token.double()) * (up @ token.double()))
        torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["linear", "block"])
@pytest.mark.parametrize("name", ["llama", *FAMILIES])
def test_a_one_hot_gate_is_that_expert_merged(make_model: MakeModel, ids: torch.Tensor, name: str, form: Any) -> None:
    mixture = mixed(family(name, make_model), replace(CONFIG, form=form), present=torch.tensor([0.0, 0, 1, 0]))
    plain = family(name, make_model)
    for place, mlp in mixture.model.named_modules():
        for own, layer in getattr(mlp, "linears", {}).items():
            with torch.no_grad():
                plain.get_submodule(f"{place}.{own}").weight.copy_(merged(layer, torch.tensor([0.0, 0, 1, 0])))
    found = mixture.model(ids).logits
    torch.testing.assert_close(found, plain(ids).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, family(name, make_model)(ids).logits, atol=1e-2)


@pytest.mark.parametrize("form", ["linear", "block"])
def test_an_absent_expert_has_no_gate_and_no_gradient(make_model: MakeModel, ids: torch.Tensor, form: Any) -> None:
    there = torch.tensor([1.0, 0, 1, 0])
    mixture = mixed(make_model(), replace(CONFIG, form=form), present=there)
    gates = routing(mixture.model, {"input_ids": ids})
    assert not gates[..., [1, 3]].any()
    torch.testing.assert_close(gates.sum(-1), torch.ones(2, 12))
    found = mixture.model(ids).logits
    found.square().sum().backward()
    for name, parameter in mixture.parameters().items():
        if role(name) == "router":
            absent, present = parameter.grad[[1, 3]], parameter.grad[[0, 2]]
        else:  # two experts of a role, one below or beside the other
            present, absent = parameter.grad.chunk(2, dim=int(name.endswith("_B")))
        assert not absent.any(), name
        assert present.any(), name
    # nothing depends on what stands in an absent expert's place
    other = noisy(mixture, seed=2) | {PRESENT: there}
    here = mixture.state()
    for name, tensor in other.items():
        if role(name) == "router":
            tensor[[0, 2]] = here[name][[0, 2]]
        elif name.endswith("_A"):
            tensor[:3] = here[name][:3]
        elif name.endswith("_B"):
            tensor[:, :3] = here[name][:, :3]
    mixture.load(other)
    assert torch.equal(mixture.model(ids).logits, found)


def test_a_member_with_one_of_several_experts_has_its_gate_at_1(make_model: MakeModel, ids: torch.Tensor) -> None:
    mixture = mixed(make_model(), present=torch.tensor([0.0, 1, 0, 0]))
    assert torch.equal(routing(mixture.model, {"input_ids": ids}), torch.tensor([0.0, 1, 0, 0]).expand(2, 12, 4))
    mixture.model(ids).logits.square().sum().backward()
    assert not any(one.grad.any() for name, one in mixture.parameters().items() if role(name) == "router")


@pytest.mark.parametrize("form", ["linear", "block"])
def test_routers_have_no_gradient_while_experts_are_equal(make_model: MakeModel, ids: torch.Tensor, form: Any) -> None:
    config = MixtureConfig(rank=3, form=form)
    mixture = apply_mixture(make_model(), config, seed=3, specialist_seed=4, digest="")

    def largest(tensors: Tensors) -> tuple[float, float]:
        mixture.load(tensors)
        loss = mixture.model(ids).logits.square().sum()
        parameters = mixture.parameters()
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        of_routers = max(float(one.abs().max()) for name, one in gradients.items() if role(name) == "router")
        return of_routers, max(float(one.abs().max()) for one in gradients.values())

    of_routers, of_all = largest(mixture.state())
    assert of_all > 0
    if form == "linear":
        assert of_routers == 0
    different = noisy(mixture)
    equal = {name: different[name.replace("specialist", "generalist")] for name in different}
    # g_e (c − Σ_f g_f c) with one c for all experts
    assert of_routers < 1e-6 * of_all
    assert largest(equal)[0] < 1e-6 * largest(equal)[1]
    assert largest(different)[0] > 1e-2 * largest(different)[1]


def test_linear_and_block_differ_by_the_square_of_the_experts(make_model: MakeModel) -> None:
    linear, block = (
        mixed(make_model().double(), replace(CONFIG, form=form)).model.model.layers[0].mlp
        for form in ("linear", "block")
    )
    u = torch.randn(64, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    differences = []
    for _ in range(10):
        differences.append((linear(u) - block(u)).norm().item())
        with torch.no_grad():
            for mlp in (linear, block):
                for name, parameter in mlp.named_parameters():
                    if name.endswith("_B"):
                        parameter.mul_(0.5)
    for larger, smaller in pairwise(differences[6:]):
        assert 3.8 < larger / smaller < 4.2


@pytest.mark.parametrize("name", ["llama", *FAMILIES])
def test_generation_with_a_cache_is_generation_without(make_model: MakeModel, ids: torch.Tensor, name: str) -> None:
    model = mixed(family(name, make_model)).model
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, whole = (model.generate(ids, use_cache=use, **settings) for use in (True, False))
    assert cached.shape == (2, 18)
    assert torch.equal(cached, whole)


def test_a_left_padded_batch_is_its_texts_one_by_one(make_model: MakeModel, ids: torch.Tensor) -> None:
    model = mixed(make_model()).model
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    together = model(**batch).logits
    torch.testing.assert_close(together[0], model(ids[:1]).logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[1, 3:], model(ids[1:, 3:]).logits[0], atol=1e-5, rtol=1e-5)
    gates = routing(model, batch)
    assert gates.shape == (2, 9, 4)
    alone = [routing(model, {"input_ids": one}) for one in (ids[:1], ids[1:, 3:])]
    torch.testing.assert_close(gates, torch.cat(alone, dim=1), atol=1e-6, rtol=1e-5)


def test_a_packed_row_is_its_records_one_by_one(make_model: MakeModel, ids: torch.Tensor) -> None:
    model = mixed(make_model()).model
    every, trunk = torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.int64)
    records = [Encoded("", one, every, trunk, torch.arange(6)) for one in ids]
    (row,) = pack(records, 64)
    with watched_gates(model) as gates:
        found = log_likelihood(model, row)
    assert [one.shape for one in gates] == [(1, 12, 4)] * 2
    for index, one in enumerate(ids):
        logits = model(one[None]).logits[0, :-1].log_softmax(-1)
        torch.testing.assert_close(found[row.owner == index], logits[range(5), one[1:]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["linear", "block"])
def test_checkpointing_changes_no_gradient(make_model: MakeModel, ids: torch.Tensor, form: Any) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        mixture = mixed(make_model(), replace(CONFIG, form=form))
        if checkpointing:
            mixture.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        mixture.model.train()
        mixture.model(ids, use_cache=False).logits.square().sum().backward()
        assert all(layer.weights is None for layer in mixture.model.modules() if isinstance(layer, MixtureLinear))
        return [one.grad for one in mixture.parameters().values()]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(one, other)
        assert one.any()


@pytest.mark.parametrize("form", ["linear", "block"])
def test_experts_of_a_bfloat16_model_are_float32(make_model: MakeModel, ids: torch.Tensor, form: Any) -> None:
    config = replace(CONFIG, form=form)
    exact = mixed(make_model(), config)
    half = mixed(make_model().bfloat16(), config)
    assert {tensor.dtype for tensor in half.state().values()} == {torch.float32}
    assert all(torch.equal(tensor, half.state()[name]) for name, tensor in exact.state().items())
    logits = half.model(ids).logits
    assert logits.dtype == torch.bfloat16
    reference = exact.model(ids).logits
    assert (logits - reference).norm() < 0.03 * reference.norm()
    logits.float().square().sum().backward()
    assert all(one.grad.dtype == torch.float32 and one.grad.any() for one in half.parameters().values())


def test_a_copy_of_the_model_shares_nothing_and_keeps_its_parts_together(
    make_model: MakeModel, ids: torch.Tensor
) -> None:
    mixture = mixed(make_model())
    logits = mixture.model(ids).logits
    copied = copy.deepcopy(mixture)
    copied.load(noisy(copied, seed=9) | {PRESENT: torch.tensor([1.0, 0, 0, 0])})
    assert torch.equal(mixture.model(ids).logits, logits)
    assert not torch.allclose(copied.model(ids).logits, logits)
    assert not routing(copied.model, {"input_ids": ids})[..., 1:].any()
