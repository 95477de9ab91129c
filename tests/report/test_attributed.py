"""The page of influence: what each record, client and target came to, how sure that is, and nothing of its own."""

import math
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

import pytest
from tests.report.conftest import EVIL, body_of, charts, part, said, table_of, tips

from allmend import intervals
from allmend.report import numbers
from allmend.report.attributed import LETTERS, MOST_TARGETS, Attribution, Damped, write_attributed
from allmend.report.influence_figures import MARK, MOST, MOST_CLIENTS, ScoredRecord
from allmend.results import Estimate, MemberInfluence

HALVES = Estimate(value=0.83, low=0.7, high=0.96, n=5)


def attribution(
    clients: Sequence[str] = ("east", "north"), targets: Sequence[str] = ("the aim",), each: int = 30, **more: Any
) -> Attribution:
    """Records of clients whose scores differ in their mean, the first client's the highest."""
    dice = random.Random(3)
    records, members = [], []
    for target in targets:
        scored = [
            (client, f"{client}-{i}", dice.gauss(1.0 - place, 1.0))
            for place, client in enumerate(clients)
            for i in range(each)
        ]
        ranked = sorted(scored, key=lambda one: -one[2])
        records += [
            ScoredRecord(name, target, score, ranked.index((client, name, score)) + 1, 1.5, f"words of {name}", client)
            for client, name, score in scored
        ]
        for client in clients:
            scores = [score for owner, _, score in scored if owner == client]
            size = fmean(map(abs, scores))
            mean = intervals.mean(scores)
            members.append(
                MemberInfluence(
                    client=client,
                    target=target,
                    mean=mean,
                    below=intervals.share(sum(score < 0 for score in scores), each),
                    size=size,
                    balance=mean.value / size,
                )
            )
    known: dict[str, Any] = {
        "records": records,
        "clients": members,
        "halves": dict.fromkeys(targets, HALVES),
        "facts": [("Model", "tiny")],
        "settings": [("Damping", "0.1")],
    }
    return Attribution(**known | more)


def page(tmp_path: Path, found: Attribution) -> ElementTree.Element:
    path = write_attributed(tmp_path / "influence.html", found)
    if os.name == "posix":
        assert path.stat().st_mode & 0o077 == 0, "records are on it"
    return body_of(path)


def test_both_ends_of_the_list_are_there_with_what_is_known_of_each_record(tmp_path: Path) -> None:
    found = attribution()
    body = page(tmp_path, found)
    unit = fmean(abs(record.score) for record in found.records)
    ordered = sorted(found.records, key=lambda record: record.rank)
    for caption, ends in (("Most helpful", ordered[:MOST]), ("Most harmful", list(reversed(ordered))[:MOST])):
        head, *rows = table_of(body, caption)
        assert head == ["Record", "Id", "Client", "Score", "Loss per token (nats)", "Rank"]
        expected = [record for record in ends if (record.score > 0) == (caption == "Most helpful")]
        assert [row[1] for row in rows] == [record.id for record in expected]
        for row, record in zip(rows, expected, strict=True):
            shown = f"{numbers.signed(record.score / unit)}{numbers.signed(record.score)}"
            assert row == [record.text, record.id, record.client, shown, "1.50", f"{record.rank}of 60"]


def test_clients_have_an_interval_and_a_histogram_each(tmp_path: Path) -> None:
    found = attribution()
    plot, histogram = charts(part(page(tmp_path, found), "target-0"))
    unit = fmean(abs(record.score) for record in found.records)
    for one, tip in zip(found.clients, tips(plot), strict=True):
        assert tip.startswith(f"{one.client} for the aim\nmean score {numbers.signed(one.mean.value / unit)}")
        assert f"{numbers.signed((one.mean.low or math.nan) / unit)} to" in tip
    for client in ("east", "north"):
        counted = [int(tip.split("\n")[1].split(" of ")[0]) for tip in tips(histogram) if tip.startswith(f"{client}\n")]
        assert sum(counted) == 30


def test_of_one_target_there_is_no_map_and_of_more_one_with_intervals(tmp_path: Path) -> None:
    assert not page(tmp_path, attribution()).findall(".//section[@id='clients']")
    found = attribution(targets=("a", "b", "c"))
    (chart,) = charts(part(page(tmp_path, found), "clients"))
    assert [tip.split("\n")[0] for tip in tips(chart)] == [
        f"{client} for {target}" for client in ("east", "north") for target in "abc"
    ]
    assert all("95\u202f% interval" in tip for tip in tips(chart))
    assert len(chart.findall(".//g[@class='pt']/text")) == 6, "figures are printed, too"


