"""Folders: that transformers loads them without any of ours, and that nothing is lost when one cannot be written."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from allmend.compress.folder import loads_elsewhere, save_folder
from allmend.compress.layers import Option, compress_weight
from allmend.compress.masks import NofM, Unstructured
from allmend.compress.runtime import PackedLinear, load_compressed
from allmend.compress.whole import packed_of
from allmend.errors import UserError
from allmend.models.formats import format_named
from allmend.models.load import linear_layers, linear_layers_of, load_model

FORMATS = ["int8", "int6", "int4", "int3", "int4_affine", "fp8", "mxfp8", "mxfp6", "mxfp4", "nvfp4"]


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    for parameter in made.parameters():
        parameter.data = (3 * parameter.data).bfloat16().float()
    return made


Saved = Callable[[dict[str, Option]], tuple[Path, LlamaForCausalLM]]


@pytest.fixture
def saved(model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Saved:
    def save(plan: dict[str, Option]) -> tuple[Path, LlamaForCausalLM]:
        weights = {name: model.get_submodule(name).weight.data for name in plan}
        found = {name: compress_weight(weight, plan[name]) for name, weight in weights.items()}
        packed = {name: packed_of(one, plan[name]) for name, one in found.items()}
        size = save_folder(tmp_path / "out", model, tiny_tokenizer, packed, plan)
        (path,) = (tmp_path / "out").glob("*.safetensors")
        assert size == path.stat().st_size
        simulated = copy.deepcopy(model)
        for name, one in found.items():
            simulated.get_submodule(name).weight.data = one.weight
        return tmp_path / "out", simulated

    return save


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(18).view(2, 9)).logits.float()
    return found


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", FORMATS)
def test_transformers_loads_what_was_simulated(name: str, model: LlamaForCausalLM, saved: Saved) -> None:
    folder, simulated = saved(dict.fromkeys(linear_layers_of(model), Option(format_named(name))))
    # elements under a power of two, and zero points, are taken apart in bfloat16 by compressed-tensors
    small = name.startswith(("mx", "nv"))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if small else torch.float32)
    assert worst(logits(loaded), logits(simulated)) < (0.06 if small else 0.02 if name == "int4_affine" else 1e-3)
    assert worst(logits(simulated), logits(model)) > 0.01


def test_layers_of_several_formats_and_of_none(model: LlamaForCausalLM, saved: Saved) -> None:
    layers = list(linear_layers_of(model))
    some = [
        Option(format_named("int4")),
        Option(format_named("int8")),
        Option(format_named("int4", group=32)),
        Option(None),
    ]
    folder, simulated = saved({layer: some[place % 4] for place, layer in enumerate(layers[1:])})
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert worst(logits(loaded), logits(simulated)) < 1e-3
    assert (
        "model.layers.0.self_attn.q_proj"
        in json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    )


def test_it_loads_where_there_is_no_allmend(model: LlamaForCausalLM, saved: Saved, tmp_path: Path) -> None:
    folder, simulated = saved(dict.fromkeys(linear_layers_of(model), Option(format_named("int4"))))
    code = f"""
