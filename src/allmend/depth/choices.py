"""Choice questions made of a text: which of four continuations is the true one?

Perplexity falls apart before choices do, and few choices hide damage: both are shown.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch

from allmend.data.chat import Encoded
from allmend.data.records import Record
from allmend.data.windows import Windows
from allmend.learn.evaluate import Score, score

CONTEXT, CONTINUATION, OPTIONS = 32, 12, 4
"""Tokens of a question and of a choice, and choices."""


def choices_of(windows: Windows, count: int, *, seed: int = 0) -> tuple[list[Record], list[Encoded]]:
    """Questions from a text: 32 tokens, their next 12, and 12 tokens each from three other places.

    Args:
        windows: the text.
        count: questions at most; there are no more than the text has stretches of 44 tokens.
        seed: of the places of the wrong choices, and of the right one among them.
    """
    generator = random.Random(seed)
    flat = windows.ids.flatten()
    span = CONTEXT + CONTINUATION
    starts = [start * span for start in range(len(flat) // span)][:count]
    records, encoded = [], []
    for number, start in enumerate(starts):
        after = start + CONTEXT
        elsewhere = [place for place in range(0, len(flat) - CONTINUATION, CONTINUATION) if abs(place - after) >= span]
        if len(elsewhere) < OPTIONS - 1:
            break
        answer = generator.randrange(OPTIONS)
        places = generator.sample(elsewhere, OPTIONS - 1)
        places.insert(answer, after)
        name = f"{windows.source}/{number}"
        records.append(Record(name, text=name, choices=tuple(map(str, range(OPTIONS))), answer=answer))
        encoded.append(question_of(name, flat[start:after], [flat[place : place + CONTINUATION] for place in places]))
    return records, encoded


def question_of(name: str, trunk: torch.Tensor, branches: Sequence[torch.Tensor]) -> Encoded:
    """A question as tokens: a trunk that all choices, its branches, go on from."""
    lengths = [len(trunk), *map(len, branches)]
    branch = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    position = torch.cat([torch.arange(len(trunk)), *(len(trunk) + torch.arange(len(one)) for one in branches)])
    return Encoded(name, torch.cat([trunk, *branches]), branch > 0, branch, position)


def answer(model: Any, questions: tuple[list[Record], list[Encoded]]) -> list[Score]:
    """What a model takes for the true continuations.

    Args:
        model: which packs rows (`learn.objective`), in evaluation mode.
        questions: from `choices_of`.
    """
    return score(model, *questions)
