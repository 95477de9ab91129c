# mypy: disable-error-code="no-untyped-call"
"""Decoders whose layers have different widths: a layer of width w holds w layers of the original, side by side.

Such a layer is the architecture's own decoder layer with w times the heads, key-value heads and neurons of the
perceptron, and everything else (cache, generation, padding, gradient checkpointing) is the architecture's own, too. A
model is told by one field of its configuration, `layer_widths`.

This file needs nothing but torch and transformers: `save_pretrained` puts a copy of it into the model's folder, so that
the model loads with `trust_remote_code=True` where Allmend is not installed. With Allmend, `import allmend` suffices.

Source: Calvo González et al., "Leveraging the True Depth of LLMs" (arXiv 2502.02790).
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)


class LayerConfig:
    """A model's configuration with the widths of one layer; in all else it follows the model's, also later on."""

    def __init__(self, config: Any, width: int) -> None:
        self._config = config
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.num_attention_heads = width * config.num_attention_heads
        self.num_key_value_heads = width * config.num_key_value_heads
        self.intermediate_size = width * config.intermediate_size

    def __getattr__(self, name: str) -> Any:
        """Only called for what is not an attribute of the layer's own."""
        if name == "_config" or name.startswith("__"):  # while a copy is being made
            raise AttributeError(name)
        return getattr(self._config, name)


def wide_layer(kind: type[nn.Module], config: Any, width: int, place: int) -> nn.Module:
    """A decoder layer of some width.

    Args:
        kind: the architecture's decoder layer.
        config: the model's.
        width: layers that it stands for.
        place: its index in the model.
    """
    own = LayerConfig(config, width)
    layer = kind(own, place)
    attention: Any = layer.self_attn
    for name in ("q_norm", "k_norm"):  # of each head: layers side by side have gains of their own
        norm = getattr(attention, name, None)
        if norm is not None and width > 1:
            heads = own.num_attention_heads if name == "q_norm" else own.num_key_value_heads
            norm.weight = nn.Parameter(torch.ones(heads, own.head_dim))
    return layer


class _Paired:
    """What makes an architecture's model one of layers of different widths."""

    _auto_class: Any = "AutoModelForCausalLM"  # has `save_pretrained` copy this file

    def __init__(self, config: Any, *others: Any, **named: Any) -> None:
        super().__init__(config, *others, **named)  # type: ignore[call-arg]
        layers = self.model.layers  # type: ignore[attr-defined]
        for place, width in enumerate(config.layer_widths or ()):
            if width > 1:
                layers[place] = wide_layer(type(layers[place]), config, width, place)
        self.post_init()  # type: ignore[attr-defined]  # again, for the layers that are new


class _Widths:
    """What makes an architecture's configuration one with `layer_widths`, whole numbers of 1 or more for each layer."""

    _auto_class: ClassVar[str | None] = "AutoConfig"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        widths, layers = self.layer_widths, self.num_hidden_layers  # type: ignore[attr-defined]
        if widths is None:
            return
        if len(widths) != layers or any(type(width) is not int or width < 1 for width in widths):
            raise ValueError(f"layer_widths {widths} are not {layers} whole numbers of 1 or more")


class PairedLlamaConfig(_Widths, LlamaConfig):
    """Llama's configuration with a width for each layer."""

    model_type = "paired_llama"
    layer_widths: list[int] | None = None


class PairedMistralConfig(_Widths, MistralConfig):
    """Mistral's configuration with a width for each layer."""

    model_type = "paired_mistral"
    layer_widths: list[int] | None = None


class PairedQwen2Config(_Widths, Qwen2Config):
    """Qwen2's configuration with a width for each layer."""

    model_type = "paired_qwen2"
    layer_widths: list[int] | None = None


class PairedQwen3Config(_Widths, Qwen3Config):
    """Qwen3's configuration with a width for each layer."""

    model_type = "paired_qwen3"
    layer_widths: list[int] | None = None


class PairedPhi3Config(_Widths, Phi3Config):
    """Phi-3's configuration with a width for each layer."""

    model_type = "paired_phi3"
    layer_widths: list[int] | None = None


class PairedPhiConfig(_Widths, PhiConfig):
    """Phi's configuration with a width for each layer."""

    model_type = "paired_phi"
    layer_widths: list[int] | None = None


class PairedStarcoder2Config(_Widths, Starcoder2Config):
    """StarCoder2's configuration with a width for each layer."""

    model_type = "paired_starcoder2"
    layer_widths: list[int] | None = None


class PairedLlamaForCausalLM(_Paired, LlamaForCausalLM):
    """Llama with layers of different widths."""

    config_class = PairedLlamaConfig


class PairedMistralForCausalLM(_Paired, MistralForCausalLM):
    """Mistral with layers of different widths."""

    config_class = PairedMistralConfig


class PairedQwen2ForCausalLM(_Paired, Qwen2ForCausalLM):
    """Qwen2 with layers of different widths."""

    config_class = PairedQwen2Config


class PairedQwen3ForCausalLM(_Paired, Qwen3ForCausalLM):
    """Qwen3 with layers of different widths."""

    config_class = PairedQwen3Config


class PairedPhi3ForCausalLM(_Paired, Phi3ForCausalLM):
    """Phi-3 with layers of different widths."""

    config_class = PairedPhi3Config


class PairedPhiForCausalLM(_Paired, PhiForCausalLM):
    """Phi with layers of different widths."""

    config_class = PairedPhiConfig


class PairedStarcoder2ForCausalLM(_Paired, Starcoder2ForCausalLM):
    """StarCoder2 with layers of different widths."""

    config_class = PairedStarcoder2Config


PAIRED = (
    PairedLlamaForCausalLM,
    PairedMistralForCausalLM,
    PairedQwen2ForCausalLM,
    PairedQwen3ForCausalLM,
    PairedPhi3ForCausalLM,
    PairedPhiForCausalLM,
    PairedStarcoder2ForCausalLM,
)

if __name__ == "allmend.models.modeling_paired":  # of a copy, transformers knows which class is meant
    for _kind in PAIRED:
        AutoConfig.register(_kind.config_class.model_type, _kind.config_class, exist_ok=True)
        AutoModelForCausalLM.register(_kind.config_class, _kind, exist_ok=True)
