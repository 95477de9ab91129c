"""From what was measured to pages to read: `influence.html`, the page beside a list to review, that of inverses."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING

from allmend import __version__
from allmend.attribution.settings import Settings
from allmend.influence.convergence import Convergence
from allmend.influence.damping_sweep import NO_TARGET
from allmend.influence.inverse_table import RIGHT_SIDES, Timing
from allmend.influence.table import InfluenceTable, Row
from allmend.report import numbers
from allmend.report.attributed import Attribution, Damped, write_attributed
from allmend.report.influence_figures import ScoredRecord
from allmend.report.inverses import Timed, write_inverses
from allmend.report.reviewed import Found, Suspicious, write_reviewed
from allmend.results import MemberInfluence

if TYPE_CHECKING:
    from allmend.attribution.review import Review

PAGE = "influence.html"
"""Beside a table of influence."""

Texts = Mapping[tuple[str, str], str]
"""Of records, by client and id."""

WAYS = {
    "cholesky": f"Cholesky's factors, {RIGHT_SIDES} right sides",
    "full_inverse": "inverse from Cholesky's factors",
    "eigen": "eigenvectors",
    "hyperpower": "hyperpower to 1e-4",
}
"""What each way of `inverse_table` is called."""

SHORT = {"cholesky": "Cholesky's factors", "full_inverse": "inverse from them"}
"""The same beside a chart, where it is long."""


def write_influence_page(
    out: Path,
    rows: Sequence[Row],
    table: InfluenceTable,
    texts: Texts,
    *,
    model: str,
    adapter: Path,
    target: Path,
    settings: Settings,
) -> Path:
    """Write `influence.html` and return its path.

    Args:
        out: the folder of the table.
        rows: a row for each record and target.
        table: their figures.
        texts: of the records.
        model: the adapter's base, as it was named; likewise `adapter` and `target`.
        settings: how influence was measured.

    Raises:
        UserError: the operating system refused.
    """
    names = list(dict.fromkeys(row.target for row in rows))
    curved = table.method != "hessian_free"
    called = {name: target.name if len(names) == 1 else name for name in names}
    found = Attribution(
        records=[
            ScoredRecord(
                row.record_id,
                called[row.target],
                row.score,
                row.rank,
                row.loss or 0.0,
                texts.get((row.client, row.record_id), ""),
                row.client,
            )
            for row in rows
            if row.score is not None
        ],
        clients=_members(rows, table, called),
        halves={called[name]: one for name, one in table.reliability.items()},
        facts=[
            ("Model", model),
            ("Adapter", str(adapter)),
            ("Method", table.method),
            *([("Damping", f"{table.damping:g}")] if curved else []),
            ("Training records", numbers.count(table.records)),
            ("Target records", f"{numbers.count(table.target_records)} of {target.name}"),
            ("Allmend", __version__),
        ],
        settings=_settings(table, settings),
        cautions=table.cautions,
        notes=table.notes,
        silent=table.silent,
        dampings=[Damped(called[one.target], one.damping, one.agreement, one.reliability) for one in table.sweep],
        about_dampings=NO_TARGET,
    )
    return write_attributed(out / PAGE, found)


def _members(rows: Sequence[Row], table: InfluenceTable, called: Mapping[str, str]) -> list[MemberInfluence]:
    scores: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.score is not None:
            scores.setdefault((row.client, row.target), []).append(row.score)
    found = []
    for one in table.clients:
        own = scores[one.client, one.target]
        size = fmean(map(abs, own))
        found.append(
            MemberInfluence(
                client=one.client,
                target=called[one.target],
                mean=one.mean,
                below=one.harmful,
                size=size,
                balance=one.mean.value / size if size else 0.0,
            )
        )
    return found


def _settings(table: InfluenceTable, settings: Settings) -> list[tuple[str, str]]:
    gfim = table.method == "gfim"
    method = f"{table.method}, {table.side} side, solved by {table.inverse}" if gfim else table.method
    curved = table.method != "hessian_free"
    return [
        ("Method", method),
        ("Damping", f"{table.damping:g} of each block’s mean eigenvalue" if curved else "none: there is no curvature"),
        ("Weights", f"those that match {table.modules}" if table.modules else "all factors of the adapter"),
        *([("Blocks", _blocks(table))] if table.blocks else []),
        *(
            [("Left out", f"{numbers.counted(len(table.skipped), 'factor')} without a gradient")]
            if table.skipped
            else []
        ),
        ("Longest record", f"{numbers.counted(settings.max_tokens, 'token')}, template {settings.template}"),
        ("Base model", f"SHA-256 {table.weights}"),
        ("Adapter", f"SHA-256 {table.adapter}"),
        ("Seed", f"{table.seed}, of the halves of the target records"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in table.versions.items())),
    ]


def _blocks(table: InfluenceTable) -> str:
    blocks = list(table.blocks.values())
    conditions = [one.condition for one in blocks if one.condition is not None]
    fits = [one.fit for one in blocks if one.fit is not None]
    words = [
        f"{numbers.count(len(blocks))}, of {numbers.count(min(one.size for one in blocks))} to "
        f"{numbers.count(max(one.size for one in blocks))} rows and columns",
        f"condition number {numbers.number(max(conditions))} at most" if conditions else "",
        f"residual {numbers.power(max(one.residual for one in blocks))} at most",
        f"fit {numbers.number(median(fits))} (median), the share of the true block’s energy that one holds"
        if fits
        else "",
    ]
    return "; ".join(filter(None, words))


def write_review_page(
    path: Path,
    found: "Review",
    texts: Texts,
    *,
    model: str,
    adapter: Path,
    target: Path,
    noisy: str,
    settings: Settings,
) -> Path:
    """Write the page of a list to review and return its path.

    Args:
        path: where to.
        found: the list.
        texts: of the records.
        model: the adapter's base, as it was named; likewise `adapter` and `target`.
        noisy: the field that says which records are wrong; may be empty.
        settings: how influence was measured.

    Raises:
        UserError: the operating system refused.
    """
    called = {name: name.replace("_", "-") for name in ("influence", "loss", "self_influence")}
    records = [
        Suspicious(
            one.record_id,
            one.client,
            {shown: getattr(one, name) for name, shown in called.items()},
            texts.get((one.client, one.record_id), ""),
            one.wrong,
        )
        for one in found.suspects
    ]
    measures = {called[name]: Found(one.auc, one.recall) for name, one in found.found.items()}
    return write_reviewed(
        path,
        records,
        measures,
        verdict=found.verdict,
        facts=[
            ("Model", model),
            ("Adapter", str(adapter)),
            ("Training records", numbers.count(len(records))),
            ("Target", target.name),
            *([("Wrong by", f"the field {noisy}")] if noisy else []),
            ("Allmend", __version__),
        ],
        settings=[
            ("Method", settings.method),
            ("Damping", f"{settings.damping:g} of each block’s mean eigenvalue"),
            ("Loss", "nats a token"),
            ("Longest record", f"{numbers.counted(settings.max_tokens, 'token')}, template {settings.template}"),
        ],
        notes=found.notes,
    )


def write_inverse_page(
    path: Path, simulated: Convergence, timings: Sequence[Timing], *, verdict: str, machine: Mapping[str, object]
) -> Path:
    """Write the page of inverses and return its path.

    Args:
        path: where to.
        simulated: how approximations come to the exact inverse.
        timings: at each size.
        verdict: which inverse wins.
        machine: `device`, `threads`, `torch` and `dtype`.

    Raises:
        UserError: the operating system refused.
    """
    orders = {order: f"order {order}" for order in simulated.residual}
    return write_inverses(
        path,
        residuals={orders[order]: values for order, values in simulated.residual.items()},
        errors={orders[order]: values for order, values in simulated.error.items()} | {"LiSSA": simulated.lissa},
        without_steps={"DataInf": simulated.datainf, "no inverse": simulated.uncurved},
        timings={
            f"{one.batch} × {one.size}, condition {one.condition:.0f}": [
                Timed(SHORT.get(way, called), in_steps(way, one), one.seconds[way], one.error.get(way))
                for way, called in WAYS.items()
            ]
            for one in timings
        },
        verdict=verdict,
        about_steps=[
            f"One matrix, {simulated.size} × {simulated.size}, with condition number {simulated.condition:.0f}.",
            about_simulation(simulated),
        ],
        about_times=ABOUT_TIMES,
        facts=[
            ("Device", str(machine["device"])),
            ("Threads", str(machine["threads"])),
            ("torch", str(machine["torch"])),
            ("Numbers", str(machine["dtype"])),
            ("Allmend", __version__),
        ],
    )


def in_steps(way: str, one: Timing) -> str:
    """What a way is called, with the steps that it took where it takes any."""
    if way != "hyperpower" or one.steps is None:
        return WAYS[way]
    return f"{WAYS[way]}, {numbers.counted(one.steps, 'step')}"


ABOUT_TIMES = "The median of rounds in which every inverse had its turn, and their range."


def about_simulation(found: Convergence) -> str:
    """What residuals and errors of a simulation are of, and those that have no step."""
    later = ", ".join(f"{error:.2g} after {steps:,}" for steps, error in found.lissa_later.items())
    return (
        "Residual: ‖I − A X‖ / √d of the hyperpower iteration of each order p, a step of which takes p products of "
        "matrices. Error: ‖x − A⁻¹v‖ / ‖A⁻¹v‖ of its solutions, and of LiSSA's, a step of which takes one product of a "
        f"matrix and vectors; it is {later} steps. DataInf's error is {found.datainf:.2g}; that of v without any "
        f"inverse, over the mean eigenvalue, {found.uncurved:.2g}. Double precision, {found.samples:,} samples with a "
        f"power-law spectrum, damping a tenth of the mean eigenvalue, seed {found.seed}."
    )
