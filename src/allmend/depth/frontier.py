"""What each depth costs on text that the search has not seen: perplexity, choices, and what adds up."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from allmend.data.chat import Encoded
from allmend.data.records import Record
from allmend.data.windows import Windows, check_apart
from allmend.depth.apply import apply_plan
from allmend.depth.bench import EAGER, compare_speed
from allmend.depth.choices import answer
from allmend.depth.decoder import Decoder
from allmend.depth.measure import Candidate, Measured, added, measure, perplexity, sequential
from allmend.depth.plan import Plan
from allmend.depth.searching import Result
from allmend.intervals import paired_difference
from allmend.learn.evaluate import accuracy
from allmend.results import DepthLine, Frontier

TOKENS, RUNS = 32, 3
"""Decoded for a line's speed, and how often."""

_NAMES = {"paired": "paired", "model": "as it is"}


def frontier(
    model: Any,
    results: Sequence[Result],
    searched: Windows,
    report: Windows,
    questions: tuple[list[Record], list[Encoded]],
    *,
    timed: bool = False,
    on_line: Callable[[float], None] = lambda share: None,
) -> Frontier:
    """Measure what a search has found on another text.

    Args:
        model: that was searched.
        results: of the search.
        searched, report: the text of the search and the other one.
        questions: from `choices.choices_of`, of the other text; may be none.
        timed: whether decoding is timed, too, some seconds for each result.
        on_line: told the share of results that are done.

    Raises:
        UserError: both texts are the same.
    """
    check_apart(searched, report)
    decoder = Decoder(model)
    plain = sequential(len(decoder.layers))
    # without rivals: what is measured here is measured to the end
    every = [Candidate(one.kind, one.candidate.start, one.candidate.end, one.candidate.change) for one in results]
    found = measure(decoder, report, [plain, *dict.fromkeys(every)])
    asked = bool(questions[0])
    before = answer(model, questions) if asked else []
    lines = [_line(plain, found, None, accuracy=accuracy(before))]
    machine = ""
    for place, (one, candidate) in enumerate(zip(results, every, strict=True)):
        facts: dict[str, Any] = {"searched": one.added, "predicted": one.predicted}
        if isinstance(candidate.change, Plan) and (asked or timed):
            folded = apply_plan(model, candidate.change)
            if asked:
                scores = answer(folded, questions)
                right = ([float(score.right) for score in some] for some in (scores, before))
                facts |= {"accuracy": accuracy(scores), "accuracy_change": paired_difference(*right)}
            if timed:
                speed = compare_speed({"paired": folded, "model": model}, _NAMES, tokens=TOKENS, runs=RUNS)
                facts |= {"speed": speed.ratio[EAGER]}
                facts |= {"foretold": speed.prediction.ratio if speed.prediction else None}
                threads = int(speed.machine["threads"])
                machine = f"{speed.machine['name']}, {threads} thread{'s' * (threads > 1)}"
        lines.append(_line(candidate, found, found[plain], **facts))
        on_line((place + 1) / len(results))
    return Frontier(
        lines=tuple(lines),
        searched_on=searched.source,
        reported_on=report.source,
        search_tokens=searched.tokens,
        report_tokens=report.tokens,
        questions=len(questions[0]),
        machine=machine,
        notes=(*searched.notes, *report.notes),
    )


def _line(one: Candidate, found: Mapping[Candidate, Measured], plain: Measured | None, **facts: Any) -> DepthLine:
    measured = found[one]
    return DepthLine(
        kind=one.kind,
        depth=measured.depth,
        groups=one.change.groups if isinstance(one.change, Plan) else (),
        start=one.start,
        end=one.end,
        perplexity=perplexity(measured),
        added=None if plain is None else added(measured, plain),
        **facts,
    )
