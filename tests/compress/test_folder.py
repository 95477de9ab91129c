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

from allmend.compress.folder import save_folder
from allmend.errors import UserError
from allmend.models.formats import Format, format_named, quantize
from allmend.models.load import linear_layers_of
from allmend.models.packing import encode

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


Saved = Callable[[dict[str, Format]], tuple[Path, LlamaForCausalLM]]


@pytest.fixture
def saved(model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Saved:
    def save(formats: dict[str, Format]) -> tuple[Path, LlamaForCausalLM]:
        weights = {name: model.get_submodule(name).weight.data for name in formats}
        packed = {name: encode(weight, formats[name]) for name, weight in weights.items()}
        size = save_folder(tmp_path / "out", model, tiny_tokenizer, packed, formats)
        assert size == (tmp_path / "out" / "model.safetensors").stat().st_size
        simulated = copy.deepcopy(model)
        for name, weight in weights.items():
            simulated.get_submodule(name).weight.data = quantize(weight, formats[name])
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
    folder, simulated = saved({layer: format_named(name) for layer in linear_layers_of(model)})
    # elements under a power of two, and zero points, are taken apart in bfloat16 by compressed-tensors
    small = name.startswith(("mx", "nv"))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if small else torch.float32)
    assert worst(logits(loaded), logits(simulated)) < (0.06 if small else 0.02 if name == "int4_affine" else 1e-3)
    assert worst(logits(simulated), logits(model)) > 0.01


def test_layers_of_several_formats_and_of_none(model: LlamaForCausalLM, saved: Saved) -> None:
    layers = list(linear_layers_of(model))
    some = [format_named("int4"), format_named("int8"), format_named("int4", group=32)]
    folder, simulated = saved({layer: some[place % 3] for place, layer in enumerate(layers[1:])})
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert worst(logits(loaded), logits(simulated)) < 1e-3
    assert (
        "model.layers.0.self_attn.q_proj"
        in json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    )


def test_it_loads_where_there_is_no_allmend(model: LlamaForCausalLM, saved: Saved, tmp_path: Path) -> None:
    folder, simulated = saved({layer: format_named("int4") for layer in linear_layers_of(model)})
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
    folder, _ = saved({layer: format_named("int4") for layer in linear_layers_of(model)})
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
    formats = {layer: format_named("int4") for layer in linear_layers_of(model)}
    folder, _ = saved(formats)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("allmend.compress.folder.save_file", full)
    with pytest.raises(UserError, match="no space left"):
        saved(formats)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in folder.parent.iterdir() if not path.name.startswith(".")) == ["out"]
