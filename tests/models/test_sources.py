"""What a source of models may be."""

from collections.abc import Callable
from pathlib import Path

import pytest

from allmend.errors import UserError
from allmend.models.sources import resolve

MakeFolder = Callable[..., Path]


@pytest.mark.parametrize("source", ["no/such/folder", "./gone", "/gone/away", "name", "a/gone.gguf", "", "a b/c"])
def test_what_is_nothing_lists_the_forms(source: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(source)
    for form in ("pypi:", "FOLDER", "FILE.gguf", "OWNER/NAME"):
        assert form in str(caught.value)


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"notes\.txt"):
        resolve(str(tmp_path / "notes.txt"))
