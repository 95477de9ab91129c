"""The section on depth: what each arm's search found, and what is said where there is none."""

import re
from pathlib import Path
from typing import Any

from allmend.report.evidence import Evidence
from allmend.report.sections.depth import depth
from allmend.results import DepthLine, DepthSearch, DepthTable, Estimate, Frontier, Spread


def line(steps: int, added: float | None, *pairs: int, **more: Any) -> DepthLine:
    alone = [(layer,) for layer in range(6) if layer not in pairs and layer - 1 not in pairs]
    groups = sorted([*alone, *((first, first + 1) for first in pairs)])
    return DepthLine(
        kind="free" if pairs else "sequential",
        depth=steps,
        groups=tuple(groups),
        start=0,
        end=0,
        perplexity=Estimate(value=20.0 + 6 - steps, n=1024),
        added=None if added is None else Estimate(value=added, low=added - 0.01, high=added + 0.01, n=4),
        accuracy=Estimate(value=0.75, n=96),
        accuracy_change=None if added is None else Estimate(value=-0.125, low=-0.2, high=-0.05, n=96),
        **more,
    )


def search(arm: str = "fedavg", **more: Any) -> DepthSearch:
    speed = Spread(median=1.04, low=1.01, high=1.06, n=3)
    front = Frontier(
        lines=(line(6, None), line(5, 0.05, 3), line(4, 0.2, 1, 3, speed=speed, foretold=speed)),
        searched_on="valid.txt",
        reported_on="test.txt",
        search_tokens=8192,
        report_tokens=1024,
        questions=96,
        machine="a machine, 2 threads",
        notes=("The text says little.",),
    )
    known: dict[str, Any] = {
        "model": f"runs/first:{arm}",
        "arm": arm,
        "weights": "w",
        "frontier": front,
        "chosen": ((0,), (1, 2), (3, 4), (5,)),
        "reached": True,
    }
    return DepthSearch(**(known | more))


def words(*searches: DepthSearch) -> str:
    html = depth(Evidence(run=Path("x"), depth=DepthTable(searches=searches)))
    return " ".join(re.sub(r"<title>.*?</title>|<[^>]+>", " ", html, flags=re.DOTALL).split())


def test_nothing_is_shown_where_nothing_was_searched() -> None:
    assert depth(Evidence(run=Path("x"))) == ""
    assert depth(Evidence(run=Path("x"), depth=DepthTable(searches=()))) == ""


def test_the_chosen_depth_in_words_and_all_of_them_as_a_table() -> None:
    said = words(search())
    assert "With 4 steps instead of 6 the perplexity on unseen text is 22.0 instead of 20.0: +0.20 nats" in said
    assert "Of 96 choices it takes 75.0 % right instead of 75.0 %" in said
    assert "Layers that run side by side: 1 and 2, 3 and 4." in said
    assert "1+2, 3+4" in said
    assert "1.04 (1.04)" in said
    assert "a machine, 2 threads" in said
    assert "The text says little." in said


def test_a_loss_that_no_depth_keeps_within() -> None:
    assert "No depth keeps within the loss that was allowed" in words(search(reached=False))
    assert "No depth keeps within" not in words(search())


def test_arms_are_told_apart() -> None:
    assert "local" not in words(search())
    said = words(search("fedavg"), search("local", chosen=((0,), (1,), (2,), (3, 4), (5,))))
    assert said.index("fedavg") < said.index("With 4 steps") < said.index("local") < said.index("With 5 steps")
