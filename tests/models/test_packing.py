"""Bits: against compressed-tensors, which has to load them, and there and back."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from allmend.compress.masks import NofM, Unstructured, keep_mask
from allmend.compress.sweep import prune_and_quantize
from allmend.models.formats import FORMATS, Format, Scale, format_named, quantize, scales_of
from allmend.models.packing import (
    PATTERNS,
    Packed,
    decode,
    decode_sparse,
    encode,
    encode_sparse,
    encode_two_of_four,
)

EVERY = [
    *(format_named(name) for name in FORMATS),
    *(format_named(name, group=32) for name in ("int8", "int6", "int4", "int3", "int4_affine")),
    format_named("int4", range="narrow"),
]
THEIRS = {
    "int8": "W8A8",
    "int6": "W6A16",
    "int4": "W4A16",
    "int3": "W3A16",
    "int4_affine": "W4A16_ASYM",
    "fp8": "FP8_DYNAMIC",
    "mxfp8": "MXFP8A16",
    "mxfp6": "MXFP6A16",
    "mxfp4": "MXFP4A16",
    "nvfp4": "NVFP4A16",
}


def described(fmt: Format) -> str:
    return f"{fmt.name}-{fmt.block}{'-narrow' if getattr(fmt, 'narrow', False) else ''}"


def random(rows: int, columns: int, seed: int = 0, dtype: Any = torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("fmt", EVERY, ids=described)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_stand_for_what_is_simulated(fmt: Format, dtype: torch.dtype) -> None:
    for seed, scale in enumerate((1e-3, 1.0, 200.0)):
        weight = (random(10, 192, seed=seed) * scale).to(dtype)
        weight[3] = 0
        packed = encode(weight, fmt)
        assert torch.equal(decode(packed, fmt), quantize(weight, fmt))
        expected = round(fmt.bits(192) * weight.numel() / 8, 6)
        extra = 4 if fmt.name == "nvfp4" else 0
        room = 4 * 2 * (192 // (fmt.block or 192)) if fmt.name == "int4_affine" else 0  # zero points fill up words
        assert expected <= packed.bytes - extra <= expected + room


def theirs(fmt: Format) -> QuantizationScheme:
    scheme = preset_name_to_scheme(THEIRS[fmt.name], ["Linear"])
    weights = scheme.weights
    assert isinstance(weights, QuantizationArgs)
    if fmt.name in ("int3", "int4", "int6", "int4_affine"):
        weights.group_size = fmt.block
    return scheme


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("seed", range(3))
def test_compressed_tensors_makes_the_same_bits_and_reads_ours(name: str, seed: int) -> None:
    fmt = format_named(name)
    weight = random(16, 128, seed=seed).bfloat16().float()
    scheme = theirs(fmt)
    kind = BaseCompressor.get_value_from_registry(infer_module_format(torch.nn.Linear, scheme).value)
    blocks = fmt.blocks(weight)
    low, high = blocks.amin(-1), blocks.amax(-1)
    whole = generate_gparam(weight.min(), weight.max()) if name == "nvfp4" else None
    step, zero = calculate_qparams(low, high, scheme.weights, global_scale=whole)
    if name in ("int3", "int4", "int6", "int4_affine", "int8", "fp8"):
        step = step.bfloat16().float()  # as it is kept
        if name == "int4_affine":
            zero = (-8 - low.clamp_max(0) / step).round().clamp(-8, 7).to(torch.int8)
    own = {"weight": weight, "weight_scale": step, "weight_zero_point": zero.to(torch.int8)}
    made = kind.compress(own | ({"weight_global_scale": whole} if whole is not None else {}), scheme)

    ours = encode(weight, fmt).tensors

    assert made.keys() == ours.keys()
    for key, tensor in ours.items():
        found = made[key].to(tensor.dtype)
        if tensor.dtype == torch.float8_e4m3fn:
            found, tensor = found.view(torch.uint8), tensor.view(torch.uint8)
        assert torch.equal(found, tensor), key
    wide = {key: t.float() if key == "weight_scale" and t.dtype == torch.bfloat16 else t for key, t in ours.items()}
    read = kind.decompress(dict(wide), scheme)["weight"].float()
    exact = decode(encode(weight, fmt), fmt)
    # theirs multiplies in bfloat16 where a scale is eight bits
    rough = name in ("mxfp6", "mxfp4", "nvfp4", "mxfp8")
    assert torch.allclose(read, exact, rtol=2**-8 if rough else 1e-6, atol=0)


@pytest.mark.parametrize("fmt", EVERY, ids=described)
@pytest.mark.parametrize("share", [0.5, 0.3, 0.99])
def test_a_mask_and_what_it_keeps(fmt: Format, share: float) -> None:
    weight = random(7, 192, seed=2)
    keep = keep_mask(weight.abs(), Unstructured(share))
    packed = encode_sparse(weight, keep, fmt)
    found = decode_sparse(packed, fmt)
    assert torch.equal(found, quantize(weight * keep, fmt))
    assert not found[~keep].any()
    bits = weight.numel() + fmt.element_bits * int(keep.sum())
    assert bits / 8 <= packed.tensors["weight_mask"].nbytes + packed.tensors["weight_kept"].nbytes <= bits / 8 + 4


@pytest.mark.parametrize("columns", [32, 64])
def test_a_mask_of_any_width(columns: int) -> None:
    fmt = format_named("int8")
    weight = random(5, columns + 3, seed=5)
    keep = keep_mask(weight.abs(), Unstructured(0.4))
    assert torch.equal(decode_sparse(encode_sparse(weight, keep, fmt), fmt), quantize(weight * keep, fmt))


@pytest.mark.parametrize("fmt", EVERY, ids=described)
def test_two_of_four(fmt: Format) -> None:
    weight = random(7, 192, seed=3)
    keep = keep_mask(weight.abs(), NofM(2, 4))
    assert len({tuple(group.nonzero()[:, 0].tolist()) for group in keep.view(-1, 4)}) == len(PATTERNS)
    packed = encode_two_of_four(weight, keep, fmt)
    assert torch.equal(decode_sparse(packed, fmt), quantize(weight * keep, fmt))
    bits = 3 * weight.numel() / 4 + fmt.element_bits * weight.numel() / 2
    assert packed.tensors["weight_patterns"].nbytes + packed.tensors["weight_kept"].nbytes <= bits / 8 + 8


def test_three_of_four_are_refused() -> None:
    keep = torch.ones(2, 64, dtype=torch.bool)
    with pytest.raises(ValueError, match="not two of each four"):
        encode_two_of_four(random(2, 64), keep, format_named("int4"))


@pytest.mark.parametrize("fmt", EVERY, ids=described)
def test_what_a_sweep_makes_is_packed_with_its_own_scales(fmt: Format) -> None:
    weight, x = random(6, 128), random(400, 128, seed=1)
    dense = prune_and_quantize(weight, x.T @ x, None, fmt)
    assert torch.equal(decode(encode(dense.weight, fmt, scale=dense.scale), fmt), dense.weight)
    sparse = prune_and_quantize(weight, x.T @ x, NofM(2, 4), fmt)
    packed = encode_two_of_four(sparse.weight, sparse.keep, fmt, scale=sparse.scale)
    assert torch.equal(decode_sparse(packed, fmt), sparse.weight)


def test_scales_that_are_given_are_kept() -> None:
    fmt, weight = format_named("int4", group=32), random(4, 64)
    scale = replace(scales_of(weight, fmt), step=scales_of(weight, fmt).step * 2)
    packed: Packed = encode(weight, fmt, scale=scale)
    assert torch.equal(packed.tensors["weight_scale"].float()[..., None], scale.step)
    assert torch.equal(decode(packed, fmt), fmt.values(fmt.codes(fmt.blocks(weight), scale), scale).view(4, 64))
    assert isinstance(scale, Scale)
