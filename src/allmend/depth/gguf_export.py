"""A paired model as a GGUF file, which llama.cpp runs, and what is built on it.

Llama.cpp's architecture `deci` has Llama's block, with numbers of heads, key-value heads and neurons for each layer,
and so holds layers of different widths as they are.

Source: llama.cpp, its conversion of Deci (names, order of the rows of queries and keys), `src/models/deci.cpp` (the
block).
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from allmend.depth.architectures import kinds_of
from allmend.depth.gguf_vocabulary import add_vocabulary, read_vocabulary
from allmend.errors import UserError
from allmend.models.folder import check_folder, weight_files
from allmend.models.quiet import quiet
from allmend.models.tensors import layout
from allmend.run import fault

Kind = Literal["float16", "float32"]
"""Of matrices; vectors are always float32."""

EXPORTED = {"paired_llama": "Llama", "paired_mistral": "Mistral", "paired_qwen2": "Qwen2"}
"""Paired architectures with Llama's block."""

ROTATIONS = ("default", "linear", "llama3")
"""Kinds of rotary positions that are frequencies and nothing else."""


def export_gguf(folder: Path, out: Path, *, kind: Kind = "float16") -> None:
    """Write a paired model's folder as a GGUF file of the architecture `deci`, with its tokenizer and chat template.

    One tensor at a time is in memory.

    Args:
        folder: as `apply.save_paired` writes it.
        out: a file that is not there yet.
        kind: of the matrices.

    Raises:
        UserError: the folder is damaged, or holds no paired model; llama.cpp cannot compute the model, or cannot split
            text as its tokenizer does; `out` is there already; the operating system refused, and nothing is left.
    """
    from gguf import GGUFWriter, LlamaFileType  # takes a moment to import, and little else needs it

    check_folder(folder)
    config = _config(folder)
    vocabulary = read_vocabulary(folder, config.vocab_size)
    factors = _rope_factors(config)
    tensors = _tensors(folder, config)
    if out.exists():
        raise UserError("there is a file here already", where=out, hint="Choose another with --out.")
    with _file_atomic(out) as beside, contextlib.closing(GGUFWriter(beside, "deci")) as writer:
        writer.add_type("model")
        writer.add_name(folder.resolve().name)
        writer.add_file_type(LlamaFileType.ALL_F32 if kind == "float32" else LlamaFileType.MOSTLY_F16)
        _add_sizes(writer, config)
        add_vocabulary(writer, vocabulary)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        for tensor in tensors:
            numbers = np.dtype(kind if len(tensor.shape) > 1 else "float32")
            size = int(np.prod(tensor.shape)) * numbers.itemsize
            writer.add_tensor_info(tensor.name, tensor.shape, numbers, size)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for tensor in tensors:
            writer.write_tensor_data(_read(tensor, kind))


@contextlib.contextmanager
def _file_atomic(path: Path) -> Iterator[Path]:
    """A file to write, which becomes `path` at the end as a whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        # numpy names no reason when not all of an array could be written, and there is only one
        raise fault(error if error.errno else OSError(errno.ENOSPC, str(error)), path) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def _config(folder: Path) -> Any:
    """The model's configuration, once it is sure that llama.cpp computes what it says."""
    with quiet():
        try:
            config: Any = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"no model can be built from config.json: {error}", where=folder) from error
    known = f"Paired models of {', '.join(EXPORTED.values())} can be exported."
    if getattr(config, "layer_widths", None) is None:
        raise UserError(
            "no layers run side by side in this model",
            where=folder,
            hint="`allmend depth apply` makes such a model; for others there is llama.cpp's `convert_hf_to_gguf.py`.",
        )
    if config.model_type not in EXPORTED:
        raise UserError(
            f"layers of {config.model_type.removeprefix('paired_')} with different widths are not known to llama.cpp",
            where=folder,
            hint=known,
        )
    if wrong := _strange(config):
        raise UserError(f"the model has {wrong}, and llama.cpp's `deci` has not", where=folder, hint=known)
    return config


def _strange(config: Any) -> str | None:
    """What a model has that is not in `deci`."""
    rotary = config.rope_parameters
    windows = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    if windows or set(kinds_of(config, config.num_hidden_layers)) != {"full_attention"}:
        return "layers that see a window of tokens"
    if config.hidden_act != "silu":
        return f"the activation {config.hidden_act}"
    if rotary.get("rope_type", "default") not in ROTATIONS:
        return f"rotary positions of the kind {rotary['rope_type']}"
    if rotary.get("partial_rotary_factor", 1.0) != 1.0:
        return "heads that are rotated in part"
    return None


def _head_size(config: Any) -> int:
    found: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return found


def _add_sizes(writer: Any, config: Any) -> None:
    widths, size = config.layer_widths, _head_size(config)
    writer.add_block_count(len(widths))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length([width * config.intermediate_size for width in widths])
    writer.add_head_count([width * config.num_attention_heads for width in widths])
    writer.add_head_count_kv([width * config.num_key_value_heads for width in widths])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(size)
    writer.add_vocab_size(config.vocab_size)


def _rope_factors(config: Any) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """What llama.cpp divides the plain frequencies by, [head size / 2]; None where that is 1."""
    kind = config.rope_parameters.get("rope_type", "default")
    if kind == "default":
        return None
    size = _head_size(config)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    found, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    factors: np.ndarray[Any, np.dtype[np.float32]] = (plain / found.double()).float().numpy()
    return factors


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the folder.

    Attributes:
        path: its file.
        source: its name there.
        name: its name in GGUF.
        shape: its shape.
        heads: of queries or keys, whose rows llama.cpp has in another order; 0 for all else.
    """

    path: Path
    source: str
    name: str
    shape: tuple[int, ...]
    heads: int


def _tensors(folder: Path, config: Any) -> list[_Tensor]:
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.DECI, len(config.layer_widths))
    found = []
    for path in weight_files(folder):
        for source, span in layout(path).items():
            name = names.get_name(source, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise UserError(f"has the tensor {source}, which has no place in llama.cpp's `deci`", where=path)
            heads = 0
            if source.split(".")[-2] in ("q_proj", "k_proj"):
                each = config.num_attention_heads if "q_proj" in source else config.num_key_value_heads
                heads = each * config.layer_widths[int(source.split(".")[2])]
            found.append(_Tensor(path, source, name, span.shape, heads))
    return found


def _read(tensor: _Tensor, kind: Kind) -> np.ndarray[Any, Any]:
    with safe_open(tensor.path, "pt") as file:
        values: torch.Tensor = file.get_tensor(tensor.source)
    if tensor.heads:
        values = interleaved(values, tensor.heads)
    found = values.to(getattr(torch, kind) if values.ndim > 1 else torch.float32)
    if found.isinf().any() and not values.isinf().any():
        raise UserError(
            f"{tensor.source} has values up to {values.abs().max():.3g}, and {kind} ends at "
            f"{torch.finfo(found.dtype).max:.3g}",
            where=tensor.path,
            hint="Export in float32.",
        )
    return found.contiguous().numpy()


def interleaved(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys in the order in which llama.cpp rotates them.

    Transformers rotates row i of a head with row i + size / 2, llama.cpp row 2 i with row 2 i + 1.

    Args:
        values: [heads × size] or [heads × size, width].
        heads: of the layer.
    """
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.transpose(1, 2).reshape(values.shape)
