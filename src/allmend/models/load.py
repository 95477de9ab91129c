"""Load a model with its tokenizer, and say which layers it has without loading it."""

import hashlib
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from allmend.errors import UserError
from allmend.models import modeling_paired  # noqa: F401  # registers the classes of paired models
from allmend.models.cache import remembered_digest
from allmend.models.folder import LAYERS, weight_files
from allmend.models.quiet import quiet
from allmend.models.sources import resolve
from allmend.models.tensors import layout


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        model: in evaluation mode.
        tokenizer: a fast one (offsets can be asked for), with a padding token.
        source: what the user named.
        folder: where it was loaded from.
        digest: `weights_digest(folder)`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    source: str
    folder: Path
    digest: str


def load_model(
    source: str, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        source: as in `sources.resolve`.
        dtype: of the weights; by default bfloat16 on CUDA and float32 elsewhere.
        device: by default CUDA, else MPS, else the CPU.

    Raises:
        UserError: the source cannot be resolved; the architecture is unknown or needs its publisher's code; weights
            do not fit the configuration; the tokenizer has no offsets; the device is not there.
    """
    device = usable_device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    folder = resolve(source)
    tokenizer = load_tokenizer(folder)
    with quiet():
        try:
            model, info = (_packed if (folder / LAYERS).is_file() else _whole)(folder, dtype)
        except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
            raise UserError(f"the model cannot be loaded: {error}", where=folder) from error
    unfit = sorted([*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])])
    if unfit:
        raise UserError(
            f"the weights do not fit config.json: {len(unfit)} tensors are missing or misshapen, first {unfit[0]}",
            where=folder,
            hint="Fetch or copy the folder again; all of its files must be of one model.",
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model only {rows} embeddings",
            where=folder,
            hint="Use the tokenizer that belongs to the model, or call `resize_token_embeddings` and save it.",
        )
    model.eval()
    model.to(device)
    return LoadedModel(model, tokenizer, source, folder, weights_digest(folder))


def _whole(folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A model whose weights are numbers, and what loading it told."""
    auto: Any = AutoModelForCausalLM  # its types do not know that `from_pretrained` may give a pair
    found: tuple[Any, dict[str, Any]] = auto.from_pretrained(
        str(folder),
        dtype=dtype,
        attn_implementation="sdpa",
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        ignore_mismatched_sizes=True,  # they are refused by whoever asked, by name
        output_loading_info=True,
    )
    return found


def _packed(folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A model whose weights are bits in formats of ours or of `compressed-tensors`, taken apart."""
    try:
        from allmend.models.packed_folder import load_packed
    except ModuleNotFoundError as error:
        raise UserError(
            f"weights of this folder are packed, and {error.name} is not installed",
            where=folder,
            hint="pip install 'allmend[compress]'",
        ) from error
    return load_packed(folder, dtype)


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device, once it has been tried; CUDA, else MPS, else the CPU when None.

    Raises:
        UserError: it cannot be used.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the device {str(device)!r} cannot be used: {reason}", hint="Use cpu, cuda or mps.") from error
    return device


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A model folder's tokenizer, which has a padding token.

    Raises:
        UserError: it cannot be read, cannot tell which characters a token stands for, or knows no end token.
    """
    with quiet():
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        # the Rust tokenizer raises bare exceptions for a damaged file
        except Exception as error:
            raise UserError(
                f"the tokenizer cannot be loaded: {error}", where=folder, hint="Fetch or copy its files again."
            ) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer ({type(tokenizer).__name__}) cannot tell which characters a token stands for",
            where=folder,
            hint="A fast tokenizer (tokenizer.json) is needed.",
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has neither a padding nor an end token",
                where=folder,
                hint="Set `pad_token` or `eos_token` in tokenizer_config.json.",
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer  # type: ignore[no-any-return]


def weights_digest(folder: Path) -> str:
    """SHA-256 (hexadecimal) of a model folder's weights: names, types, shapes and bytes, in order of the names.

    How the tensors are spread over files does not matter. The result is remembered in the cache by path, size and
    time of change of the files.

    Raises:
        UserError: a weight file is missing, damaged or cannot be read.
    """
    files = weight_files(folder)
    try:
        return remembered_digest(files, lambda: _digest(files))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", where=folder) from error


def _digest(files: list[Path]) -> str:
    where = {name: (path, span) for path in files for name, span in layout(path).items()}
    digest = hashlib.sha256()
    maps: dict[Path, mmap.mmap] = {}
    try:
        for path in files:
            with path.open("rb") as file:
                maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for name, (path, span) in sorted(where.items()):
            digest.update(f"{len(name)}:{name} {span.dtype} {list(span.shape)}\n".encode())
            with memoryview(maps[path]) as view, view[span.start : span.stop] as part:
                digest.update(part)
    finally:
        for mapped in maps.values():
            mapped.close()
    return digest.hexdigest()


def linear_layers(folder: Path) -> dict[str, tuple[int, int]]:
    """Names and shapes (out, in) of a model's linear layers, from `config.json` alone: no weight is read.

    Raises:
        UserError: the architecture is unknown or needs its publisher's code.
    """
    auto: Any = AutoModelForCausalLM
    with quiet():
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
            with torch.device("meta"):
                model: nn.Module = auto.from_config(config, trust_remote_code=False)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise UserError(f"no model can be built from config.json: {error}", where=folder) from error
    return linear_layers_of(model)


def linear_layers_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Names and shapes (out, in) of all linear layers of `model`, in its order, without the output embedding."""
    get_output: Any = getattr(model, "get_output_embeddings", None)
    output = get_output() if get_output is not None else None
    layers = {}
    for name, module in model.named_modules():
        if module is output:
            continue
        if isinstance(module, nn.Linear):
            layers[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):  # GPT-2's linear layer, which keeps its weight transposed
            layers[name] = (module.weight.shape[1], module.weight.shape[0])
    return layers
