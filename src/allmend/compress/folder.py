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

from allmend.compress.layers import Option
from allmend.compress.schemes import has_scheme, quantization_config
from allmend.models.folder import LAYERS, OWN_WEIGHTS
from allmend.models.packed_folder import WEIGHTS, kept_as, write_layers
from allmend.models.packing import Packed
from allmend.models.quiet import quiet
from allmend.models.tensors import os_error
from allmend.run import folder_atomic


def loads_elsewhere(plan: Mapping[str, Option]) -> bool:
    """Whether transformers and vLLM load a folder of these layers without Allmend."""
    return all(option.pattern is None and (option.fmt is None or has_scheme(option.fmt)) for option in plan.values())


def save_folder(out: Path, model: Any, tokenizer: Any, packed: Mapping[str, Packed], plan: Mapping[str, Option]) -> int:
    """Write a folder: one that transformers loads with `compressed-tensors` if that has a layout for all layers.

    What is not packed is kept in bfloat16; tensors that are tied are written once.

    Args:
        out: a folder that is not there yet, or is replaced as a whole.
        model: the model before, of transformers.
        tokenizer: its tokenizer.
        packed: weights of linear layers, by the layers' names.
        plan: what each has become.

    Returns:
        Bytes of the file of weights.

    Raises:
        UserError: the operating system refused; the old folder is as it was.
    """
    tensors = _others(model, set(packed))
    for name, one in packed.items():
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in one.tensors.items()}
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    elsewhere = loads_elsewhere(plan)
    if elsewhere:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        formats = {name: option.fmt for name, option in plan.items() if option.fmt is not None}
        config["quantization_config"] = quantization_config(formats, linear)
    with folder_atomic(out) as folder, quiet():
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        layers = {
            name: kept_as(option.fmt, packed[name].shape, sparse=option.pattern is not None)
            for name, option in plan.items()
        }
        write_layers(folder / LAYERS, layers)
        weights = folder / (WEIGHTS if elsewhere else OWN_WEIGHTS)
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
