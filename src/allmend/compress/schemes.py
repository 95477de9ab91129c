"""What a folder's `config.json` says of its weights, in the words of `compressed-tensors`."""

import re
from collections.abc import Mapping
from typing import Any

from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

from allmend.models.formats import AffineIntegers, Float8, Format, Integers, Microscaling, NvFloat4


def has_scheme(fmt: Format) -> bool:
    """Whether `compressed-tensors` has a layout for dense weights of a format."""
    return isinstance(fmt, Integers | AffineIntegers | Float8 | Microscaling | NvFloat4)


def scheme_of(fmt: Format, targets: list[str]) -> QuantizationScheme:
    """How weights of a format are kept; activations stay as they are.

    Raises:
        ValueError: there is no layout for them.
    """
    match fmt:
        case Integers() | AffineIntegers():
            weights = QuantizationArgs(
                num_bits=fmt.element_bits,
                type="int",
                symmetric=isinstance(fmt, Integers),
                strategy="group" if fmt.block else "channel",
                group_size=fmt.block or None,
            )
            whole = fmt.element_bits == 8 and not fmt.block
            kind = CompressionFormat.int_quantized if whole else CompressionFormat.pack_quantized
        case Float8():
            weights = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel")
            kind = CompressionFormat.float_quantized
        case Microscaling() | NvFloat4():
            preset = preset_name_to_scheme(f"{fmt.name.upper()}A16", targets)
            assert preset.weights is not None
            weights, kind = preset.weights, _SMALL[fmt.name]
        case _:
            raise ValueError(f"{fmt.name} has no layout in compressed-tensors")
    return QuantizationScheme(targets=targets, weights=weights, format=kind.value)


_SMALL = {
    "mxfp8": CompressionFormat.mxfp8_quantized,
    "mxfp6": CompressionFormat.mxfp6_pack_quantized,
    "mxfp4": CompressionFormat.mxfp4_pack_quantized,
    "nvfp4": CompressionFormat.nvfp4_pack_quantized,
}


def quantization_config(formats: Mapping[str, Format], linear: list[str]) -> dict[str, Any]:
    """The `quantization_config` of a folder.

    Args:
        formats: of each quantized layer, by name.
        linear: names of all linear layers, the output embedding's among them.

    Raises:
        ValueError: a format without a layout.
    """
    groups: dict[Format, list[str]] = {}
    for name, fmt in formats.items():
        groups.setdefault(fmt, []).append(name)
    whole = len(groups) == 1
    schemes = {
        f"group_{number}": scheme_of(fmt, ["Linear"] if whole else [f"re:^{re.escape(name)}$" for name in names])
        for number, (fmt, names) in enumerate(groups.items())
    }
    kinds = {str(scheme.format) for scheme in schemes.values()}
    config = QuantizationConfig(
        config_groups=dict(schemes),
        format=kinds.pop() if len(kinds) == 1 else CompressionFormat.mixed_precision.value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[name for name in linear if name not in formats],
    )
    found: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    if any(isinstance(fmt, AffineIntegers) for fmt in groups):
        # transformers 5.23 makes room for zero points of another shape unless it takes the weights apart at once
        found["dequantize"] = True
    return found
