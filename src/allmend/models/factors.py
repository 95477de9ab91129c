"""The factors of a LoRA as named tensors: A [r, in] and B [out, r] of each layer, whose product B A is what it adds."""

from collections.abc import Mapping

import torch

from allmend.models.tensors import Tensors

A, B = ".lora_A.weight", ".lora_B.weight"
"""Ends of the names of LoRA's factors."""


def layers_of_factors(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, str]]:
    """Names of A [r, in] and B [out, r] by layer, in order of the layers.

    Raises:
        ValueError: a tensor is no factor of a LoRA layer, or a layer lacks one of its two.
    """
    if not all(name.endswith((A, B)) for name in tensors):
        raise ValueError("products are of LoRA's factors, and something else learns here")
    layers = sorted({name.removesuffix(A).removesuffix(B) for name in tensors})
    if alone := [layer for layer in layers if not {layer + A, layer + B} <= tensors.keys()]:
        raise ValueError(f"LoRA's factors come in pairs, and {alone[0]} has one of them here")
    return {layer: (layer + A, layer + B) for layer in layers}


def first_components(tensors: Tensors, rank: int) -> Tensors:
    """LoRA factors with all but the first `rank` components zero: A [r, in] and B [out, r] of each layer.

    Where both sides of a component are zero its gradients are zero too, so that training leaves it alone.

    Raises:
        ValueError: only one factor of a layer is here, and training would move what is zero in it.
    """
    layers_of_factors(tensors)
    return {name: _components(name, tensor, torch.zeros_like(tensor), rank) for name, tensor in tensors.items()}


def with_components(tensors: Tensors, others: Tensors, rank: int) -> Tensors:
    """LoRA factors with the first `rank` components of `tensors` and the rest of `others`."""
    return {name: _components(name, tensor, others[name], rank) for name, tensor in tensors.items()}


def _components(name: str, first: torch.Tensor, rest: torch.Tensor, rank: int) -> torch.Tensor:
    if name.endswith(A):
        return torch.cat([first[:rank], rest[rank:]])
    if name.endswith(B):
        return torch.cat([first[:, :rank], rest[:, rank:]], dim=1)
    raise ValueError(f"{name} is no factor of a LoRA layer")
