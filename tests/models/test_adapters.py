import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from allmend.errors import UserError
from allmend.models.adapters import Trainable, add_lora, full, learning_adapter, remove_lora
from allmend.models.load import linear_layers_of, load_model

MakeFolder = Callable[..., Path]
MakeModel = Callable[..., LlamaForCausalLM]
TARGETS = ["q_proj", "v_proj"]


def lora(model: torch.nn.Module, **changes: object) -> Trainable:
    settings = {"rank": 4, "alpha": 8.0, "targets": TARGETS, "seed": 3} | changes
    return add_lora(model, **settings)  # type: ignore[arg-type]


def noisy(trainable: Trainable, *, scale: float = 0.3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: tensor + scale * torch.randn(tensor.shape, generator=generator)
        for name, tensor in trainable.state().items()
    }


def test_a_new_adapter_changes_nothing_and_learns(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    before = model(ids).logits
    trainable = lora(model)
    after = trainable.model(ids).logits
    assert torch.equal(before, after)
    after.sum().backward()
    learning = {name for name, parameter in trainable.model.named_parameters() if parameter.grad is not None}
    assert len(learning) == len(trainable.parameters()) == 2 * 2 * 2
    assert trainable.count == 2 * (4 * 32 + 32 * 4 + 4 * 32 + 16 * 4)
    assert list(trainable.parameters()) == sorted(trainable.parameters())
    assert not trainable.model.training


def test_names_are_those_of_the_saved_file(model: LlamaForCausalLM, tmp_path: Path) -> None:
    trainable = lora(model)
    trainable.model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == set(trainable.parameters())


def test_the_same_seed_gives_the_same_adapter(model: LlamaForCausalLM) -> None:
    first = lora(model)
    state = first.state()
    torch.manual_seed(99)
    torch.randn(17)
    again = lora(remove_lora(first))
    assert all(torch.equal(state[name], tensor) for name, tensor in again.state().items())
    other = lora(remove_lora(again), seed=4)
    assert all(torch.equal(state[name], tensor) == ("lora_B" in name) for name, tensor in other.state().items())


def test_the_global_generator_is_left_alone(model: LlamaForCausalLM) -> None:
    before = torch.get_rng_state()
    lora(model, dropout=0.1)
    assert torch.equal(before, torch.get_rng_state())


def test_initial_values_have_the_distribution_of_peft(model: LlamaForCausalLM) -> None:
    trainable = lora(model, rank=16, targets="all-linear")
    for name, tensor in trainable.state().items():
        if "lora_B" in name:
            assert not tensor.any()
        else:  # kaiming_uniform(a=√5) is uniform on ±1/√in
            bound = tensor.shape[1] ** -0.5
            assert 0.8 * bound < tensor.abs().max() <= bound


def test_all_linear_is_every_layer_but_the_output(make_model: MakeModel) -> None:
    for tied in (True, False):
        model = make_model(tied=tied)
        layers = set(linear_layers_of(model))
        trainable = lora(model, targets="all-linear")
        assert {name.split(".lora_")[0].removeprefix("base_model.model.") for name in trainable.parameters()} == layers


def test_state_is_a_copy_and_load_brings_it_back(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    trainable = lora(model)
    start = trainable.state()
    trainable.load(noisy(trainable))
    changed = trainable.model(ids).logits
    assert not any(torch.equal(start[name], tensor) for name, tensor in trainable.state().items())
    trainable.load(start)
    assert all(torch.equal(start[name], tensor) for name, tensor in trainable.state().items())
    assert not torch.allclose(trainable.model(ids).logits, changed)


def test_load_names_the_first_difference_and_changes_nothing(model: LlamaForCausalLM) -> None:
    trainable = lora(model)
    start = trainable.state()
    first, last = min(start), max(name for name in start if "lora_A" in name)
    with pytest.raises(UserError, match=f"{first} is missing"):
        trainable.load({name: tensor for name, tensor in noisy(trainable).items() if name != first})
    with pytest.raises(UserError, match="zzz is no parameter"):
        trainable.load(noisy(trainable) | {"zzz": torch.zeros(1)})
    with pytest.raises(UserError, match=rf"{last} has shape \[7\] instead of \[4, 32\]"):
        trainable.load(noisy(trainable) | {last: torch.zeros(7)})
    assert all(torch.equal(start[name], tensor) for name, tensor in trainable.state().items())


def test_remove_gives_the_base_back(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    names = {name: type(module) for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = model(ids).logits
    trainable = lora(model, targets="all-linear")
    trainable.load(noisy(trainable))
    base = remove_lora(trainable)
    assert base is model
    assert {name: type(module) for name, module in base.named_modules()} == names
    assert all(torch.equal(weights[name], tensor) for name, tensor in base.state_dict().items())
    assert torch.equal(base(ids).logits, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns when it finds remains of another adapter
        lora(base)


def test_full_cannot_be_removed(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="no LoRA"):
        remove_lora(full(model))


@pytest.mark.parametrize("targets", [TARGETS, "all-linear"])
def test_a_saved_adapter_loads_and_merges_in_peft(
    make_folder: MakeFolder, tmp_path: Path, ids: torch.Tensor, targets: list[str] | str
) -> None:
    folder = make_folder()
    trainable = lora(load_model(str(folder), device="cpu").model, targets=targets)
    tensors = noisy(trainable)
    out = tmp_path / "adapter"
    trainable.save(out, tensors, base=str(folder))
    trainable.load(tensors)
    expected = trainable.model(ids).logits

    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    assert config["target_modules"] == sorted(config["target_modules"])
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), out).eval()
    assert torch.equal(reloaded(ids).logits, expected)
    merged = reloaded.merge_and_unload()
    assert torch.allclose(merged(ids).logits, expected, atol=1e-5)


def test_saving_writes_the_given_tensors_and_replaces_a_folder(model: LlamaForCausalLM, tmp_path: Path) -> None:
    trainable = lora(model)
    out = tmp_path / "adapter"
    out.mkdir()
    (out / "old").touch()
    tensors = noisy(trainable)
    trainable.save(out, tensors, base="owner/name")
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    saved = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_refused_save_leaves_the_old_folder(model: LlamaForCausalLM, tmp_path: Path) -> None:
    trainable = lora(model)
    out = tmp_path / "adapter"
    trainable.save(out, trainable.state(), base="owner/name")
    with pytest.raises(UserError, match="is missing"):
        trainable.save(out, {}, base="owner/name")
    assert (out / "adapter_model.safetensors").exists()


def test_a_bfloat16_model_learns_in_float32(model: LlamaForCausalLM) -> None:
    trainable = lora(model.to(torch.bfloat16))
    assert {tensor.dtype for tensor in trainable.state().values()} == {torch.float32}


def test_peft_itself_computes_the_same(make_model: MakeModel, ids: torch.Tensor) -> None:
    trainable = lora(make_model())
    tensors = noisy(trainable)
    trainable.load(tensors)
    plain = get_peft_model(
        make_model(), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=TARGETS)
    ).eval()
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(tensors[name.replace(".default", "")])
    assert torch.equal(plain(ids).logits, trainable.model(ids).logits)


def test_lora_on_transposed_layers(ids: torch.Tensor) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=260, n_positions=8)).eval()
    before = model(ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainable = lora(model, targets=["c_attn"])
    assert torch.equal(trainable.model(ids).logits, before)


def factors(trainable: Trainable, side: str) -> dict[str, torch.Tensor]:
    """LoRA's factors A or B as they are in the model, by the names of the saved file."""
    return {
        name.replace(".default.", "."): parameter.detach().clone()
        for name, parameter in trainable.model.named_parameters()
        if f".lora_{side}." in name
    }


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_b_alone_learns_beside_the_start_of_both(make_model: MakeModel, ids: torch.Tensor) -> None:
    both, alone = lora(make_model()), lora(make_model(), learns="b")
    assert same(factors(alone, "A"), factors(both, "A"))
    assert alone.state().keys() == alone.parameters().keys() == factors(both, "B").keys()
    assert alone.count == 2 * (32 * 4 + 16 * 4)
    start = factors(alone, "A")
    alone.load(noisy(alone))
    loss = alone.model(ids).logits.sum()
    loss.backward()
    learning = {name for name, parameter in alone.model.named_parameters() if parameter.grad is not None}
    assert {name.replace(".default.", ".") for name in learning} == alone.parameters().keys()
    assert same(factors(alone, "A"), start)
    with pytest.raises(UserError, match=r"lora_A.weight is no parameter"):
        alone.load(both.state())
    assert not any(parameter.requires_grad for parameter in remove_lora(alone).parameters())


def test_with_b_alone_the_mean_of_factors_is_the_mean_of_what_layers_do(model: LlamaForCausalLM) -> None:
    trainable = lora(model, learns="b")
    one, other = noisy(trainable), {name: tensor.flip(0) for name, tensor in noisy(trainable).items()}
    mean = {name: (tensor + other[name]) / 2 for name, tensor in one.items()}
    layer: torch.nn.Module = trainable.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    x, outputs = torch.randn(5, 32, generator=torch.Generator().manual_seed(2)), []
    for tensors in (one, other, mean):
        trainable.load(tensors)
        outputs.append(layer(x).detach())
    torch.testing.assert_close(outputs[2], (outputs[0] + outputs[1]) / 2)


def test_an_adapter_whose_b_alone_learnt_is_an_ordinary_one(
    make_folder: MakeFolder, tmp_path: Path, ids: torch.Tensor
) -> None:
    folder, out = make_folder(), tmp_path / "adapter"
    trainable = lora(load_model(str(folder), device="cpu").model, learns="b")
    start, tensors = factors(trainable, "A"), noisy(trainable)
    trainable.save(out, tensors, base=str(folder))
    assert same(load_file(out / "adapter_model.safetensors"), tensors | start)
    trainable.load(tensors)
    expected = trainable.model(ids).logits
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unexpected keyword")  # PEFT on keys that it does not know
        reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), out).eval()
    assert torch.equal(reloaded(ids).logits, expected)

    # it says so itself, and what PEFT writes does not
    with learning_adapter(remove_lora(trainable), out) as again:
        assert same(again.state(), tensors)
        assert same(factors(again, "A"), start)
        assert torch.equal(again.model(ids).logits, expected)
        again.save(tmp_path / "again", again.state(), base=str(folder))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (out / file).read_bytes()
    reloaded.save_pretrained(tmp_path / "peft")
    with learning_adapter(load_model(str(folder), device="cpu").model, tmp_path / "peft") as again:
        assert again.state().keys() == (tensors | start).keys()
        assert all(parameter.requires_grad for parameter in again.parameters().values())


