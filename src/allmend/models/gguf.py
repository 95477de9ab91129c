"""A GGUF file, converted once to a model folder in float32."""

import contextlib
import errno
import hashlib
import io
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from allmend.errors import UserError
from allmend.models.cache import cached, remembered_digest
from allmend.models.quiet import quiet
from allmend.models.tensors import os_error

log = logging.getLogger(__name__)


def from_gguf(path: Path) -> Path:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise UserError(
                f"is not a GGUF file: it begins with {magic!r} instead of b'GGUF'", where=path, hint=_AGAIN_GGUF
            )
        digest = remembered_digest([path], lambda: _file_sha256(path))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", where=path) from error
    return cached(f"{path.stem}-{digest[:16]}", lambda folder: convert(path, folder, where=str(path)))


_AGAIN_GGUF = "Fetch or copy the file again; if it stays so, use the model in another format."


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert(gguf: Path, folder: Path, *, where: str) -> None:
    """Write model and tokenizer of a GGUF file into `folder`, dequantised to float32."""
    # transformers takes a second to import, and most models need no conversion
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    auto: Any = AutoModelForCausalLM  # its types do not know that `from_pretrained` may give a pair

    log.info("converting %s to safetensors (once)", gguf.name)
    # The older of transformers' two GGUF readers draws a progress bar whatever is set, hence the redirection.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        with _reading(where):
            reader = GGUFReader(gguf)
            scalars = sum(int(tensor.n_elements) for tensor in reader.tensors)
            pre = reader.fields.get("tokenizer.ggml.pre")
            style = str(pre.contents()) if pre is not None else ""
        _check_space(folder, 4 * scalars)
        with _reading(where):
            tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
            loaded, info = auto.from_pretrained(
                str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
            )
        if info["missing_keys"]:
            raise UserError(
                f"{len(info['missing_keys'])} tensors are missing, e.g. {min(info['missing_keys'])}",
                where=where,
                hint=_AGAIN_GGUF,
            )
        _set_pre_tokenizer(tokenizer, style)
        # A model read from GGUF refuses to be saved, as quantised; the same weights in a fresh module do not.
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.random.fork_rng(devices=[]):
            model = auto.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.tie_weights()
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:
            raise os_error(error) from error
        tokenizer.save_pretrained(folder)
    # safetensors keeps its files to their owner; a shared cache is read by others
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    """Turn whatever is raised inside into the user's message: the readers of GGUF check little, so a damaged file
    ends in the error that happens to come first."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(
            f"cannot be read as a GGUF model: {type(error).__name__}: {error}", where=where, hint=_AGAIN_GGUF
        ) from error


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


_DIGITS_APART = frozenset({"smollm", "starcoder"})
"""Values of `tokenizer.ggml.pre` whose tokenizers split numbers into digits before anything else (llama.cpp,
`llama-vocab.cpp`)."""


def _set_pre_tokenizer(tokenizer: Any, style: str) -> None:
    """Split as the model was trained: transformers gives every GGUF byte-pair tokenizer GPT-2's rule.

    The two rules differ where white space stands before a digit.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as Steps

    if style in _DIGITS_APART:
        steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Steps(steps)
