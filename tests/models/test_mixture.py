"""What a mixture is to the rest: its names, its start, its state, its folder."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from allmend.errors import UserError
from allmend.models.adapters import add_lora
from allmend.models.factors import A, B
from allmend.models.load import linear_layers_of, load_model
from allmend.models.mixture import (
    FACTS,
    PRESENT,
    TENSORS,
    Mixture,
    apply_mixture,
    check_mixture,
    initial,
    load_mixture,
    of_ranks,
    remove_mixture,
    role,
)
from allmend.models.mixture_layers import MixtureConfig, MixtureLinear
from allmend.models.tensors import Tensors

MakeFolder = Callable[..., Path]
MakeModel = Callable[..., LlamaForCausalLM]
CONFIG = MixtureConfig(generalists=1, specialists=2, rank=4, scale=1.5)
MLP = ["down_proj", "gate_proj", "up_proj"]


def mixture_of(model: LlamaForCausalLM, config: MixtureConfig = CONFIG, **changes: Any) -> Mixture:
    return apply_mixture(model, config, **{"seed": 3, "specialist_seed": 4, "digest": "of the base"} | changes)


def noisy(mixture: Mixture, *, seed: int = 1, scale: float = 0.3) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor if name == PRESENT else tensor + scale * torch.randn(tensor.shape, generator=generator)
        for name, tensor in mixture.state().items()
    }


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_new_experts_change_nothing_and_learn(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    before = model(ids).logits
    mixture = mixture_of(model)
    after = mixture.model(ids).logits
    assert torch.equal(before, after)
    after.square().sum().backward()
    learning = {id(parameter) for parameter in model.parameters() if parameter.grad is not None}
    assert learning == {id(parameter) for parameter in mixture.parameters().values()}
    assert mixture.count == 2 * (3 * 32 + 3 * 4 * (3 * 32 + 3 * 48))
    assert list(mixture.parameters()) == sorted(mixture.parameters())
    assert not model.training


def test_names_tell_roles_and_layers(model: LlamaForCausalLM) -> None:
    layers = {name for name in linear_layers_of(model) if ".mlp." in name}
    mixture = mixture_of(model)
    by_role: dict[str, set[str]] = {}
    for name in mixture.state():
        by_role.setdefault(role(name), set()).add(name)
    assert by_role == {
        "generalist": {f"{layer}.generalist_{end}" for layer in layers for end in "AB"},
        "specialist": {f"{layer}.specialist_{end}" for layer in layers for end in "AB"},
        "router": {f"model.layers.{number}.mlp.router" for number in range(2)},
        "present": {PRESENT},
    }
    with pytest.raises(ValueError, match="no tensor of a mixture"):
        role("model.layers.0.mlp.gate_proj.weight")


def test_removing_gives_the_base_back(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    names = {name: type(module) for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = model(ids).logits
    mixture = mixture_of(model)
    mixture.load(noisy(mixture))
    assert not torch.allclose(mixture.model(ids).logits, before)
    assert remove_mixture(mixture) is model
    assert {name: type(module) for name, module in model.named_modules()} == names
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(model(ids).logits, before)
    add_lora(model, rank=4, alpha=4, targets=MLP, seed=1)


def test_one_expert_is_the_lora_of_peft(make_model: MakeModel, ids: torch.Tensor) -> None:
    """From the same seed, forward and backward; s = α / r is a power of two, so that not even rounding differs."""
    lora = add_lora(make_model(), rank=4, alpha=8, targets=MLP, seed=3)
    mixture = mixture_of(make_model(), MixtureConfig(1, 0, rank=4, scale=2.0))
    names = {name: _in_peft(name) for name in mixture.parameters()}
    start = lora.state()
    assert all(torch.equal(tensor, start[names[name]]) for name, tensor in mixture.state().items() if name != PRESENT)
    mixture.load(noisy(mixture))
    lora.load({names[name]: tensor for name, tensor in mixture.state().items() if name != PRESENT})
    logits, expected = mixture.model(ids).logits, lora.model(ids).logits
    assert torch.equal(logits, expected)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in mixture.parameters().items():
        torch.testing.assert_close(parameter.grad, lora.parameters()[names[name]].grad, rtol=1e-5, atol=1e-6)
    assert not any(role(name) == "router" for name in mixture.state())


def _in_peft(name: str) -> str:
    return f"base_model.model.{name.replace('.generalist_A', A).replace('.generalist_B', B)}"


def test_constant_gates_are_one_lora_of_all_the_ranks(make_model: MakeModel, ids: torch.Tensor) -> None:
    config = replace(CONFIG, specialist_rank=2)
    mixture = mixture_of(make_model(), config)
    state = noisy(mixture)
    for name, tensor in state.items():
        if role(name) == "router":
            tensor.zero_()
    mixture.load(state)
    rank = 4 + 2 + 2
    wide = get_peft_model(make_model(), LoraConfig(r=rank, lora_alpha=config.scale * rank, target_modules=MLP)).eval()
    with torch.no_grad():
        for name, module in wide.named_modules():
            if name.rpartition(".")[2] in MLP:
                layer = name.removeprefix("base_model.model.")
                down, up = (
                    torch.cat([state[f"{layer}.generalist_{end}"], state[f"{layer}.specialist_{end}"]], dim=dim)
                    for end, dim in (("A", 0), ("B", 1))
                )
                module.lora_A["default"].weight.copy_(down)
                module.lora_B["default"].weight.copy_(up / 3)
    torch.testing.assert_close(mixture.model(ids).logits, wide(ids).logits, atol=1e-5, rtol=1e-5)


def test_members_share_generalists_and_routers_at_the_start(model: LlamaForCausalLM) -> None:
    mixture = mixture_of(model)
    one, other = (initial(mixture, seed=3, specialist_seed=seed) for seed in (3, 5))
    for name, tensor in one.items():
        if name.endswith("_B"):
            assert not tensor.any()
        else:
            assert torch.equal(tensor, other[name]) == (role(name) != "specialist"), name
        if name.endswith("generalist_A"):  # although the seeds are equal
            assert not torch.equal(tensor, one[name.replace("generalist", "specialist")][:4])
    another = initial(mixture, seed=4, specialist_seed=3)
    for name, tensor in one.items():
        assert torch.equal(tensor, another[name]) == (role(name) in ("specialist", PRESENT) or name.endswith("_B"))


def test_the_start_has_the_distributions_of_the_paper(make_model: MakeModel) -> None:
    mixture = mixture_of(make_model(hidden_size=64), MixtureConfig(4, 4, rank=8))
    for name, tensor in mixture.state().items():
        if name.endswith("_A"):  # kaiming_uniform(a=√5) is uniform on ±1/√in
            bound = tensor.shape[1] ** -0.5
            assert 0.95 * bound < tensor.abs().max() <= bound
            assert tensor.std() == pytest.approx(bound / 3**0.5, rel=0.1)
        elif role(name) == "router":
            assert tensor.std() == pytest.approx(0.02, rel=0.2)
            assert abs(tensor.mean()) < 0.02 / 512**0.5 * 4


def test_an_expert_starts_alike_however_many_there_are(make_model: MakeModel) -> None:
    few = mixture_of(make_model(), MixtureConfig(1, 1, rank=4)).state()
    many = mixture_of(make_model(), MixtureConfig(1, 3, rank=4)).state()
    for name, tensor in few.items():
        if name.endswith("_A"):
            assert torch.equal(many[name][:4], tensor)
        elif role(name) == "router":
            assert torch.equal(many[name][:2], tensor)


def test_the_global_generator_is_left_alone(model: LlamaForCausalLM) -> None:
    before = torch.get_rng_state()
    mixture_of(model)
    assert torch.equal(before, torch.get_rng_state())


def test_zeros_in_the_rest_of_its_room_are_an_expert_of_lower_rank(make_model: MakeModel, ids: torch.Tensor) -> None:
    """The same logits and gradients as in a mixture without that room; and it stays empty in training."""
    ranks = (4, 2, 0)
    wide = mixture_of(make_model())
    wide.load(of_ranks(noisy(wide), wide.config, ranks))
    narrow = mixture_of(make_model(), MixtureConfig(1, 1, rank=4, specialist_rank=2, scale=CONFIG.scale))
    cut = {
        "generalist_A": lambda tensor: tensor,
        "generalist_B": lambda tensor: tensor,
        "specialist_A": lambda tensor: tensor[:2],
        "specialist_B": lambda tensor: tensor[:, :2],
        "router": lambda tensor: tensor[:2],
        PRESENT: lambda tensor: tensor[:2],
    }
    narrow.load({name: cut[name.rpartition(".")[2]](tensor) for name, tensor in wide.state().items()})
    start = wide.state()
    for mixture in (wide, narrow):
        mixture.model(ids).logits.square().sum().backward()
    torch.testing.assert_close(wide.model(ids).logits, narrow.model(ids).logits, atol=1e-6, rtol=1e-6)
    for name, parameter in narrow.parameters().items():
        within = cut[name.rpartition(".")[2]](wide.parameters()[name].grad)
        torch.testing.assert_close(within, parameter.grad, atol=1e-5, rtol=1e-5)
    torch.optim.AdamW(list(wide.parameters().values()), lr=0.1, weight_decay=0.1).step()
    after = wide.state()
    assert same(of_ranks(after, wide.config, ranks), after)
    assert not any(torch.equal(start[name], after[name]) for name in wide.parameters())


def test_a_member_with_fewer_experts_starts_with_zeros_for_the_rest(model: LlamaForCausalLM) -> None:
    mixture = mixture_of(model)
    whole, some = (initial(mixture, seed=3, specialist_seed=4, ranks=ranks) for ranks in (None, (4, 2, 0)))
    assert some[PRESENT].tolist() == [1, 1, 0]
    for name, tensor in some.items():
        kept = {"generalist": 4, "specialist": 2, "router": 2, PRESENT: 2}[role(name)]
        if not name.endswith("_B"):
            assert torch.equal(tensor[:kept], whole[name][:kept])
            assert not tensor[kept:].any()
    with pytest.raises(ValueError, match=r"ranks \[4, 5, 0\] for experts of at most \[4, 4, 4\]"):
        initial(mixture, seed=3, specialist_seed=4, ranks=(4, 5, 0))


def test_state_and_load_carry_which_experts_are_present(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    mixture = mixture_of(model)
    rich = noisy(mixture)
    poor = of_ranks(noisy(mixture, seed=2), CONFIG, (4, 1, 0))
    mixture.load(rich)
    logits = mixture.model(ids).logits
    mixture.load(poor)
    assert same(mixture.state(), poor)
    assert not torch.allclose(mixture.model(ids).logits, logits)
    mixture.load(rich)
    assert torch.equal(mixture.model(ids).logits, logits)
    for wrong in ([0.0, 0, 0], [1.0, 0.5, 0], [1.0, float("nan"), 0]):
        with pytest.raises(UserError, match="present is"):
            mixture.load(poor | {PRESENT: torch.tensor(wrong)})
    with pytest.raises(UserError, match="present is missing"):
        mixture.load({name: tensor for name, tensor in poor.items() if name != PRESENT})
    assert same(mixture.state(), rich)


@pytest.mark.parametrize("form", ["linear", "block"])
def test_a_saved_mixture_is_the_same_when_loaded(
    make_folder: MakeFolder, tmp_path: Path, ids: torch.Tensor, form: Any
) -> None:
    base = load_model(str(make_folder()))
    config = replace(CONFIG, specialist_rank=2, form=form, targets=["down_proj", "up_proj"])
    mixture = mixture_of(base.model, config, digest=base.digest)
    state = of_ranks(noisy(mixture), config, (4, 1, 0))
    mixture.load(state)
    logits = mixture.model(ids).logits
    mixture.save(tmp_path / "mixture", state, base=base.source)
    assert {path.name for path in (tmp_path / "mixture").iterdir()} == {FACTS, TENSORS}
    facts = json.loads((tmp_path / "mixture" / FACTS).read_text())
    assert [(one["role"], one["rank"], one["present"]) for one in facts["experts"]] == [
        ("generalist", 4, True),
        ("specialist", 2, True),
        ("specialist", 2, False),
    ]
    again = load_mixture(load_model(str(tmp_path / "model")), tmp_path / "mixture")
    assert same(again.state(), state)
    assert again.config == config
    assert torch.equal(again.model(ids).logits, logits)


@pytest.mark.parametrize("counts", [(1, 0), (0, 1), (2, 2)])
def test_any_mixture_comes_back(make_folder: MakeFolder, tmp_path: Path, counts: tuple[int, int]) -> None:
    base = load_model(str(make_folder()))
    mixture = mixture_of(base.model, MixtureConfig(*counts, rank=3), digest=base.digest)
    state = noisy(mixture)
    mixture.save(tmp_path / "mixture", state, base=base.source)
    remove_mixture(mixture)
    again = load_mixture(base, tmp_path / "mixture")
    assert same(again.state(), state)
    assert (again.config.ranks, again.config.generalists) == (mixture.config.ranks, counts[0])


def test_a_foreign_base_is_refused_and_left_alone(
    make_folder: MakeFolder, make_model: MakeModel, tmp_path: Path, ids: torch.Tensor
) -> None:
    base = load_model(str(make_folder()))
    mixture = mixture_of(base.model, digest=base.digest)
    mixture.save(tmp_path / "mixture", mixture.state(), base="the base")
    make_model(seed=1).save_pretrained(tmp_path / "model")
    other = load_model(str(tmp_path / "model"))
    logits = other.model(ids).logits
    with pytest.raises(UserError, match=f"another base: the base with the digest {base.digest[:12]}") as caught:
        load_mixture(other, tmp_path / "mixture")
    assert other.digest[:12] in str(caught.value)
    assert torch.equal(other.model(ids).logits, logits)


def test_a_folder_that_holds_no_whole_mixture_is_refused(make_folder: MakeFolder, tmp_path: Path) -> None:
    base = load_model(str(make_folder()))
    mixture = mixture_of(base.model, digest=base.digest)
    folder = tmp_path / "mixture"
    mixture.save(folder, mixture.state(), base="the base")
    remove_mixture(mixture)
    facts = (folder / FACTS).read_text()
    with pytest.raises(UserError, match="no mixture is here"):
        load_mixture(base, tmp_path)
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "does not describe a mixture"),
        (facts.replace('"scale"', '"size"'), "does not describe a mixture.*scale"),
        (facts.replace('"rank": 4', '"rank": 3'), r"does not fit.*shape \[4, 48\] instead of \[3, 48\]"),
        (facts.replace('"linear"', '"cubic"'), "form 'cubic'"),
    ):
        (folder / FACTS).write_text(text)
        with pytest.raises(UserError, match=message):
            load_mixture(base, folder)
        assert not any(isinstance(module, MixtureLinear) for module in base.model.modules())
    (folder / FACTS).write_text(facts)
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        load_mixture(base, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generalists": 0, "specialists": 0}, "0 generalists and 0 specialists are no mixture"),
        ({"rank": 0}, "rank 0 is not positive"),
        ({"specialist_rank": -1}, "rank -1 is not positive"),
        ({"rank": 33}, "rank 33 is larger than the smaller dimension"),
        ({"targets": ["q_proj"]}, r"'q_proj' is no layer of an MLP.*down_proj, gate_proj, up_proj"),
        ({"targets": ["upproj"]}, "'upproj' matches no linear layer; did you mean up_proj"),
        ({"targets": []}, "no targets are given"),
        ({"form": "cubic"}, "form 'cubic' is none of linear, block"),
    ],
)
def test_a_mixture_that_does_not_fit_is_refused(model: LlamaForCausalLM, changes: dict[str, Any], message: str) -> None:
    modules = dict(model.named_modules())
    with pytest.raises(UserError, match=message):
        mixture_of(model, replace(CONFIG, **changes))
    assert dict(model.named_modules()) == modules


def test_models_without_plain_mlps_are_refused(model: LlamaForCausalLM) -> None:
    facts = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    sparse = MixtralForCausalLM(MixtralConfig(**facts, **heads, num_local_experts=2))
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))
    for other in (sparse, gpt):
        with pytest.raises(UserError, match="MLP"):
            mixture_of(other)
    assert check_mixture({"layers.0.mlp.expert.fc": (8, 8), "layers.0.mlp.gate": (8, 8)}, CONFIG)
    mixture_of(model)
    with pytest.raises(UserError, match="has experts already"):
        mixture_of(model)


def test_targets_name_the_layers_that_get_experts(model: LlamaForCausalLM) -> None:
    mixture = mixture_of(model, replace(CONFIG, targets=["model.layers.1.mlp.down_proj"]))
    names = {name.rpartition(".")[0] for name in mixture.parameters()}
    assert names == {"model.layers.1.mlp.down_proj", "model.layers.1.mlp"}
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)
