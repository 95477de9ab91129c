"""What the pages about depth share: what fewer steps cost, as a curve, a table and sentences."""

from allmend.report import numbers
from allmend.report.charts import Axis, Point, Series, line_chart
from allmend.report.markup import Cell, Html, Rows, figure, join, table, tag
from allmend.results import KINDS_IN_WORDS, SEQUENTIAL, DepthLine, DepthSearch, Estimate, Frontier

ADDED = "added to the loss (nats a token)"

LIMITS = (
    "Side by side, the same arithmetic is done and the same weights are read: it gains only where a step waits, for "
    "the launch of a kernel on a GPU, for other GPUs under tensor parallelism, for threads. On a CPU that is little. "
    "Perplexity falls apart before choices do; what is chosen here is for text like the one it was measured on."
)


def span(start: int, end: int) -> str:
    """The layers start … end − 1 in few words: `4` or `4 to 7`."""
    return str(start) if end - start == 1 else f"{start} to {end - 1}"


def named_layers(start: int, end: int) -> str:
    """The same with what they are."""
    return f"layer{'s' * (end - start > 1)} {span(start, end)}"


def loss_by_depth(front: Frontier) -> Html:
    """What each depth adds to the loss, on both texts, with what single pairs foretell."""
    before, *after = front.lines

    def points(of: str) -> tuple[Point, ...]:
        found = []
        for line in reversed(after):
            one: Estimate | None = getattr(line, of)
            if one is not None:
                evidence = numbers.evidence(one, numbers.signed)
                tip = f"{line.depth} steps\n{numbers.signed(one.value)} nats a token, {evidence}"
                found.append(Point(float(line.depth), one.value, tip, one.low, one.high))
        return tuple(found)

    series = [
        Series("added", "unseen text", 0, points("added")),
        Series("searched", "text of the search", 1, points("searched"), hollow=True),
    ]
    if summed := [line for line in after if line.predicted is not None]:
        guess = tuple(
            Point(float(line.depth), line.predicted or 0.0, f"{line.depth} steps\nsum of single pairs")
            for line in reversed(summed)
        )
        series.append(Series("predicted", "single pairs", 2, guess, hollow=True))
    ticks = tuple(float(line.depth) for line in reversed(after))
    return line_chart(
        f"{ADDED}, by depth",
        series,
        Axis(f"steps one after the other (the model as it is: {before.depth})", ticks=ticks),
        Axis(ADDED, reference=0.0),
    )


def told(found: DepthSearch) -> str:
    """What the chosen depth costs, in sentences."""
    line, front = found.line, found.frontier
    if line is None or line.added is None:
        return "Nothing was found."
    before = front.lines[0]
    said = [
        f"With {line.depth} steps instead of {before.depth} the perplexity on unseen text is "
        f"{line.perplexity.value:.1f} instead of {before.perplexity.value:.1f}: {numbers.signed(line.added.value)} "
        f"nats a token ({numbers.evidence(line.added, numbers.signed)})."
    ]
    if line.accuracy is not None and before.accuracy is not None and line.accuracy_change is not None:
        said.append(
            f"Of {numbers.counted(front.questions, 'choice')} it takes {numbers.percent(line.accuracy.value)} right "
            f"instead of {numbers.percent(before.accuracy.value)} "
            f"({numbers.points(line.accuracy_change.value)}, {numbers.evidence(line.accuracy_change, numbers.points)})."
        )
    if not found.reached:
        said.append("No depth keeps within the loss that was allowed; this is the cheapest.")
    return " ".join(said)


def plan_in_words(found: DepthSearch) -> str:
    """The layers that run side by side, in a sentence."""
    pairs = [group for group in found.chosen if len(group) > 1]
    words = ", ".join(" and ".join(map(str, group)) for group in pairs)
    return f"Layers that run side by side: {words}." if pairs else "No layers run side by side."


def depths(front: Frontier, curve: Html) -> Html:
    """The curve, and a table with a row for each depth."""
    rows: Rows = [
        [
            Cell(str(line.depth), value=line.depth),
            changed_layers(line),
            Cell(
                f"{line.perplexity.value:.2f}", numbers.interval(line.perplexity, numbers.number), line.perplexity.value
            ),
            _cell(line.added, numbers.signed),
            _cell(line.searched, numbers.signed),
            "" if line.predicted is None else Cell(numbers.signed(line.predicted), value=line.predicted),
            _cell(line.accuracy, numbers.percent),
            _speed(line),
        ]
        for line in front.lines
    ]
    head = [
        "Steps",
        "Side by side",
        "Perplexity",
        "Added (nats a token)",
        "On the search’s text",
        "Sum of single pairs",
        "Choices right",
        "Speed here",
    ]
    return join(
        [
            tag("div", figure("What each depth adds to the loss", curve), class_="charts"),
            table(
                "The best way found at each depth; 95 % intervals over windows, and over questions. Speed: tokens a "
                "second of greedy decoding over those of the model as it is, in brackets what layers timed alone "
                "foretell" + (f" ({front.machine})" if front.machine else ""),
                head,
                rows,
            ),
        ]
    )


def _cell(one: Estimate | None, form: numbers.Format) -> Cell | str:
    return "" if one is None else Cell(form(one.value), numbers.interval(one, form), one.value)


def _speed(line: DepthLine) -> Cell | str:
    if line.speed is None:
        return ""
    foretold = f" ({line.foretold.median:.2f})" if line.foretold else ""
    found = line.speed
    return Cell(f"{found.median:.2f}{foretold}", f"{found.low:.2f} to {found.high:.2f}", found.median)


def changed_layers(line: DepthLine) -> str:
    """What a depth does, in few words: its pairs by their layers."""
    if line.kind == SEQUENTIAL:
        return "none: the model as it is"
    if not line.groups:
        return f"{span(line.start, line.end)}, {KINDS_IN_WORDS[line.kind]}"
    return ", ".join("+".join(map(str, group)) for group in line.together)
