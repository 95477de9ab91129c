"""The page of inverses holds what was simulated and timed."""

from pathlib import Path

import torch
from tests.report.conftest import body_of, charts, part, said, table_of, tips

from allmend.attribution.pages import WAYS, about_simulation, write_inverse_page
from allmend.influence.convergence import simulate
from allmend.influence.inverse_table import time_inverses
from allmend.report import numbers


def test_inverses_are_shown_as_they_were_simulated_and_timed(tmp_path: Path) -> None:
    simulated = simulate(12)
    timings = list(time_inverses([(2, 8), (1, 12)], device=torch.device("cpu")))
    machine = {"device": "cpu: <any>", "threads": 1, "torch": torch.__version__, "dtype": "float32"}
    path = write_inverse_page(tmp_path / "page.html", simulated, timings, verdict="Any.", machine=machine)
    body = body_of(path)
    residual, error = charts(part(body, "steps"))
    assert len(tips(residual)) == sum(map(len, simulated.residual.values()))
    assert sum(tip.startswith("LiSSA") for tip in tips(error)) == len(simulated.lissa)
    assert about_simulation(simulated) in said(part(body, "steps"))
    head, *rows = table_of(part(body, "steps"), "Residuals and errors by step")
    assert head[1:4] == [f"Residual, order {order}" for order in simulated.residual]
    for step, row in enumerate(rows):
        for cell, values in zip(row[1:4], simulated.residual.values(), strict=True):
            shown = numbers.power(values[step]) if step < len(values) and values[step] != 1 else cell
            assert cell == shown
    _, *times = table_of(part(body, "times"), "Milliseconds of each inverse")
    assert len(times) == len(timings) * len(WAYS)
    assert [row[0] for row in times[:: len(WAYS)]] == [
        f"{one.batch} × {one.size}, condition {one.condition:.0f}" for one in timings
    ]
    for words in ("8 right sides", f"{timings[0].steps} steps", "cpu: <any>"):
        assert words in said(body)
