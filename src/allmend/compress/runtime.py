"""Packed weights that are multiplied as they are: torch's kernels for integers of 4 and 8 bits on a CPU.

The kernels take activations in bfloat16. With other activations torch falls back to loops that are slower than the
dense product by an order of magnitude, so that they are refused.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from allmend.errors import UserError
from allmend.models.formats import Format, Integers, Scale
from allmend.models.load import LoadedModel, load_model
from allmend.models.packed_folder import parts_of
from allmend.models.packing import Packed, codes_of, scale_of

GROUPS = (32, 64, 128, 256)
"""Columns with one scale that the kernel for 4 bits knows."""

TILES = 2


class PackedLinear(nn.Module, ABC):
    """A linear layer with packed weights.

    Args:
        shape: rows and columns.
        bias: as it was.
    """

    def __init__(self, shape: tuple[int, int], bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias: torch.Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach().bfloat16())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.bfloat16:
            raise TypeError(f"packed weights are multiplied with bfloat16, got {x.dtype}: load the model as it comes")
        found = self.product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return found if self.bias is None else found + self.bias

    @abstractmethod
    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """x Wᵀ of [n, columns], bfloat16 [n, rows]."""


class Int4Linear(PackedLinear):
    """Weights of 4 bits, 32 to 256 columns with one scale."""

    def __init__(self, codes: torch.Tensor, scale: Scale, group: int, bias: torch.Tensor | None = None) -> None:
        super().__init__((codes.shape[0], codes.shape[1]), bias)
        self.group = group
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes.int() + 8).contiguous(), TILES)
        step = scale.step.view(len(codes), -1)
        # (q − 8) · step + zero: what an integer zero takes off is put there
        zero = torch.zeros_like(step) if scale.zero is None else -scale.zero.view(len(codes), -1) * step
        self.register_buffer("packed", packed)
        self.register_buffer("scale", torch.stack([step, zero], dim=-1).transpose(0, 1).bfloat16().contiguous())

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, self.group, self.scale)
        return found


class Int8Linear(PackedLinear):
    """Weights of 8 bits, one scale a row."""

    def __init__(self, codes: torch.Tensor, scale: Scale, bias: torch.Tensor | None = None) -> None:
        super().__init__((codes.shape[0], codes.shape[1]), bias)
        self.register_buffer("packed", codes.to(torch.int8).contiguous())
        self.register_buffer("scale", scale.step.view(-1).bfloat16())

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.aten._weight_int8pack_mm(rows, self.packed, self.scale)
        return found


def has_kernel(fmt: Format | None, rows: int) -> bool:
    """Whether weights of a format can be multiplied as they are."""
    match fmt:
        case Integers(element_bits=4, block=block):
            return block in GROUPS and rows % 16 == 0
        case Integers(element_bits=8, block=0):
            return True
        case _:
            return False


def packed_linear(codes: torch.Tensor, scale: Scale, fmt: Format, bias: torch.Tensor | None = None) -> PackedLinear:
    """A layer for integers [rows, columns].

    Raises:
        UserError: there is no kernel for the format.
    """
    if not has_kernel(fmt, len(codes)):
        raise UserError(
            f"there is no kernel for {fmt.name} with blocks of {fmt.block or 'a row'} on a CPU",
            hint=f"Compress to int4 with a group of {', '.join(map(str, GROUPS))}, or to int8 by rows; or load the "
            "folder without a runtime.",
        )
    if fmt.element_bits == 8:
        return Int8Linear(codes, scale, bias)
    return Int4Linear(codes, scale, fmt.block, bias)


def load_compressed(folder: Path | str, *, runtime: Literal["cpu"] | None = None) -> LoadedModel:
    """A compressed folder as a model.

    Args:
        folder: that `allmend compress` has written.
        runtime: `cpu` keeps weights packed that torch has a kernel for, with all else in bfloat16; without one, all
            weights are taken apart.

    Raises:
        UserError: the folder cannot be loaded, or no layer has a kernel.
    """
    if runtime is None:
        return load_model(str(folder))
    loaded = load_model(str(folder), dtype=torch.bfloat16, device="cpu")
    layers = dict(_with_kernels(loaded))
    if not layers:
        raise UserError(
            "no layer has a kernel on a CPU",
            where=folder,
            hint=f"Compress to int4 with a group of {', '.join(map(str, GROUPS))}, or to int8 by rows; or load it "
            "without a runtime.",
        )
    swap(loaded.model, layers)
    return loaded


def _with_kernels(loaded: LoadedModel) -> Iterator[tuple[str, PackedLinear]]:
    for name, kept, tensors in parts_of(loaded.folder):
        if kept is None or kept.sparse or (fmt := kept.fmt) is None or not has_kernel(fmt, kept.rows):
            continue
        packed = Packed(tensors, (kept.rows, kept.columns), torch.bfloat16)
        own: Any = loaded.model.get_submodule(name)
        yield name, packed_linear(codes_of(packed, fmt), scale_of(packed, fmt), fmt, own.bias)


def swap(model: Any, layers: Mapping[str, PackedLinear]) -> None:
    """Put packed layers in the places of a model's own."""
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)
