"""A Hugging Face model folder: whether it is complete, from names, sizes and headers alone."""

import json
from pathlib import Path
from typing import Any, cast

from allmend.errors import UserError
from allmend.models.tensors import layout

TOKENIZER_FILES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("spiece.model",),
)
"""Sets of files of which one makes a tokenizer."""


def check_folder(folder: Path) -> None:
    """See that a model folder is complete, from names, sizes and headers alone.

    Raises:
        UserError: a file is missing, truncated or damaged; names it.
    """
    _check_config(folder)
    for path in weight_files(folder):
        layout(path)
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
        expected = "; ".join(" with ".join(names) for names in TOKENIZER_FILES[1:])
        raise UserError(
            "no tokenizer is in this model folder",
            where=folder,
            hint=f"Expected tokenizer.json (or {expected}). `tokenizer.save_pretrained` writes it.",
        )


def _check_config(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                "this is an adapter, not a model",
                where=folder,
                hint="Name its base model (`base_model_name_or_path` in adapter_config.json) as the model.",
            )
        raise UserError("this folder has no config.json, so it is not a model", where=folder, hint=_WHOLE)
    _read_json_object(path)


LAYERS = "packed.json"
"""How each layer's weight is kept, where weights are packed (see `packed_folder`)."""

OWN_WEIGHTS = "packed.safetensors"
"""Weights in bits that transformers does not read."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a model folder's weights, sorted by name.

    Raises:
        UserError: there are none, or a file of the index is missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    for whole in (single, folder / OWN_WEIGHTS):
        if whole.is_file():
            return [whole]
    if index.is_file():
        by_tensor = _read_json_object(index).get("weight_map")
        if not isinstance(by_tensor, dict) or not by_tensor or not all(isinstance(n, str) for n in by_tensor.values()):
            raise UserError("the index names no weight files", where=index, hint="Fetch or copy it again.")
        files = sorted({folder / name for name in by_tensor.values()})
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(files)} weight files are missing: {', '.join(missing[:3])}",
                where=folder,
                hint="Fetch or copy the folder again.",
            )
        return files
    others = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".gguf", ".h5"})
    raise UserError(
        "no weights in safetensors are in this model folder" + (f", only {', '.join(others[:3])}" if others else ""),
        where=folder,
        hint="Expected model.safetensors, or model.safetensors.index.json with its parts. Pickled weights (.bin, .pt) "
        "are not read, because they can run code: convert them with `save_pretrained`. Name a .gguf file itself.",
    )


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read as JSON: {error}", where=path, hint="Fetch or copy it again.") from error
    if not isinstance(value, dict):
        raise UserError("is not a JSON object", where=path, hint="Fetch or copy it again.")
    return cast(dict[str, Any], value)


_WHOLE = "A model folder has config.json, weights in safetensors and a tokenizer."
