"""Folders of packed weights: which layer is in which format, and the model that they stand for.

`packed.json` says how each layer's weight is kept. A folder whose weights `compressed-tensors` knows has them in
`model.safetensors`, and transformers loads it without this module; any other has them in `packed.safetensors`, so that
nobody loads it by mistake without its weights.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from allmend.errors import UserError
from allmend.models.folder import LAYERS, OWN_WEIGHTS
from allmend.models.formats import GROUPED, Format, Range, format_named
from allmend.models.packing import Packed, decode, decode_sparse
from allmend.models.quiet import quiet

WEIGHTS = "model.safetensors"
"""What transformers reads."""

VERSION = 1
_HINT = "Compress the model again, or copy the folder again."


@dataclass(frozen=True)
class Kept:
    """How a layer's weight is kept.

    Attributes:
        rows, columns: its shape.
        format: a name; empty for bfloat16.
        group: columns with one scale, 0 for a row, where the format leaves it open.
        range: of symmetric integers.
        sparse: whether some of it is left out.
    """

    rows: int
    columns: int
    format: str
    group: int | None = None
    range: Range = "full"
    sparse: bool = False

    @property
    def fmt(self) -> Format | None:
        return format_named(self.format, group=self.group, range=self.range) if self.format else None


def kept_as(fmt: Format | None, shape: tuple[int, ...], *, sparse: bool) -> Kept:
    """The note of a layer."""
    rows, columns = shape
    if fmt is None:
        return Kept(rows, columns, "", sparse=sparse)
    range: Range = "narrow" if getattr(fmt, "narrow", False) else "full"
    group = fmt.block if fmt.name in GROUPED else None
    return Kept(rows, columns, fmt.name, group, range, sparse)


def write_layers(path: Path, layers: Mapping[str, Kept]) -> None:
    """Write `packed.json`."""
    about = {"version": VERSION, "layers": {name: asdict(kept) for name, kept in layers.items()}}
    path.write_text(json.dumps(about, indent=2) + "\n")


def read_layers(folder: Path) -> dict[str, Kept]:
    """What a folder says of its layers.

    Raises:
        UserError: the file cannot be read, or is of a later version.
    """
    path = folder / LAYERS
    try:
        about = json.loads(path.read_bytes())
        if about["version"] > VERSION:
            raise UserError("is of a later version of Allmend", where=path, hint="Install that version.")
        layers = {str(name): Kept(**kept) for name, kept in about["layers"].items()}
        for kept in layers.values():
            _ = kept.fmt
        return layers
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot be read: {error}", where=path, hint=_HINT) from error


def weights_of(folder: Path) -> Path:
    """The file of a packed folder's weights."""
    own = folder / OWN_WEIGHTS
    return own if own.is_file() else folder / WEIGHTS


def parts_of(folder: Path) -> Iterator[tuple[str, Kept | None, dict[str, torch.Tensor]]]:
    """All that a packed folder holds: tensors that are as they are, by name, then each layer's bits.

    Raises:
        UserError: the file is damaged, or a layer is missing.
    """
    layers, path = read_layers(folder), weights_of(folder)
    try:
        with safe_open(path, framework="pt") as file:
            names: dict[str, list[str]] = {name: [] for name in layers}
            for name in file.keys():  # noqa: SIM118 - no dictionary
                layer, _, part = name.rpartition(".")
                if layer in layers and part.startswith("weight"):
                    names[layer].append(part)
                else:
                    yield name, None, {"": file.get_tensor(name)}
            for layer, kept in layers.items():
                if not names[layer]:
                    raise UserError(f"has no weight for {layer}", where=path, hint=_HINT)
                yield layer, kept, {part: file.get_tensor(f"{layer}.{part}") for part in names[layer]}
    except (OSError, SafetensorError) as error:
        raise UserError(f"is damaged: {error}", where=path, hint=_HINT) from error


def unpacked(folder: Path, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a packed folder, weights as what their bits stand for.

    Raises:
        UserError: as `parts_of`, or a layer's bits are not those that its note says.
    """
    for name, kept, tensors in parts_of(folder):
        if kept is None:
            yield name, tensors[""].to(dtype)
            continue
        try:
            yield f"{name}.weight", _weight(tensors, kept, dtype)
        except (KeyError, RuntimeError, IndexError, ValueError, TypeError) as error:
            what = f"the bits of {name} are not what {LAYERS} says: {error}"
            raise UserError(what, where=weights_of(folder), hint=_HINT) from error


def _weight(tensors: dict[str, torch.Tensor], kept: Kept, dtype: torch.dtype) -> torch.Tensor:
    packed, fmt = Packed(tensors, (kept.rows, kept.columns), dtype), kept.fmt
    if kept.sparse:
        return decode_sparse(packed, fmt)
    return tensors["weight"].to(dtype) if fmt is None else decode(packed, fmt)


def load_packed(folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The model that a packed folder stands for, its weights taken apart, and what loading it told.

    Raises:
        UserError: as `unpacked`.
    """
    auto: Any = AutoModelForCausalLM
    with quiet():
        config: Any = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            kind: Any = type(auto.from_config(config, trust_remote_code=False))
        found, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(unpacked(folder, dtype)),
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    found.name_or_path = str(folder)
    return found, info
