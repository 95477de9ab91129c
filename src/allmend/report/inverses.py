"""The page of `allmend attribute inverse`: how approximations come to the exact inverse, and which way is fastest."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from allmend.report import numbers
from allmend.report.charts import NEUTRAL, Axis, Point, Row, Series, interval_plot, line_chart
from allmend.report.markup import Cell, Html, Rows, figure, in_figures, paragraph, prose, section, table, tag
from allmend.report.page import fill, head_of
from allmend.run import write_atomic


@dataclass(frozen=True)
class Timed:
    """An inverse at one size.

    Attributes:
        name: which, in a word or two.
        called: the same and how it was used.
        seconds: of each round; none where it gave up.
        error: of its solutions, relatively; None where it gave up.
    """

    name: str
    called: str
    seconds: tuple[float, ...]
    error: float | None


def write_inverses(
    path: Path,
    *,
    residuals: Mapping[str, Sequence[float]],
    errors: Mapping[str, Sequence[float]],
    without_steps: Mapping[str, float],
    timings: Mapping[str, Sequence[Timed]],
    verdict: str,
    about_steps: Sequence[str],
    about_times: str,
    facts: Sequence[tuple[str, str]],
) -> Path:
    """Write the page and return its path.

    Args:
        path: where to.
        residuals: of each iteration, by step from 0 on.
        errors: of each approximation's solutions, relatively, by step from 0 on.
        without_steps: errors of approximations that take none.
        timings: of each inverse, by size.
        verdict: which is fastest, in words.
        about_steps: what residuals and errors are of, in sentences.
        about_times: how times were taken.
        facts: terms and what they are here, for the head of the page.

    Raises:
        UserError: the operating system refused.
    """
    parts = [
        ("steps", "How fast approximations arrive", _steps(residuals, errors, without_steps, about_steps)),
        ("times", "How long each takes", _times(timings, about_times)),
    ]
    page = fill(
        title="inverses · allmend",
        head=head_of("Allmend, inverses", "Which inverse is fastest here", facts),
        contents=[(anchor, title) for anchor, title, _ in parts],
        summary=paragraph(tag("strong", prose(verdict))),
        sections=[part for *_, part in parts],
    )
    write_atomic(path, page.encode())
    return path


def _steps(
    residuals: Mapping[str, Sequence[float]],
    errors: Mapping[str, Sequence[float]],
    without_steps: Mapping[str, float],
    about: Sequence[str],
) -> Html:
    names = list(dict.fromkeys((*residuals, *errors)))
    looks = {name: look for look, name in enumerate(names)}
    last = float(max(len(values) for values in (*residuals.values(), *errors.values())) - 1)
    flat = [
        Series(
            name,
            name,
            NEUTRAL,
            tuple(Point(x, error, f"{name}\nerror {_power(error)}") for x in (0.0, last)),
            hollow=True,
        )
        for name, error in without_steps.items()
    ]
    charts = [
        figure(
            title,
            line_chart(
                title,
                [*_lines(values, looks, what), *more],
                Axis("step", ticks=_whole(last)),
                Axis(what, form=_power, log=True),
                height=300,
            ),
            note=note,
        )
        for title, what, values, more, note in (
            (
                "Residual of the iteration by step",
                "residual",
                residuals,
                [],
                "Each factor of ten has the same distance.",
            ),
            ("Error of the solutions by step", "error", errors, flat, "Dashed: approximations that take no steps."),
        )
    ]
    head = ["Step", *(f"Residual, {name}" for name in residuals), *(f"Error, {name}" for name in errors)]
    rows: Rows = []
    for step in range(int(last) + 1):
        cells = [
            Cell(_power(values[step]), value=values[step]) if step < len(values) else Cell("")
            for some in (residuals, errors)
            for values in some.values()
        ]
        rows.append([str(step), *cells])
    return section(
        "steps",
        "How fast approximations arrive",
        tag("div", *charts, class_="charts"),
        *map(paragraph, about),
        in_figures(table("Residuals and errors by step", head, rows), len(rows)),
    )


def _whole(last: float) -> tuple[float, ...]:
    every = max(1, round(last / 5))
    return tuple(float(step) for step in range(0, int(last) + 1, every))


def _lines(by_name: Mapping[str, Sequence[float]], looks: Mapping[str, int], what: str) -> list[Series]:
    return [
        Series(
            name,
            name,
            looks[name],
            tuple(
                Point(float(step), value, f"{name}, step {step}\n{what} {_power(value)}")
                for step, value in enumerate(values)
            ),
        )
        for name, values in by_name.items()
    ]


def _times(timings: Mapping[str, Sequence[Timed]], about: str) -> Html:
    names = dict.fromkeys(one.name for some in timings.values() for one in some)
    looks = {name: look for look, name in enumerate(names)}
    groups: list[tuple[str, list[Row]]] = []
    body: Rows = []
    for size, some in timings.items():
        fastest = min((statistics.median(one.seconds) for one in some if one.seconds), default=float("nan"))
        lines = []
        for one in some:
            times = [1e3 * seconds for seconds in one.seconds]
            middle = statistics.median(times) if times else float("nan")
            shown = f"{_milliseconds(middle)} ms" if times else "gave up"
            span = f"{_milliseconds(min(times))} to {_milliseconds(max(times))}" if times else ""
            tip = f"{one.name}, {size}\n{shown} ({span})"
            low, high = (min(times), max(times)) if times else (None, None)
            lines.append(Row(one.name, one.name, looks[one.name], middle, shown, tip, low, high))
            slower = middle / fastest / 1e3
            body.append(
                [
                    size,
                    one.called,
                    Cell(_milliseconds(middle) if times else "gave up", span, middle),
                    Cell(f"{slower:.3g} ×" if times else numbers.NONE, value=slower),
                    Cell(numbers.NONE if one.error is None else _power(one.error), value=one.error),
                ]
            )
        groups.append((size, lines))
    head = ["Size", "Inverse", "Median (ms)", "Over the fastest’s", "Error"]
    return section(
        "times",
        "How long each takes",
        tag(
            "div",
            figure(
                "Milliseconds of each inverse",
                interval_plot("Milliseconds of each inverse", groups, Axis("ms", form=_milliseconds, log=True)),
                note="Markers: medians of rounds. Whiskers: from the fastest to the slowest. Each factor of ten has "
                "the same distance.",
            ),
            class_="charts",
        ),
        paragraph(about),
        table("Milliseconds of each inverse (range of the rounds)", head, body),
    )


def _power(value: float) -> str:
    return "1" if value == 1 else numbers.power(value)


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
