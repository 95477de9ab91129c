"""The classes of paired models by themselves: widths, configurations, copies."""

import copy
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from allmend.errors import UserError
from allmend.models import modeling_paired
from allmend.models.load import linear_layers
from allmend.models.modeling_paired import PAIRED, LayerConfig, PairedLlamaConfig, PairedLlamaForCausalLM, wide_layer

SIZES: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
EACH = pytest.mark.parametrize("kind", PAIRED, ids=lambda kind: kind.__name__)


@EACH
def test_a_layer_is_as_wide_as_it_is_told(kind: type[Any]) -> None:
    plain = kind(kind.config_class(**SIZES))
    model = kind(kind.config_class(layer_widths=[1, 3, 2], **SIZES))

    def size(layer: torch.nn.Module) -> int:
        return sum(p.numel() for name, p in layer.named_parameters() if "norm" not in name and "bias" not in name)

    one = size(plain.model.layers[0])
    assert [size(layer) for layer in plain.model.layers] == [one, one, one]
    assert [size(layer) for layer in model.model.layers] == [one, 3 * one, 2 * one]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    assert {type(layer) for layer in model.model.layers} == {type(plain.model.layers[0])}
    ids = torch.arange(10)[None]
    assert model(ids).logits.shape == (1, 10, 30)


@EACH
def test_a_new_model_starts_as_the_architecture_s_own_does(kind: type[Any]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wide = kind(kind.config_class(layer_widths=[1, 8, 1], **SIZES | {"hidden_size": 64}))

    for name, parameter in wide.model.layers[1].named_parameters():
        if "norm" in name:
            assert parameter.eq(0.0 if name.endswith("bias") else 1.0).all(), name
        elif name.endswith("bias"):
            assert parameter.eq(0).all(), name
        else:
            assert 0.9 < parameter.std() / wide.config.initializer_range < 1.1, name


@pytest.mark.parametrize("widths", [[1, 2], [1, 2, 0], [1, 2, -1], [1, 1, 1.0], [1, 1, "2"], [True, 1, 1], "112", []])
def test_widths_that_are_none_are_refused(widths: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="are not 3 whole numbers of 1 or more"):
        PairedLlamaConfig(layer_widths=widths, **SIZES)
    PairedLlamaConfig(layer_widths=[1, 1, 1], **SIZES).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_widths": widths}))
    with pytest.raises(UserError, match="3 whole numbers"):
        linear_layers(tmp_path)


@EACH
def test_a_configuration_comes_back(kind: type[Any], tmp_path: Path) -> None:
    config = kind.config_class(layer_widths=[1, 2, 1], **SIZES)
    config.save_pretrained(tmp_path)

    found = AutoConfig.from_pretrained(tmp_path)

    assert type(found) is kind.config_class
    assert found.layer_widths == [1, 2, 1]
    with torch.device("meta"):
        assert type(AutoModelForCausalLM.from_config(found)) is kind


def test_a_layer_s_configuration_follows_the_model_s() -> None:
    config = PairedLlamaConfig(layer_widths=[1, 2, 1], **SIZES)
    own = LayerConfig(config, 2)

    assert (own.num_attention_heads, own.num_key_value_heads, own.intermediate_size, own.head_dim) == (8, 4, 40, 4)
    assert own.hidden_size == 16
    config.hidden_size = 24
    config._attn_implementation = "eager"
    assert (own.hidden_size, own._attn_implementation) == (24, "eager")
    assert not hasattr(own, "nothing")


def test_a_copied_layer_s_configuration_is_that_of_the_copied_model() -> None:
    model = PairedLlamaForCausalLM(PairedLlamaConfig(layer_widths=[1, 2, 1], **SIZES))

    found = copy.deepcopy(model)
    found.config._attn_implementation = "eager"
    model.config._attn_implementation = "sdpa"

    assert found.model.layers[1].self_attn.config._attn_implementation == "eager"
    assert found.model.layers[1].self_attn.config.num_attention_heads == 8
    shallow = copy.copy(model.model.layers[1].self_attn.config)
    assert (shallow._attn_implementation, shallow.num_attention_heads) == ("sdpa", 8)


def test_a_wide_layer_is_one_of_its_own(make_model: Any) -> None:
    model = make_model()
    layer: Any = wide_layer(type(model.model.layers[0]), model.config, 3, 1)
    assert layer.self_attn.q_proj.weight.shape == (96, 32)
    assert layer.self_attn.k_proj.weight.shape == (48, 32)
    assert layer.mlp.down_proj.weight.shape == (32, 144)


def test_a_copy_of_the_file_takes_nobody_s_place(tmp_path: Path) -> None:
    """Where Allmend is there, a folder's own copy does not become what `AutoConfig` gives for all other folders."""
    source = Path(modeling_paired.__file__).read_text()
    (tmp_path / "modeling_paired.py").write_text(source)
    spec = importlib.util.spec_from_file_location("a_copy_of_modeling_paired", tmp_path / "modeling_paired.py")
    assert spec is not None
    assert spec.loader is not None
    copied = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = copied
    try:
        spec.loader.exec_module(copied)
    finally:
        del sys.modules[spec.name]

    assert copied.PairedLlamaConfig is not PairedLlamaConfig
    assert CONFIG_MAPPING["paired_llama"] is PairedLlamaConfig


def test_a_folder_is_loaded_with_allmend_s_own_code(tmp_path: Path) -> None:
    """Also where the folder's code would be trusted."""
    PairedLlamaForCausalLM(PairedLlamaConfig(layer_widths=[1, 2, 1], **SIZES)).save_pretrained(tmp_path)
    (tmp_path / "modeling_paired.py").write_text("raise RuntimeError('somebody else was here')")

    for trust in (True, False, None):
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)) is PairedLlamaForCausalLM
