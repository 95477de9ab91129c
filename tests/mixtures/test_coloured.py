"""A text token by token: whole, in order, with the gates of the mixture that is asked."""

from pathlib import Path

import pytest
import torch
from tests.mixtures.conftest import NAMES

from allmend import load_model
from allmend.errors import UserError
from allmend.learn.routing import token_gates
from allmend.mixtures import coloured as module
from allmend.mixtures.coloured import coloured
from allmend.models.mixture import mixed
from allmend.run import RunFolder

TEXT = "Wards, naïve Bäume 日本\n  x = 3\n\nend "


def test_pieces_make_up_the_text_and_carry_each_token_s_weight(run: RunFolder, tiny_folder: Path) -> None:
    found = coloured(run.path, TEXT)

    assert [text.title for text in found] == list(NAMES)
    base = load_model(str(tiny_folder), device="cpu")
    ids = torch.tensor(base.tokenizer(TEXT)["input_ids"])
    assert len(ids) > len(TEXT), "some characters are several tokens"
    for text in found:
        assert "".join(piece.text for piece in text.pieces) == TEXT
        assert len(text.pieces) == len(TEXT), "a piece is a character of this tokenizer's"
        with mixed(base, run.arm("comigs") / "members" / text.title / "mixture") as mixture:
            mass = token_gates(mixture, ids)[:, :, 0].mean(0)
        assert text.pieces[0].mass == pytest.approx(float(mass[0]), abs=1e-6)
        place = TEXT.index("日")
        first = len(TEXT[:place].encode())
        assert text.pieces[place].mass == pytest.approx(float(mass[first : first + 3].mean()), abs=1e-6)
        assert text.layer is None
    assert [piece.mass for piece in found[0].pieces] != [piece.mass for piece in found[1].pieces]


def test_one_member_and_one_layer(run: RunFolder, tiny_folder: Path) -> None:
    (text,) = coloured(run.path, TEXT, member="north", layer=1)

    base = load_model(str(tiny_folder), device="cpu")
    ids = torch.tensor(base.tokenizer(TEXT)["input_ids"])
    with mixed(base, run.arm("comigs") / "members" / "north" / "mixture") as mixture:
        assert text.pieces[0].mass == pytest.approx(float(token_gates(mixture, ids)[1, 0, 0]), abs=1e-6)
    assert (text.title, text.layer) == ("north", 1)


def test_a_mixture_s_folder_alone_is_enough(run: RunFolder) -> None:
    folder = run.arm("comigs") / "members" / "north" / "mixture"
    assert coloured(folder, TEXT) == coloured(run.path, TEXT, member="north")


def test_a_long_text_is_read_in_parts_and_cut(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW", 10)
    monkeypatch.setattr(module, "MOST", 25)
    (text,) = coloured(run.path, "abcdefghij" * 3, member="north")
    assert "".join(piece.text for piece in text.pieces) == ("abcdefghij" * 3)[:25]
    assert text.left_out == 5
    masses = [piece.mass for piece in text.pieces]
    assert masses[10:20] == pytest.approx(masses[:10], abs=1e-6), "each part is read as if nothing stood before it"


def test_many_tokens_are_put_together_in_stretches(run: RunFolder) -> None:
    words = "äß日 " * 60
    (text,) = coloured(run.path, words, member="south")
    assert "".join(piece.text for piece in text.pieces) == words
    assert {piece.mass for piece in text.pieces} == {1.0}, "one expert alone has all the weight"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"member": "west"}, r"no client 'west' has a mixture here.*\n.*east, north, south"),
        ({"layer": 2}, r"layer 2 has no experts.*\n.*0 to 1"),
        ({"arm": "alone"}, "'alone' has no mixtures"),
        ({"text": " \n"}, "the text is empty"),
    ],
)
def test_what_cannot_be_shown_is_told(run: RunFolder, options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        coloured(run.path, **({"text": TEXT} | options))  # type: ignore[arg-type]