def test_more_clients_than_can_be_told_apart_share_a_histogram(tmp_path: Path) -> None:
    names = [f"client-{i}" for i in range(MOST_CLIENTS + 5)]
    _, histogram = charts(part(page(tmp_path, attribution(clients=names, each=4)), "target-0"))
    assert len(histogram.findall(".//g[@data-series]")) == MOST_CLIENTS
    assert "and 6 more" in said(histogram)
    assert "n = 24" in said(histogram)


def test_many_targets_are_mapped_and_the_first_have_a_section(tmp_path: Path) -> None:
    names = [f"record-{i}" for i in range(40)]
    body = page(tmp_path, attribution(targets=names, each=3, halves={}))
    assert sum(one.get("id", "").startswith("target-") for one in body.iter("section")) == MOST_TARGETS
    said_of_clients = said(part(body, "clients"))
    assert "28 targets more in influence.parquet" in said_of_clients
    assert "targets 30 of 40" in said_of_clients
    assert "no halves to compare" in said(part(body, "summary"))


def test_how_sure_it_is_stands_in_front(tmp_path: Path) -> None:
    summary = said(part(page(tmp_path, attribution()), "summary"))
    assert "0.83rank correlation of two halves (0.70 to 0.96, 5 splits)" in summary
    assert "about the same order" in summary
    unsure = attribution(halves={"the aim": Estimate(value=0.2, n=1)})
    assert "take single records with care" in said(part(page(tmp_path, unsure), "summary"))


def test_cautions_stand_in_front_and_beside_every_score(tmp_path: Path) -> None:
    body = page(tmp_path, attribution(cautions=["Curvature comes from few records."]))
    assert f"{MARK} Curvature comes from few records." in said(part(body, "summary"))
    for caption in ("Most helpful", "Most harmful"):
        assert all(f" {MARK}" in row[3] for row in table_of(body, caption)[1:])
    plain = page(tmp_path, attribution())
    assert not any(MARK in row[3] for row in table_of(plain, "Most helpful")[1:])


def test_settings_notes_silent_records_and_other_dampings_are_told(tmp_path: Path) -> None:
    found = attribution(
        notes=["2 target records are left out."],
        silent={"east": [f"mute-{i}" for i in range(30)]},
        dampings=[Damped("the aim", 0.001, 0.5, None), Damped("the aim", 0.1, 1.0, HALVES)],
        about_dampings="No target says which is right.",
    )
    measured = part(page(tmp_path, found), "measured")
    for words in (
        "Damping0.1",
        "2 target records are left out.",
        "Without a score, east: mute-0",
        "…",
        "No target says",
    ):
        assert words in said(measured)
    _, first, second = table_of(measured, "Under other dampings")
    assert first[1:] == [numbers.number(0.001), "0.50", "–"]
    assert second[2:] == ["1.00", "0.830.70 to 0.96"]


def test_what_records_and_names_hold_is_no_markup_and_is_cut(tmp_path: Path) -> None:
    told = {"notes": [EVIL], "facts": [("Model", EVIL)], "settings": [(EVIL, EVIL)], "cautions": [EVIL]}
    found = attribution(clients=(EVIL, "b"), targets=(EVIL, "c"), **told)
    hostile = [replace(one, id=EVIL + one.id, text=EVIL + "word " * 90) for one in found.records]
    body = page(tmp_path, replace(found, records=hostile))
    _, first, *_ = table_of(part(body, "target-0"), "Most helpful")
    assert first[0].startswith(EVIL)
    assert first[0].endswith("…")
    assert len(first[0]) <= LETTERS
    assert first[1].startswith(EVIL)


@pytest.mark.parametrize("scores", [[0.0, 0.0], [1.0], [2.0, 2.0]])
def test_scores_that_do_not_differ_make_a_page_all_the_same(scores: list[float], tmp_path: Path) -> None:
    records = [ScoredRecord(f"r{i}", "t", score, i + 1, 1.0, "words", "east") for i, score in enumerate(scores)]
    size = fmean(map(abs, scores))
    member = MemberInfluence(
        client="east",
        target="t",
        mean=intervals.mean(scores),
        below=intervals.share(0, len(scores)),
        size=size,
        balance=0,
    )
    body = page(tmp_path, replace(attribution(), records=records, clients=[member], halves={}))
    assert len(charts(part(body, "target-0"))) == 1, "no histogram"
    assert "No record has a score below 0." in said(body)
