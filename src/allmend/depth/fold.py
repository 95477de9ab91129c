"""Folding: layers that run side by side as one wider layer of the same kind, which is equal to them.

A norm's gains move into the matrices that read it, W_k diag(g_k / ḡ), so that all layers read the stream through one
norm with the gains ḡ. Projections that read are then stacked by rows, those that write by columns, and a sum over the
inner width is the sum of the layers' updates.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from allmend.depth.architectures import Branch, Parts, architecture_of
from allmend.errors import UserError
from allmend.models.modeling_paired import LayerConfig, wide_layer

Gain = Literal["geometric", "one"]
"""ḡ: the geometric mean of the layers' gains, or 1."""

LEAST = 1e-3
"""A gain below it is not divided by: ḡ is 1 there."""


@torch.no_grad()
def fold_group(layers: Sequence[nn.Module], *, gain: Gain = "geometric") -> nn.Module:
    """One decoder layer that is equal to these running side by side (`interventions.SideBySide`).

    Equal up to rounding: it is folded in single precision or better and then has the layers' type.

    Args:
        layers: decoder layers of one kind.
        gain: what the layers' norms have in common.

    Raises:
        UserError: the layers have no exact wider layer.
    """
    first: Any = layers[0]
    architecture = architecture_of(first)
    if any(type(layer) is not type(first) for layer in layers):
        raise UserError("layers of different kinds cannot be folded")
    if getattr(first.self_attn, "qk_layernorm", False):
        raise UserError("norms of heads with a shift (`qk_layernorm`) have no exact wider layer")
    config = LayerConfig(first.self_attn.config, 1)
    with torch.device("meta"):
        wide = wide_layer(type(first), config, len(layers), first.self_attn.layer_idx)
    state: dict[str, torch.Tensor] = {}
    for branch in (architecture.attention, architecture.perceptron):
        state |= _folded(layers, branch, config, gain)
    for norm in architecture.head_norms:
        heads = config.num_attention_heads if norm.endswith("q_norm") else config.num_key_value_heads
        gains = [_weight(layer, norm).expand(heads, -1) for layer in layers]
        state[f"{norm}.weight"] = torch.cat(gains)
    kind = next(first.parameters()).dtype
    frozen = {name: tensor.to(kind).contiguous() for name, tensor in state.items()}
    wide.load_state_dict(frozen, assign=True)
    for name, parameter in wide.named_parameters():
        parameter.requires_grad_(first.get_parameter(name).requires_grad)
    return wide.train(first.training)


def _folded(layers: Sequence[nn.Module], branch: Branch, config: Any, gain: Gain) -> dict[str, torch.Tensor]:
    """The tensors of one branch."""
    gains = torch.stack([_weight(layer, branch.norm) for layer in layers])
    shifts = [_bias(layer, branch.norm) for layer in layers]
    common = torch.ones_like(gains[0])
    if gain == "geometric":
        usable = (gains > LEAST).all(0)
        common = torch.where(usable, gains.clamp(min=LEAST).log().mean(0).exp(), common)
    state = {f"{branch.norm}.weight": common}
    if shifts[0] is not None:
        state[f"{branch.norm}.bias"] = torch.zeros_like(common)
    for name, parts in branch.inputs:
        weights, biases = [], []
        for layer, own, shift in zip(layers, gains, shifts, strict=True):
            weight, bias = _weight(layer, name), _bias(layer, name)
            weights.append(weight * (own / common))
            if shift is not None and shift.any():
                if bias is None:
                    raise UserError(f"{name} has no bias that could take the shift of {branch.norm}")
                bias = bias + weight @ shift
            biases.append(bias)
        state[f"{name}.weight"] = _stacked(weights, parts, config)
        if (some := [bias for bias in biases if bias is not None]) and len(some) == len(biases):
            state[f"{name}.bias"] = _stacked(some, parts, config)
    output = [_weight(layer, branch.output) for layer in layers]
    state[f"{branch.output}.weight"] = torch.cat(output, dim=1)
    added = [bias for layer in layers if (bias := _bias(layer, branch.output)) is not None]
    if added:
        state[f"{branch.output}.bias"] = torch.stack(added).sum(0)
    return state


def _stacked(tensors: Sequence[torch.Tensor], parts: Parts, config: Any) -> torch.Tensor:
    """Rows of all layers, part by part where a projection is several in one."""
    sizes = parts(config)
    if not sizes:
        return torch.cat(list(tensors))
    split = [torch.split(tensor, sizes) for tensor in tensors]
    return torch.cat([some[part] for part in range(len(sizes)) for some in split])


def _weight(layer: nn.Module, name: str) -> torch.Tensor:
    found: torch.Tensor = layer.get_parameter(f"{name}.weight").detach()
    return found if found.dtype == torch.float64 else found.float()


def _bias(layer: nn.Module, name: str) -> torch.Tensor | None:
    found: torch.Tensor | None = getattr(layer.get_submodule(name), "bias", None)
    if found is None:
        return None
    return found.detach() if found.dtype == torch.float64 else found.detach().float()
