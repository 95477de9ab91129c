"""A text with every token coloured by the weight of a mixture's generalists on it: as a page and as a picture."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from allmend import __version__
from allmend.report import numbers
from allmend.report.frame import WIDTH, svg
from allmend.report.heat_map import Shades, scale
from allmend.report.markup import Html, join, paragraph, section, tag
from allmend.report.page import fill, head_of
from allmend.report.picture import picture
from allmend.report.sections.routing import EVEN, ends_of_scale, weight
from allmend.run import write_atomic

ADVANCE = 7.23
"""Width of a letter in the pictures' 12 px type, in which all are equally wide (px)."""
LINE = 20.0
"""Height of a line (px)."""


@dataclass(frozen=True)
class Piece:
    """A token as text, or tokens that hold one character together.

    Attributes:
        text: as it stands in the whole, white space included.
        mass: weight of the generalists, in [0, 1].
    """

    text: str
    mass: float


@dataclass(frozen=True)
class RoutedText:
    """A text as one mixture reads it.

    Attributes:
        title: what it is called; the member's name where there are several.
        layer: number of the decoder's layer whose weights are shown; the mean over layers when None.
        pieces: of the text, in order.
        left_out: tokens at its end that were not read.
    """

    title: str
    layer: int | None
    pieces: tuple[Piece, ...]
    left_out: int = 0

    @property
    def mean(self) -> float:
        """Mean weight over pieces."""
        return sum(piece.mass for piece in self.pieces) / max(1, len(self.pieces))


def in_words(text: RoutedText) -> str:
    """What is shown, in sentences."""
    where = "mean over layers" if text.layer is None else f"layer {text.layer}"
    masses = [piece.mass for piece in text.pieces]
    words = (
        f"Weight of the generalists ({where}): {weight(text.mean)} on average, from "
        f"{weight(min(masses, default=0.0))} to {weight(max(masses, default=0.0))}."
    )
    return f"{words} The last {numbers.counted(text.left_out, 'token')} are left out." if text.left_out else words


def shades_of(texts: Sequence[RoutedText]) -> Shades:
    """One scale for texts that stand together, the same on either side of an even weight."""
    low, high = ends_of_scale(piece.mass for text in texts for piece in text.pieces)
    return Shades(low, high, EVEN)


def text_block(text: RoutedText, colours: Shades) -> Html:
    """The text as running text, each token on its colour, with its weight for whoever points at it."""
    spans = [
        tag(
            "span",
            piece.text,
            class_=colours.css(piece.mass),
            style=colours.style(piece.mass),
            title=weight(piece.mass),
        )
        for piece in text.pieces
    ]
    return tag("div", *spans, class_="routed")


def scale_of(colours: Shades) -> Html:
    """What the colours mean."""
    return scale(
        "Colours of weights", colours, form=weight, quantity="specialists ← weight of the generalists → generalists"
    )


def write_text_page(path: Path, texts: Sequence[RoutedText], *, of: str, whose: str) -> Path:
    """Write a page with a text as each mixture reads it, and return its path.

    Args:
        path: where to.
        texts: by member.
        of: what the text is called.
        whose: mixtures read it: the run, or the member.

    Raises:
        UserError: the operating system refused.
    """
    colours = shades_of(texts)
    layer = "mean over layers" if texts[0].layer is None else f"layer {texts[0].layer}"
    facts = [("Text", of), ("Mixtures of", whose), ("Shown", layer), ("Allmend", __version__)]
    page = fill(
        title=f"{of}: who answers · allmend",
        head=head_of("Allmend, routers", f"Who answers in {of}", facts),
        contents=[(f"text-{place}", text.title) for place, text in enumerate(texts)],
        summary=join(
            [
                paragraph(
                    "In each layer a router weighs the experts for each token. Blue: most of the weight goes to the "
                    "generalists, which all clients share. Orange: most of it goes to the client’s own specialists. "
                    "A large weight does not say that an expert helps."
                ),
                scale_of(colours),
            ]
        ),
        sections=[
            section(f"text-{place}", text.title, paragraph(in_words(text)), text_block(text, colours))
            for place, text in enumerate(texts)
        ],
    )
    write_atomic(path, page.encode())
    return path


def text_picture(texts: Sequence[RoutedText]) -> str:
    """The same as a picture, a text below the other, with the scale at the end."""
    colours = shades_of(texts)
    drawn = [_drawn(text, colours) for text in texts]
    return picture([*drawn, scale_of(colours)], columns=1, titles=[*(text.title for text in texts), ""])


def _drawn(text: RoutedText, colours: Shades) -> Html:
    """A text in lines of letters that are equally wide."""
    longest = int(WIDTH / ADVANCE)
    parts: list[str] = []
    x, y = 0, 0
    for piece in text.pieces:
        for place, line in enumerate(piece.text.expandtabs(4).split("\n")):
            if place:
                x, y = 0, y + 1
            wrapped = False
            for part in _cut(line, longest - x, longest):
                if part is None:
                    x, y, wrapped = 0, y + 1, True
                    continue
                shown = part.removeprefix(" ") if wrapped else part  # the space between two lines
                wide, wrapped = _columns(shown), False
                parts.append(_box(shown, piece.mass, colours, x * ADVANCE, y * LINE, wide * ADVANCE))
                x += wide
    return svg(f"{text.title}: {in_words(text)}", (y + 1) * LINE, *parts)


def _cut(line: str, room: int, longest: int) -> Iterator[str | None]:
    """Parts of a line that fit, with None where a new one begins."""
    if _columns(line) > room and _columns(line) <= longest:
        yield None
        room = longest
    part = ""
    for letter in line:
        if _columns(part + letter) > room:
            yield part
            yield None
            part, room = "", longest
        part += letter
    if part:
        yield part


def _columns(words: str) -> int:
    """Columns that letters take: two for wide ones, none for marks on the letter before."""
    wide = sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in words)
    return wide - sum(unicodedata.combining(letter) > 0 for letter in words)


def _box(words: str, mass: float, colours: Shades, x: float, y: float, wide: float) -> Html:
    seen = words.lstrip(" ")
    before = (len(words) - len(seen)) * ADVANCE
    return tag(
        "g",
        tag("title", weight(mass)),
        tag("rect", x=x, y=y, width=wide, height=LINE - 2, class_=colours.css(mass), style=colours.style(mass)),
        tag("text", seen, x=x + before, y=y + LINE - 7, class_="routed") if seen.strip() else None,
    )
