"""Text to measure on: a file cut into windows of equal length."""

import gzip
import hashlib
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from allmend.data.files import read_records
from allmend.errors import UserError
from allmend.recipe import Fields

LEAST, FEW = 1024, 8192
"""Tokens of a text to search on: fewer than the first tell nothing, fewer than the second little."""

LETTERS, SPARE = 8, 64
"""Letters that are split at first for each token that is wanted, and tokens at the end of a part that do not count."""

PLAIN = (".txt", ".txt.gz", ".md", ".md.gz")


@dataclass(frozen=True)
class Windows:
    """Stretches of a text that follow one another.

    Attributes:
        ids: int64 [windows, tokens].
        source: the file, or what the text is.
        digest: SHA-256 of the text.
        notes: what to know about it.
    """

    ids: torch.Tensor
    source: str
    digest: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        return self.ids.numel()


def read_text(path: Path) -> str:
    """The text of a file: plain, or all that the records of a data file say.

    Raises:
        UserError: it cannot be read, or is no text.
    """
    if not path.name.lower().endswith(PLAIN):
        records, _ = read_records(str(path), fields=Fields())
        return "\n\n".join(record.text or "\n".join(one.content for one in record.messages) for record in records)
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.name.lower().endswith(".gz") else raw).decode()
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 text: {error.reason} at byte {error.start}"
        raise UserError(what, where=path, hint="Export it again as UTF-8 text.") from None
    except (OSError, EOFError, zlib.error) as error:
        what = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise UserError(what, where=path, hint="Check the path, and copy the file again if it is damaged.") from None


def windows_of(text: str, tokenizer: Any, *, length: int, most: int, source: str, least: int = LEAST) -> Windows:
    """The first windows of a text.

    Args:
        text: any.
        tokenizer: of the model.
        length: tokens of a window.
        most: windows.
        source: what the text is called.
        least: tokens that there must be.

    Raises:
        UserError: the text is too short.
    """
    ids = _first_tokens(text, tokenizer, most * length)
    count = min(most, len(ids) // length)
    if count * length < least or count == 0:
        raise UserError(
            f"the text has {len(ids):,} tokens, and windows of {length} come to {count * length:,}: at least "
            f"{max(least, length):,} are needed",
            where=source,
            hint="Name a longer text, of the kind that the model is for.",
        )
    notes: tuple[str, ...] = ()
    if count * length < FEW:
        notes = (f"{source}: {count * length:,} tokens say little, {FEW:,} or more are better",)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Windows(torch.tensor(ids[: count * length]).view(count, length), source, digest, notes)


def windows_after(text: str, tokenizer: Any, *, after: int, length: int, most: int, source: str) -> Windows:
    """Windows of a text beyond its first tokens, those that a search has used.

    Args:
        text: any.
        tokenizer: of the model.
        after: tokens to leave out.
        length: tokens of a window.
        most: windows.
        source: what the text is called.

    Raises:
        UserError: nothing is left of the text.
    """
    first = math.ceil(after / length)
    found = windows_of(text, tokenizer, length=length, most=first + most, source=source, least=(first + 1) * length)
    return Windows(found.ids[first:], source, found.digest)


def _first_tokens(text: str, tokenizer: Any, wanted: int) -> Sequence[int]:
    """The first tokens of a text, or all if it has fewer; of a long text no more is split than it takes."""
    letters = LETTERS * wanted
    while True:
        ids: Sequence[int] = tokenizer(text[:letters], add_special_tokens=False, verbose=False)["input_ids"]
        # the last tokens of a part may be others than in the whole
        if letters >= len(text) or len(ids) >= wanted + SPARE:
            return ids[:wanted]
        letters *= 2


def check_apart(search: Windows, report: Windows) -> None:
    """See that what is reported is not measured on the text of the search.

    Raises:
        UserError: both are the same text.
    """
    if search.digest == report.digest:
        raise UserError(
            f"the text to report on is that of the search ({search.source})",
            where=report.source,
            hint="Name another one: on its own text every plan looks better than it is.",
        )
