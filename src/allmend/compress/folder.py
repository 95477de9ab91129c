"""A compressed model's folder: packed weights, and what they load with."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from allmend.compress.schemes import quantization_config
from allmend.models.formats import Format
from allmend.models.packing import Packed
from allmend.models.quiet import quiet
from allmend.models.tensors import os_error
from allmend.run import folder_atomic


def save_folder(
    out: Path, model: Any, tokenizer: Any, packed: Mapping[str, Packed], formats: Mapping[str, Format]
) -> int:
    """Write a folder that transformers loads with `compressed-tensors`.

    What is not packed is kept in bfloat16; tensors that are tied are written once.

    Args:
        out: a folder that is not there yet, or is replaced as a whole.
        model: the model before, of transformers.
        tokenizer: its tokenizer.
        packed: weights of linear layers, by the layers' names.
        formats: of each.

    Returns:
        Bytes of the file of weights.

    Raises:
        UserError: the operating system refused; the old folder is as it was.
    """
    tensors = _others(model, set(packed))
    for name, one in packed.items():
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in one.tensors.items()}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    with folder_atomic(out) as folder, quiet():
        config = model.config.to_dict() | {
            "architectures": [type(model).__name__],
            "dtype": "bfloat16",
            "quantization_config": quantization_config(formats, linear),
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        weights = folder / "model.safetensors"
        try:
            save_file(tensors, weights, metadata={"format": "pt"})
        except SafetensorError as error:
            raise os_error(error) from error
        shutil.copymode(folder / "config.json", weights)  # safetensors keeps its files to their owner
        return weights.stat().st_size


def _others(model: Any, packed: set[str]) -> dict[str, torch.Tensor]:
    """All parameters that are not packed, in half precision, each once."""
    tied = set(model.all_tied_weights_keys) if hasattr(model, "all_tied_weights_keys") else set()
    found = {}
    for name, tensor in model.state_dict().items():
        layer, _, part = name.rpartition(".")
        if (layer in packed and part == "weight") or name in tied:
            continue
        found[name] = tensor.to("cpu", torch.bfloat16 if tensor.is_floating_point() else tensor.dtype).contiguous()
    return found
