"""Named tensors with JSON metadata, as bytes or a file: the form of every message and checkpoint.

The bytes are a safetensors file whose metadata holds one JSON object under the key `allmend`. Nothing is pickled, so
reading bytes of a stranger runs no code of theirs. Equal content gives equal bytes. This file knows the format alone,
not what the tensors mean.
"""

import cmath
import errno
import io
import json
import math
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from allmend.errors import UserError
from allmend.run import write_atomic

Tensors: TypeAlias = dict[str, torch.Tensor]
"""Tensors by name."""

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
"""What can be written as JSON."""

KEY = "allmend"
"""Where the JSON object stands in the metadata of the file."""

LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library itself."""

_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
}


def nbytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of the tensors' values, without names and metadata."""
    return sum(tensor.nbytes for tensor in tensors.values())


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # one that is not shows in the sum, which costs a fraction of looking at each; finite ones can add up to infinity
    return cmath.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def dump(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, JSON]) -> bytes:
    """Safetensors bytes of `tensors` (any device and shape) with `metadata`.

    Raises:
        ValueError: `metadata` cannot be JSON (a NaN, an object of another type).
    """
    text = json.dumps(metadata, allow_nan=False, sort_keys=True, ensure_ascii=False)
    return save_safetensors(_apart(tensors), metadata={KEY: text})


def parse(data: bytes, *, where: str | Path = "message") -> tuple[Tensors, dict[str, Any]]:
    """Tensors (CPU, own memory) and metadata of `dump`'s bytes; the metadata is empty where there is none.

    Args:
        data: the whole file.
        where: what the bytes are, for the error message.

    Raises:
        UserError: the bytes are truncated, have a tail, or are not such a file.
    """
    header = _header(io.BytesIO(data), len(data), where)
    _spans(header, len(data), where)
    try:
        tensors = load_safetensors(data)
        metadata = json.loads(header.fields.get("__metadata__", {}).get(KEY, "{}"))
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"does not hold named tensors: {error}", where=where) from error
    if not isinstance(metadata, dict):
        raise UserError("the metadata is not a JSON object", where=where)
    return tensors, metadata


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, JSON]) -> None:
    """Write `dump`'s bytes to `path`, whole or not at all.

    Raises:
        UserError: the operating system refused (no space, no permission); the old file is untouched.
        ValueError: `metadata` cannot be JSON.
    """
    write_atomic(path, dump(tensors, metadata))


def read_tensors(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and metadata that `write_tensors` wrote.

    Raises:
        UserError: the file cannot be read, or `parse` refuses its bytes.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", where=path) from error
    return parse(data, where=path)


def read_some(path: Path, names: Collection[str]) -> tuple[Tensors, dict[str, Any]]:
    """Those tensors of `read_tensors` that have these names, and the metadata; no other tensor is read.

    Raises:
        UserError: the file cannot be read, or is not such a file.
    """
    there = layout(path).keys() & set(names)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(there)}
            metadata = json.loads((file.metadata() or {}).get(KEY, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"does not hold named tensors: {error}", where=path) from error
    return tensors, metadata


@dataclass(frozen=True, slots=True)
class Span:
    """Where one tensor lies in a safetensors file: its bytes are `[start, stop)` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def layout(path: Path) -> dict[str, Span]:
    """The tensors of a safetensors file by name, from its header alone: no weight is read.

    Raises:
        UserError: the file is truncated or damaged; the message compares its size with what the header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = _header(file, size, path)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", where=path) from error
    return _spans(header, size, path)


@dataclass(frozen=True, slots=True)
class _Header:
    fields: dict[str, Any]
    end: int
    """Where the tensors' bytes begin in the file."""


def _header(file: IO[bytes], size: int, where: str | Path) -> _Header:
    head = file.read(8)
    if len(head) < 8:
        raise UserError(f"has {size} bytes; a safetensors file has at least 8", where=where, hint=_AGAIN)
    (length,) = struct.unpack("<Q", head)
    if length > LARGEST_HEADER or 8 + length > size:
        raise UserError(
            f"is truncated or not a safetensors file: it has {size} bytes, and its header claims to be {length} long",
            where=where,
            hint=_AGAIN,
        )
    try:
        fields = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise UserError(f"the safetensors header is not JSON: {error}", where=where, hint=_AGAIN) from error
    if not isinstance(fields, dict):
        raise UserError("the safetensors header is not a JSON object", where=where, hint=_AGAIN)
    return _Header(fields, 8 + length)


def _spans(header: _Header, size: int, where: str | Path) -> dict[str, Span]:
    spans = {}
    for name, field in header.fields.items():
        if name == "__metadata__":
            continue
        try:
            first, last = field["data_offsets"]
            span = Span(str(field["dtype"]), tuple(field["shape"]), header.end + first, header.end + last)
            bits = _BITS.get(span.dtype)
            fits = bits is None or (last - first) * 8 == math.prod(span.shape) * bits
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"the header's entry for {name!r} is damaged: {error}", where=where, hint=_AGAIN) from error
        if not 0 <= first <= last or not fits:
            raise UserError(
                f"the header gives {name!r} ({span.dtype}, shape {list(span.shape)}) the bytes {first} to {last}",
                where=where,
                hint=_AGAIN,
            )
        spans[name] = span
    end = header.end
    for span in sorted(spans.values(), key=lambda span: (span.start, span.stop)):
        if span.start != end:
            raise UserError("the header leaves gaps between tensors or lets them overlap", where=where, hint=_AGAIN)
        end = span.stop
    if end != size:
        state = "is truncated" if size < end else "has bytes after its end"
        raise UserError(f"{state}: it has {size} bytes, and its header describes {end}", where=where, hint=_AGAIN)
    return spans


def os_error(error: SafetensorError) -> OSError:
    """The error of the operating system that safetensors wraps (a full disk, say); EIO where it names none."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]) if number else errno.EIO, str(error))


_AGAIN = "Fetch or copy it again."


def _apart(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors on the CPU, contiguous, no two in the same memory (safetensors refuses that)."""
    apart: Tensors = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        if memory in seen:
            tensor = tensor.clone()
        seen.add(memory)
        apart[name] = tensor
    return apart