import sys, torch
sys.modules["allmend"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained({str(folder)!r})
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype=torch.float32)
torch.save(model(torch.arange(18).view(2, 9)).logits.detach(), {str(tmp_path / "found.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert worst(torch.load(tmp_path / "found.pt"), logits(simulated)) < 1e-3


def test_the_file_is_as_large_as_its_parts_and_tied_weights_are_there_once(
    model: LlamaForCausalLM, saved: Saved
) -> None:
    folder, _ = saved(dict.fromkeys(linear_layers_of(model), Option(format_named("int4"))))
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert "lm_head.weight" not in names
        assert file.get_tensor("model.embed_tokens.weight").dtype == torch.bfloat16
        assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16
    linear = sum(module.weight.numel() for name, module in model.named_modules() if name in linear_layers_of(model))
    rest = sum(p.numel() for p in model.parameters()) - linear
    size = (folder / "model.safetensors").stat().st_size
    assert 4.25 * linear / 8 + 2 * rest < size < 4.25 * linear / 8 + 2 * rest + 8000  # the head names every tensor
    config = json.loads((folder / "config.json").read_text())
    assert "sparsity_config" not in config["quantization_config"]
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_what_cannot_be_written_leaves_the_old_folder(
    model: LlamaForCausalLM, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats = dict.fromkeys(linear_layers_of(model), Option(format_named("int4")))
    folder, _ = saved(formats)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("allmend.compress.folder.save_file", full)
    with pytest.raises(UserError, match="no space left"):
        saved(formats)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in folder.parent.iterdir() if not path.name.startswith(".")) == ["out"]


OWN = [
    Option(format_named("hbfp6")),
    Option(format_named("int4"), Unstructured(0.5)),
    Option(format_named("mxfp4"), NofM(2, 4)),
    Option(None, Unstructured(0.5)),
]


@pytest.mark.parametrize("option", [*OWN, *(Option(format_named(name)) for name in FORMATS)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_allmend_loads_every_folder_to_the_bit(
    option: Option, dtype: torch.dtype, model: LlamaForCausalLM, saved: Saved
) -> None:
    plan = dict.fromkeys(linear_layers_of(model), option)
    folder, simulated = saved(plan)
    assert loads_elsewhere(plan) == (option not in OWN)
    loaded = load_model(str(folder), dtype=dtype, device="cpu")
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, simulated.get_parameter(name).to(dtype)), name
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert len(loaded.digest) == 64
    assert linear_layers(folder) == linear_layers_of(model)


def test_transformers_does_not_load_what_it_cannot_read(model: LlamaForCausalLM, saved: Saved) -> None:
    folder, _ = saved(dict.fromkeys(linear_layers_of(model), OWN[1]))
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("spoil", ["cut", "layer", "note", "version", "text", "shape"])
def test_a_damaged_folder_is_named(spoil: str, model: LlamaForCausalLM, saved: Saved) -> None:
    folder, _ = saved(dict.fromkeys(linear_layers_of(model), OWN[1]))
    weights, note = folder / "packed.safetensors", folder / "packed.json"
    about = json.loads(note.read_text())
    first = next(iter(about["layers"]))
    match spoil:
        case "cut":
            weights.write_bytes(weights.read_bytes()[:2000])
        case "layer":
            about["layers"]["model.layers.9.mlp.up_proj"] = about["layers"][first]
        case "note":
            about["layers"][first]["format"] = "int5"
        case "version":
            about["version"] = 2
        case "text":
            about["layers"][first]["rows"] = "many"
        case _:
            about["layers"][first]["rows"] = 7
    note.write_text(json.dumps(about))
    with pytest.raises(UserError):
        load_model(str(folder), device="cpu")


def test_without_the_library_it_is_named(
    model: LlamaForCausalLM, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = saved(dict.fromkeys(linear_layers_of(model), OWN[0]))
    for name in [name for name in sys.modules if name.startswith(("compressed_tensors", "allmend.models.pack"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(UserError, match=r"(?s)compressed_tensors.* is not installed.*allmend\[compress\]"):
        load_model(str(folder), device="cpu")


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_a_folder_decodes_with_its_weights_packed(name: str, model: LlamaForCausalLM, saved: Saved) -> None:
    folder, simulated = saved(dict.fromkeys(linear_layers_of(model), Option(format_named(name))))
    loaded = load_compressed(folder, runtime="cpu")
    packed = [module for module in loaded.model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == len(linear_layers_of(model))
    found, expected = logits(loaded.model), logits(simulated)
    assert float((found - expected).norm() / expected.norm()) < 0.03
    assert worst(logits(load_compressed(folder).model), expected) < 1e-5


def test_without_a_kernel_there_is_no_runtime(model: LlamaForCausalLM, saved: Saved) -> None:
    folder, _ = saved(dict.fromkeys(linear_layers_of(model), Option(format_named("mxfp4"))))
    with pytest.raises(UserError, match=r"(?s)no layer has a kernel.*int4 with a group of 32"):
        load_compressed(folder, runtime="cpu")
