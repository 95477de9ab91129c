"""The decoders whose layers can run side by side, and where in a layer what is found."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allmend.errors import UserError
from allmend.models import modeling_paired as paired

Parts = Callable[[Any], list[int]]
"""Of an attention's or perceptron's configuration: rows of a stacked projection, part by part."""


def _whole(config: Any) -> list[int]:
    return []


def _query_key_value(config: Any) -> list[int]:
    keys = config.num_key_value_heads * config.head_dim
    return [config.num_attention_heads * config.head_dim, keys, keys]


def _gate_up(config: Any) -> list[int]:
    return [config.intermediate_size] * 2


@dataclass(frozen=True)
class Branch:
    """One of the two things that a layer adds to the residual stream.

    Attributes:
        norm: what it reads the stream through.
        inputs: projections after the norm, with the parts of those that are several in one.
        output: the projection back to the stream.
    """

    norm: str
    inputs: tuple[tuple[str, Parts], ...]
    output: str


@dataclass(frozen=True)
class Architecture:
    """A decoder layer.

    Attributes:
        paired: the model class with layers of different widths.
        attention, perceptron: its branches; of a block that runs both at once, both read the same norm.
        head_norms: norms of single heads, with one gain for all heads of a layer.
        last_norm: of the model, before its output embedding.
    """

    paired: type[Any]
    attention: Branch
    perceptron: Branch
    head_norms: tuple[str, ...] = ()
    last_norm: str = "norm"

    @property
    def at_once(self) -> bool:
        """Whether attention and perceptron read the same stream, so that the perceptron waits for nothing."""
        return self.attention.norm == self.perceptron.norm


def _attention(inputs: tuple[tuple[str, Parts], ...], output: str) -> Branch:
    return Branch("input_layernorm", inputs, output)


_SEPARATE = tuple((f"self_attn.{name}_proj", _whole) for name in "qkv")
_ATTENTION = _attention(_SEPARATE, "self_attn.o_proj")
_GATED = Branch("post_attention_layernorm", (("mlp.gate_proj", _whole), ("mlp.up_proj", _whole)), "mlp.down_proj")

ARCHITECTURES = {
    "LlamaDecoderLayer": Architecture(paired.PairedLlamaForCausalLM, _ATTENTION, _GATED),
    "MistralDecoderLayer": Architecture(paired.PairedMistralForCausalLM, _ATTENTION, _GATED),
    "Qwen2DecoderLayer": Architecture(paired.PairedQwen2ForCausalLM, _ATTENTION, _GATED),
    "Qwen3DecoderLayer": Architecture(
        paired.PairedQwen3ForCausalLM, _ATTENTION, _GATED, ("self_attn.q_norm", "self_attn.k_norm")
    ),
    "Phi3DecoderLayer": Architecture(
        paired.PairedPhi3ForCausalLM,
        _attention((("self_attn.qkv_proj", _query_key_value),), "self_attn.o_proj"),
        Branch("post_attention_layernorm", (("mlp.gate_up_proj", _gate_up),), "mlp.down_proj"),
    ),
    "PhiDecoderLayer": Architecture(
        paired.PairedPhiForCausalLM,
        _attention(_SEPARATE, "self_attn.dense"),
        Branch("input_layernorm", (("mlp.fc1", _whole),), "mlp.fc2"),
        last_norm="final_layernorm",
    ),
    "Starcoder2DecoderLayer": Architecture(
        paired.PairedStarcoder2ForCausalLM,
        _ATTENTION,
        Branch("post_attention_layernorm", (("mlp.c_fc", _whole),), "mlp.c_proj"),
    ),
}
"""By the class of the decoder layer."""

KNOWN = "Llama, Mistral, Qwen2, Qwen3, Phi-3, Phi and StarCoder2"


def architecture_of(layer: nn.Module) -> Architecture:
    """The architecture of a decoder layer.

    Raises:
        UserError: it is not known here.
    """
    name = type(layer).__name__
    if name not in ARCHITECTURES:
        raise UserError(
            f"layers of the kind {name} cannot run side by side here",
            hint=f"Those of {KNOWN} can. Norms after the projections (Gemma 2 and 3, OLMo 2) and mixtures of experts "
            "have no exact wider layer.",
        )
    return ARCHITECTURES[name]


def layers_of(model: Any) -> list[nn.Module]:
    """The decoder layers of a model that can be rearranged.

    Raises:
        UserError: the model is quantised, wrapped in an adapter, paired already, or of an architecture that is not
            known here.
    """
    if hasattr(model, "peft_config") or hasattr(model, "base_model_name_or_path"):
        raise UserError("the model carries an adapter", hint="Merge it first: `allmend depth … --adapter DIR --merge`.")
    config = model.config
    where = getattr(config, "_name_or_path", "") or None
    if getattr(config, "quantization_config", None) is not None or not all(
        torch.is_floating_point(parameter) for parameter in model.parameters()
    ):
        raise quantised_error(where)
    if getattr(config, "layer_widths", None) is not None:
        raise UserError(
            "some of the model's layers run side by side already", where=where, hint="Start from the original model."
        )
    layers = list(getattr(getattr(model, "model", None), "layers", ()))
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no decoder layers that are known here",
            where=where,
            hint=f"Use one of {KNOWN}.",
        )
    architecture_of(layers[0])
    return layers


def quantised_error(where: str | Path | None = None) -> UserError:
    """For a model whose matrices are quantised."""
    return UserError(
        "the model is quantised, and quantised matrices cannot be stacked",
        where=where,
        hint="Fold first, compress after: `allmend depth apply MODEL --plan plan.json --out DIR` of the model before "
        "it was quantised, then quantise DIR.",
    )


def kinds_of(config: Any, layers: int) -> list[str]:
    """Of each layer, its kind of attention (full, sliding window), as far as the configuration tells layers apart."""
    found: list[str] = getattr(config, "layer_types", None) or ["full_attention"] * layers
    return found


def check_kinds(config: Any, layers: int, together: tuple[tuple[int, ...], ...]) -> None:
    """See that the layers of each group have the same kind of attention.

    Raises:
        UserError: a group has two; the message has the group.
    """
    kinds = kinds_of(config, layers)
    for group in together:
        if len({kinds[layer] for layer in group}) > 1:
            names = ", ".join(f"{layer} {kinds[layer]}" for layer in group)
            raise UserError(
                f"group {list(group)}: its layers attend differently ({names})",
                hint="Only layers with the same window and positions make one wider layer.",
            )
