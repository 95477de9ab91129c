import gzip
from pathlib import Path
from typing import Any

import pytest

from allmend.data.windows import check_apart, read_text, windows_after, windows_of
from allmend.errors import UserError


def test_windows_follow_one_another(tiny_tokenizer: Any) -> None:
    text = "".join(chr(97 + place % 26) for place in range(1300))

    found = windows_of(text, tiny_tokenizer, length=100, most=50, source="a text")

    assert found.ids.shape == (13, 100)
    assert tiny_tokenizer.decode(found.ids.flatten()) == text
    assert "1,300 tokens say little" in found.notes[0]
    assert windows_of(text, tiny_tokenizer, length=256, most=4, source="").ids.shape == (4, 256)


def test_enough_text_is_not_noted(tiny_tokenizer: Any) -> None:
    assert windows_of("x" * 9000, tiny_tokenizer, length=512, most=16, source="").notes == ()


@pytest.mark.parametrize(("letters", "length"), [(0, 256), (1000, 256), (1500, 2048)])
def test_too_short_a_text(tiny_tokenizer: Any, letters: int, length: int) -> None:
    with pytest.raises(UserError, match=r"(?s)some\.txt: .*at least .*longer text"):
        windows_of("x" * letters, tiny_tokenizer, length=length, most=9, source="some.txt")


def test_both_texts_the_same(tiny_tokenizer: Any) -> None:
    one, other, third = (
        windows_of(text * 1100, tiny_tokenizer, length=256, most=4, source=text) for text in ("x", "x", "y")
    )

    with pytest.raises(UserError, match="search"):
        check_apart(one, other)
    check_apart(one, third)


def test_text_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("grün")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("grün".encode()))
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "one", "response": "two"}\n')

    assert read_text(tmp_path / "a.txt") == read_text(tmp_path / "a.txt.gz") == "grün"
    assert read_text(tmp_path / "a.jsonl") == "one\n\ntwo"
    assert read_text(tmp_path / "b.jsonl") == "one\ntwo"


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b.txt.gz").write_bytes(b"no gzip")
    for name, words in (("a.txt", "UTF-8"), ("b.txt.gz", "cannot be read"), ("none.txt", "No such file")):
        with pytest.raises(UserError, match=rf"{name}: .*{words}"):
            read_text(tmp_path / name)


@pytest.mark.parametrize("unit", ["word ", "ß€𝄞", "x" * 40 + " "])
def test_of_a_long_text_no_more_is_split_than_it_takes(tiny_tokenizer: Any, unit: str) -> None:
    text, seen = unit * 20_000, list[int]()

    def counting(some: str, **named: Any) -> Any:
        seen.append(len(some))
        return tiny_tokenizer(some, **named)

    found = windows_of(text, counting, length=128, most=8, source="")

    whole = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found.ids.flatten().tolist() == whole[:1024]
    assert max(seen) < len(text) / 2


def test_windows_after_a_search_do_not_touch_its_own(tiny_tokenizer: Any) -> None:
    words = "".join(chr(ord("a") + place % 26) for place in range(100))
    ids = tiny_tokenizer(words)["input_ids"]

    found = windows_after(words, tiny_tokenizer, after=25, length=10, most=4, source="words")

    assert found.ids.flatten().tolist() == ids[30:70]
    assert len(windows_after(words, tiny_tokenizer, after=25, length=10, most=100, source="words")) == 7
    with pytest.raises(UserError, match="words: the text has 100 tokens"):
        windows_after(words, tiny_tokenizer, after=95, length=10, most=4, source="words")
