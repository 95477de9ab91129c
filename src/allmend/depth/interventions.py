"""A model whose layers run otherwise, on the weights of the original: nothing is copied but what is merged."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from allmend.depth.architectures import Architecture, architecture_of, check_kinds, kinds_of, layers_of
from allmend.depth.plan import Intervention, Step


def intervene(model: Any, change: Intervention) -> Any:
    """A model that shares its weights with `model`, which stays as it is, and runs its layers as `change` says.

    It is meant for measuring: a cache of keys and values works unless layer 0 is left out or layers attend
    differently, and what it computes is what `apply_plan` makes one standard layer of.

    Args:
        model: a causal language model of transformers, as `architectures.layers_of` asks for.
        change: which layers run, in what order, which of them together.

    Raises:
        UserError: the model cannot be rearranged, or the layers of a group attend differently.
    """
    layers = layers_of(model)
    steps = change.steps(len(layers))
    check_kinds(model.config, len(layers), tuple(step.layers for step in steps if len(step.layers) > 1))
    changed = shallow(model)
    changed.model = shallow(model.model)
    changed.model.layers = nn.ModuleList([step_of(step, layers) for step in steps])
    kinds = kinds_of(model.config, len(layers))
    if len(set(kinds)) > 1:  # the decoder looks a layer's mask up by its place, and a cache by its own number
        config = copy.copy(model.config)
        config.layer_types = [kinds[step.layers[0]] for step in steps]
        config.use_cache = False
        changed.config = changed.model.config = config
    return changed


def shallow(module: Any) -> Any:
    """A module with the same children and parameters, in tables of its own."""
    changed = copy.copy(module)
    for table in ("_modules", "_parameters", "_buffers"):
        setattr(changed, table, dict(getattr(module, table)))
    return changed


def step_of(step: Step, layers: Sequence[nn.Module]) -> nn.Module:
    """The module that does a step of a decoder with these layers."""
    some = [layers[layer] for layer in step.layers]
    if len(some) == 1:
        return some[0]
    match step.together:
        case "parallel":
            return SideBySide(some)
        case "parallel_sum":
            return SumOfBlocks(some)
        case "merge":
            return merged(some)


class SideBySide(nn.Module):
    """Layers side by side: each reads the stream as it was, and every perceptron sees all attention updates.

    mid = x + Σ A_k(x); y = mid + Σ F_k(mid).
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.architecture = architecture_of(layers[0])

    def forward(self, hidden_states: torch.Tensor, **named: Any) -> torch.Tensor:
        """Args and result as of a decoder layer: [batch, tokens, width of the stream]."""
        middle = hidden_states
        for layer in self.layers:
            middle = middle + attention_update(self.architecture, layer, hidden_states, **named)
        read = hidden_states if self.architecture.at_once else middle
        out = middle
        for layer in self.layers:
            out = out + perceptron_update(self.architecture, layer, read)
        return out


class SumOfBlocks(nn.Module):
    """Whole blocks side by side: each perceptron sees its own attention's update alone. x + Σ (B_k(x) − x)."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden_states: torch.Tensor, **named: Any) -> torch.Tensor:
        out = hidden_states
        for layer in self.layers:
            out = out + (layer(hidden_states, **named) - hidden_states)
        return out


def attention_update(
    architecture: Architecture, layer: nn.Module, hidden_states: torch.Tensor, **named: Any
) -> torch.Tensor:
    """What a layer's attention adds to the stream."""
    norm, attention = layer.get_submodule(architecture.attention.norm), layer.get_submodule("self_attn")
    update: torch.Tensor = attention(hidden_states=norm(hidden_states), **named)[0]
    return update


def perceptron_update(architecture: Architecture, layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """What a layer's perceptron adds to the stream."""
    update: torch.Tensor = layer.get_submodule("mlp")(layer.get_submodule(architecture.perceptron.norm)(hidden_states))
    return update


@torch.no_grad()
def merged(layers: Sequence[nn.Module]) -> nn.Module:
    """A layer with the mean of the layers' weights."""
    layer = copy.deepcopy(layers[0])
    states = [dict(one.named_parameters()) for one in layers]
    for name, parameter in layer.named_parameters():
        parameter.copy_(torch.stack([state[name] for state in states]).mean(0))
    return layer