def test_equal_adapters_are_equal_bytes(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Safetensors by itself writes several metadata in an order of chance."""
    trainable, found = lora(model, learns="b"), set()
    for place in range(12):
        trainable.save(tmp_path / f"{place}", trainable.state(), base="owner/name")
        found.add((tmp_path / f"{place}" / "adapter_model.safetensors").read_bytes())
    (data,) = found
    assert (8 + int.from_bytes(data[:8], "little")) % 8 == 0  # tensors begin where they are aligned


def test_what_does_not_learn_has_a_digest(make_model: MakeModel) -> None:
    digests = [lora(make_model(), **more).frozen_digest for more in ({}, {"learns": "b"}, {"learns": "b", "seed": 4})]
    assert digests[0] == ""
    assert len({*digests}) == 3
    again = lora(make_model(), learns="b")
    again.load(noisy(again))
    assert again.frozen_digest == digests[1]


@pytest.mark.parametrize("tied", [True, False])
def test_full_is_every_parameter_once(make_folder: MakeFolder, tmp_path: Path, ids: torch.Tensor, tied: bool) -> None:
    folder = make_folder(tied=tied)
    base = load_model(str(folder), device="cpu").model
    trainable = full(remove_lora(lora(base)))
    assert all(parameter.requires_grad for parameter in trainable.parameters().values())
    assert ("lm_head.weight" in trainable.parameters()) == (not tied)
    assert trainable.count == base.num_parameters()
    start = trainable.state()
    tensors = noisy(trainable, scale=0.02)
    out = tmp_path / "tuned"
    trainable.save(out, tensors, base=str(folder))
    assert all(torch.equal(start[name], tensor) for name, tensor in trainable.state().items())

    trainable.load(tensors)
    tuned = load_model(str(out), device="cpu")
    assert torch.equal(tuned.model(ids).logits, trainable.model(ids).logits)
    shared = tuned.model.get_input_embeddings().weight is tuned.model.get_output_embeddings().weight
    assert shared == tied


def test_add_refuses_what_check_refuses(model: LlamaForCausalLM) -> None:
    with pytest.raises(UserError, match="did you mean"):
        lora(model, targets=["q_prj"])
    with pytest.raises(UserError, match="rank 17"):
        lora(model, rank=17)


def test_an_adapter_for_a_wider_model_is_refused_with_its_first_weight_alone(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder, out = make_folder(), tmp_path / "adapter"
    trainable = lora(load_model(str(folder), device="cpu").model)
    trainable.save(out, noisy(trainable), base=str(folder))
    path = out / "adapter_model.safetensors"
    found = load_file(path)
    wider = {name: torch.cat((one, one), dim=0 if "lora_B" in name else 1) for name, one in found.items()}
    save_file(wider, path, metadata={"format": "pt"})
    words = rf"size mismatch for .* \({len(wider) - 1} more\)"
    with pytest.raises(UserError, match=words) as refused, learning_adapter(remove_lora(trainable), out):
        pass
    assert refused.value.what.count("size mismatch") == 1
    assert "\n" not in refused.value.what
