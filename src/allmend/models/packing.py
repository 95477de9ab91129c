"""Bits of quantised weights: those of `compressed-tensors` for dense ones, and our own for what it has no layout for.

Dense formats have the tensors, names and bits that `compressed-tensors` loads. The others are ours: block floats, and
every sparse weight, as a mask or a pattern for each four and the values that are kept, in their format's bits.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from compressed_tensors.compressors.mxfp6.helpers import pack_fp6_to_uint8, unpack_fp6_from_uint8
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from allmend.models.formats import (
    E2M1,
    E2M3,
    AffineIntegers,
    BlockFloats,
    Float8,
    Format,
    Integers,
    Microscaling,
    NvFloat4,
    Scale,
    scales_of,
)

BIAS = 127
"""Of exponents in eight bits."""

PATTERNS = tuple(itertools.combinations(range(4), 2))
"""The two of four that stay, by their code."""


@dataclass(frozen=True)
class Packed:
    """A weight in its bits.

    Attributes:
        tensors: by name, as they stand in a file behind the layer's name.
        shape: rows and columns.
        dtype: of what `decode` gives.
    """

    tensors: Mapping[str, torch.Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """That the values take, without the note of the shape."""
        return sum(tensor.nbytes for name, tensor in self.tensors.items() if name != "weight_shape")


def encode(weight: torch.Tensor, fmt: Format, *, scale: Scale | None = None) -> Packed:
    """A weight's nearest values in a format, as bits.

    Args:
        weight: [rows, columns].
        fmt: the format.
        scale: of its blocks, each [rows, blocks, 1]; the weight's own when absent.

    Raises:
        ValueError: as `formats.quantize`.
    """
    scale = scales_of(weight, fmt) if scale is None else scale
    codes = fmt.codes(fmt.blocks(weight), scale).view(weight.shape)
    return Packed(_values(codes, fmt) | _scale(scale, fmt, tuple(weight.shape)), tuple(weight.shape), weight.dtype)


def decode(packed: Packed, fmt: Format) -> torch.Tensor:
    """What the bits stand for, [rows, columns]."""
    codes = codes_of(packed, fmt).float()
    return fmt.values(fmt.blocks(codes), scale_of(packed, fmt)).view(packed.shape).to(packed.dtype)


def _values(codes: torch.Tensor, fmt: Format) -> dict[str, torch.Tensor]:
    shape = {"weight_shape": torch.tensor(codes.shape)}
    match fmt:
        case Integers(element_bits=8, block=0):
            return {"weight": codes.to(torch.int8)}
        case Integers() | AffineIntegers() | BlockFloats():
            return {"weight_packed": pack_to_int32(codes.to(torch.int8), fmt.element_bits)} | shape
        case Float8() | Microscaling(element_bits=8):
            return {"weight": codes.to(torch.float8_e4m3fn)}
        case Microscaling(element_bits=6):
            return {"weight_packed": pack_fp6_to_uint8(codes)}
        case _:
            return {"weight_packed": pack_fp4_to_uint8(codes)}


def codes_of(packed: Packed, fmt: Format) -> torch.Tensor:
    """Codes of a dense weight [rows, columns], in the type that its bits come in."""
    if "weight_packed" not in packed.tensors:
        return packed.tensors["weight"]
    rows, columns = packed.shape
    bits = packed.tensors["weight_packed"]
    found: torch.Tensor
    match fmt:
        case Microscaling(element_bits=6):
            found = unpack_fp6_from_uint8(bits, rows, columns, torch.float32)
        case Microscaling() | NvFloat4():
            found = unpack_fp4_from_uint8(bits, rows, columns, torch.float32)
        case _:
            found = unpack_from_int32(bits, fmt.element_bits, torch.Size(packed.shape))
    return found


def _scale(scale: Scale, fmt: Format, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    step = scale.step.reshape(shape[0], -1)
    match fmt:
        case Microscaling() | BlockFloats():
            return {"weight_scale": (torch.frexp(step).exponent - 1 + BIAS).to(torch.uint8)}
        case NvFloat4():
            assert scale.whole is not None
            return {
                "weight_scale": (step * scale.whole).to(torch.float8_e4m3fn),
                "weight_global_scale": scale.whole.reshape(1),
            }
        case AffineIntegers():
            assert scale.zero is not None
            zero = scale.zero.reshape(step.shape).to(torch.int8)
            return {
                "weight_scale": step.bfloat16(),
                "weight_zero_point": pack_to_int32(zero, fmt.element_bits, packed_dim=0),
            }
        case _:
            return {"weight_scale": step.bfloat16()}


def scale_of(packed: Packed, fmt: Format) -> Scale:
    """Scales of its blocks, each [rows, blocks, 1]."""
    stored = packed.tensors["weight_scale"]
    match fmt:
        case Microscaling() | BlockFloats():
            return Scale(torch.ldexp(torch.ones(stored.shape), stored.int() - BIAS)[..., None])
        case NvFloat4():
            whole = packed.tensors["weight_global_scale"][0]
            return Scale((stored.float() / whole)[..., None], whole=whole)
        case AffineIntegers():
            # turned here, since theirs does not turn a single row of words
            words = packed.tensors["weight_zero_point"].T.clone(memory_format=torch.contiguous_format)
            zero = unpack_from_int32(words, fmt.element_bits, torch.Size(stored.shape[::-1]))
            return Scale(stored.float()[..., None], zero.T.float()[..., None])
        case _:
            return Scale(stored.float()[..., None])


def encode_sparse(
    weight: torch.Tensor, keep: torch.Tensor, fmt: Format | None, *, scale: Scale | None = None
) -> Packed:
    """A weight of which some is kept, as a mask of one bit each and the kept values' bits.

    Args:
        weight: [rows, columns].
        keep: bool [rows, columns].
        fmt: of what is kept; bfloat16 where there is none.
        scale: as in `encode`; that of what is kept when absent.
    """
    return _sparse(weight, keep, fmt, scale, {"weight_mask": _bits(keep)})


def encode_two_of_four(
    weight: torch.Tensor, keep: torch.Tensor, fmt: Format | None, *, scale: Scale | None = None
) -> Packed:
    """A weight of which two of each four are kept, as a pattern of three bits for each four and the kept values' bits.

    Args:
        weight: [rows, columns].
        keep: bool [rows, columns].
        fmt: of what is kept; bfloat16 where there is none.
        scale: as in `encode_sparse`.

    Raises:
        ValueError: some four have more or fewer that are kept.
    """
    groups = keep.reshape(len(keep), -1, 4)
    if not bool((groups.sum(-1) == 2).all()):
        raise ValueError("not two of each four are kept")
    known = torch.stack([_of_pattern(pair) for pair in PATTERNS])
    codes = (groups[:, :, None] == known).all(-1).int().argmax(-1).view(1, -1)
    return _sparse(weight, keep, fmt, scale, {"weight_patterns": pack_to_int32((codes - 4).to(torch.int8), 3)})


def decode_sparse(packed: Packed, fmt: Format | None) -> torch.Tensor:
    """What `encode_sparse` and `encode_two_of_four` have kept, [rows, columns]."""
    keep = _keep_of(packed)
    if fmt is None:
        found = torch.zeros(packed.shape, dtype=packed.dtype)
        found[keep] = packed.tensors["weight_kept"].to(packed.dtype)
        return found
    kept = unpack_from_int32(packed.tensors["weight_kept"], fmt.element_bits, torch.Size((1, int(keep.sum()))))
    codes = torch.zeros(packed.shape)
    codes[keep] = _number(kept[0], fmt)
    values = fmt.values(fmt.blocks(codes), scale_of(packed, fmt)).view(packed.shape)
    return torch.where(keep, values, 0).to(packed.dtype)


def _sparse(
    weight: torch.Tensor, keep: torch.Tensor, fmt: Format | None, scale: Scale | None, where: dict[str, torch.Tensor]
) -> Packed:
    shape = tuple(weight.shape)
    if fmt is None:
        return Packed({"weight_kept": weight[keep].bfloat16()} | where, shape, weight.dtype)
    scale = scales_of(weight * keep, fmt) if scale is None else scale
    codes = fmt.codes(fmt.blocks(weight), scale).view(shape)
    kept = pack_to_int32(_integer(codes[keep], fmt)[None], fmt.element_bits)
    return Packed({"weight_kept": kept} | where | _scale(scale, fmt, shape), shape, weight.dtype)


def _keep_of(packed: Packed) -> torch.Tensor:
    rows, columns = packed.shape
    if "weight_mask" in packed.tensors:
        bits = packed.tensors["weight_mask"][..., None] >> torch.arange(8, dtype=torch.uint8)
        return (bits & 1).bool().view(rows, -1)[:, :columns]
    codes = unpack_from_int32(packed.tensors["weight_patterns"], 3, torch.Size((1, rows * columns // 4))).long() + 4
    return torch.stack([_of_pattern(pair) for pair in PATTERNS])[codes].view(rows, columns)


def _of_pattern(pair: tuple[int, int]) -> torch.Tensor:
    found = torch.zeros(4, dtype=torch.bool)
    found[list(pair)] = True
    return found


def _bits(keep: torch.Tensor) -> torch.Tensor:
    """Eight of a row in a byte, the first in its lowest bit."""
    padded = torch.nn.functional.pad(keep, (0, -keep.shape[1] % 8)).view(len(keep), -1, 8)
    return (padded.to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)


def _integer(codes: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Codes as integers of the element's bits, int8."""
    match fmt:
        case Float8() | Microscaling(element_bits=8):
            return codes.to(torch.float8_e4m3fn).view(torch.int8)
        case Microscaling() | NvFloat4():
            grid = _positive(fmt)
            number = torch.searchsorted(grid, codes.abs())
            return (number + len(grid) * torch.signbit(codes) - len(grid)).to(torch.int8)
        case _:
            return codes.to(torch.int8)


def _number(codes: torch.Tensor, fmt: Format) -> torch.Tensor:
    """What `_integer` was made of, float32."""
    match fmt:
        case Float8() | Microscaling(element_bits=8):
            return codes.view(torch.float8_e4m3fn).float()
        case Microscaling() | NvFloat4():
            grid = _positive(fmt)
            return torch.cat([grid, -grid])[codes.long() + len(grid)]
        case _:
            return codes.float()


def _positive(fmt: Format) -> torch.Tensor:
    """Elements of a small float that are not negative, ascending."""
    element = E2M3 if fmt.element_bits == 6 else E2M1
    steps = 2**element.mantissa
    low = torch.arange(steps) / steps
    return torch.cat([low, *(2.0**exponent * (1 + low) for exponent in range(3))])
