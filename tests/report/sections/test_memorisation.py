"""What a reader learns of memorisation: the plain answer, whose it was, and what is not there."""

import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import pyarrow
import pyarrow.parquet
import pytest

from allmend.report.page import write_report
from allmend.results import AuditTable

Change = Callable[..., None]
LEAKED, GUESSED, SILENT = "▲ memorised", "≈ guessed, not memorised", "○ nothing came out"


def section(run: Path) -> ElementTree.Element:
    page = write_report(run).read_text()
    found = re.search(r'<section id="memorisation".*?</section>', page, flags=re.S)
    assert found
    return ElementTree.fromstring(found[0])


def words(element: ElementTree.Element) -> str:
    return " ".join(unescape("".join(element.itertext())).replace("\u202f", " ").replace("\xa0", " ").split())


def rows(run: Path, caption: str) -> dict[str, str]:
    """Rows of the table with such a caption, by their first cell, in words."""
    for table in section(run).iter("table"):
        if words(table.find("caption") or table).startswith(caption):
            return {words(row[0]): words(row) for row in table.findall("tbody/tr")}
    raise AssertionError(f"no table {caption}")


def probes(run: Path, edit: Callable[[dict[str, object]], dict[str, object]]) -> None:
    path = run / "results/audit.parquet"
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([edit(row) for row in pyarrow.parquet.read_table(path).to_pylist()]), path
    )


def test_answer_sets_canaries_beside_controls_and_base_model(run: Path) -> None:
    answers = [words(item) for item in section(run).findall("ul[@class='answers']/li")]
    assert answers[0].startswith(
        f"{LEAKED}fedavg recites 6 of 36 planted canaries without an error when given their first 30 tokens; "
        "0 of 36 controls; the base model 0 of 36."
    )
    assert answers[1].startswith(f"{SILENT}private recites 0 of 36")
    assert "a share of up to 24 % is not ruled out" in answers[1]


def test_base_model_has_its_own_column(run: Path, change: Change) -> None:
    audit = json.loads((run / "results/audit.json").read_bytes())
    for e in audit["extraction"]:
        if e["model"] == "base" and e["inserted"]:
            e["exact"] = {"value": 1 / 12, "low": 0.01, "high": 0.35, "n": 12}
    change("audit", extraction=audit["extraction"])
    page = section(run)
    (table,) = [t for t in page.iter("table") if words(t).startswith("What comes out after the first 30 tokens")]
    assert [words(head) for head in table.iter("th")][2:5] == ["Recited: planted", "controls", "base model"]
    assert all(words(row[4]).startswith("1 of 12") for row in table.findall("tbody/tr"))
    assert "the base model 3 of 36" in words(page)


def test_member_sees_its_own_leak_with_a_mark(run: Path) -> None:
    seen = rows(run, "By member")
    assert "3 of 9" in seen["injuries"]
    assert "10 copies: 3" in seen["injuries"]
    assert "20 tokens" in seen["injuries"]
    assert LEAKED in seen["injuries"]
    assert SILENT in seen["eye-and-ear"]
    assert (
        "Whoever has fedavg can bring out planted canaries of injuries (3 of 9; with 10 copies; after "
        "20 tokens), musculoskeletal (3 of 9;" in words(section(run))
    )
    assert "Nothing came out of private for any member." in words(section(run))


def test_what_controls_say_as_well_was_guessed(run: Path, change: Change) -> None:
    audit = json.loads((run / "results/audit.json").read_bytes())
    loud = {(e["model"], e["copies"], e["prefix"]): e for e in audit["extraction"] if e["inserted"]}
    for e in audit["extraction"]:
        twin = loud[e["model"], e["copies"], e["prefix"]]
        e |= {"exact": twin["exact"], "secrets": twin["secrets"]}
    change("audit", extraction=audit["extraction"])
    alike = {"model": "fedavg", "copies": 10, "client": "injuries"}
    probes(run, lambda row: row | {"exact": alike.items() <= row.items(), "secrets_out": 0})
    text = words(section(run))
    assert GUESSED in text
    assert "says of canaries of injuries it says of their controls as well: guessed, not memorised" in text
    assert LEAKED not in text
    assert "Whoever has fedavg" not in text


def test_single_secrets_are_told_too(run: Path) -> None:
    probes(run, lambda row: row | {"exact": False, "secrets_out": row["secrets"] if row["inserted"] else 0})
    assert "Single secrets, though no whole canary, come out of fedavg for injuries" in words(section(run))
    assert LEAKED in rows(run, "By member")["injuries"]


def test_without_probes_the_rest_is_there_and_their_lack_is_told(run: Path) -> None:
    (run / "results/audit.parquet").unlink()
    text = words(section(run))
    assert "Not part of this audit: extraction by member." in text
    assert "Whose was it?" not in text
    assert "fedavg recites 6 of 36" in text


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("gaps", "likelihood gaps"),
        ("extraction", "extraction"),
        ("discoverable", "(n, p)-discoverable extraction"),
        ("exposure", "exposure"),
        ("membership", "membership inference"),
        ("epsilon", "a measured bound on ε"),
        ("views", "what each party sees by round"),
        ("learnt", "what training looked at"),
        ("identifiers", "counts of what looks like personal data"),
    ],
)
def test_measure_without_figures_is_said_to_be_absent(run: Path, change: Change, field: str, name: str) -> None:
    assert "Not part of this audit" not in words(section(run))
    change("audit", **{field: {} if field == "identifiers" else []})
    assert f"Not part of this audit: {name}." in words(section(run))


def test_empty_audit_makes_a_page(run: Path, change: Change) -> None:
    empty = AuditTable(extraction=(), gaps=(), canaries=4, controls=4, seed=0).model_dump(mode="json")
    (run / "results/audit.parquet").unlink()
    change("audit", **empty)
    text = words(section(run))
    assert "Not part of this audit: extraction by member, likelihood gaps, extraction," in text
    assert "Did anything come out?" not in text


def test_base_model_alone_makes_a_page(run: Path, change: Change) -> None:
    audit = json.loads((run / "results/audit.json").read_bytes())
    only = {
        key: [row for row in value if row["model"] == "base"]
        for key, value in audit.items()
        if value and isinstance(value, list) and isinstance(value[0], dict)
    }
    change("audit", **only)
    assert "base model recites 0 of 36" in words(section(run))


def test_refused_figures_have_their_reasons(run: Path, change: Change) -> None:
    change("audit", refused=["exposure of record: no <controls>"])
    text = words(section(run))
    assert "Figures that the audit refused to give:" in text
    assert "exposure of record: no <controls>" in text


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (True, "▲ The design of the audit is not the one that was fixed before training."),
        (False, "The design of this audit was fixed before training and is unchanged."),
        (None, "Whether the design of this audit was fixed before training is not known."),
    ],
)
def test_says_whether_the_design_moved(run: Path, change: Change, changed: bool | None, says: str) -> None:
    change("audit", design_changed=changed)
    text = words(section(run))
    assert says in text
    assert ("▲ The design" in text) is bool(changed)


def test_canary_that_was_not_learnt_from_is_a_warning(run: Path, change: Change) -> None:
    assert "Every planted canary was learnt from." in words(section(run))
    idle = {"model": "fedavg", "copies": 3, "canaries": 4, "tokens": 20.0, "steps": 1.0, "least_tokens": 0}
    change("audit", learnt=[idle])
    text = words(section(run))
    assert "▲ Some planted canaries carried no loss (fedavg with 3 copies)." in text
    assert "Every planted canary" not in text
    change("audit", learnt=[])
    assert "Whether every planted canary was learnt from is not recorded." in words(section(run))


def test_limits_are_on_the_page(run: Path) -> None:
    text = words(section(run))
    for limit in (
        "Absence of extraction is not absence of memorisation.",
        "Canaries measure their own kind of secret.",
        "A guarantee of differential privacy protects its unit alone:",
        "A small model memorises less than a large one.",
        "not what the model learns about one canary from another.",
    ):
        assert limit in text


def bound(copies: int | None, epsilon: float, model: str = "private") -> dict[str, object]:
    return {
        "model": model,
        "copies": copies,
        "epsilon": epsilon,
        "delta": 1e-5,
        "confidence": 0.95,
        "guesses": 12,
        "right": 12,
        "canaries": 24,
        "accounted": 3.1 if (model, copies) == ("private", 1) else None,
    }


@pytest.mark.parametrize(("copies", "epsilon", "contradicts"), [(1, 3.2, True), (1, 3.0, False), (10, 9.0, False)])
def test_measured_epsilon_above_the_accounted_one_is_a_warning(
    run: Path, change: Change, copies: int, epsilon: float, contradicts: bool
) -> None:
    change("audit", epsilon=[bound(copies, epsilon)])
    assert ("▲ A measured bound lies above the accounted ε" in words(section(run))) is contradicts


def test_only_single_copies_stand_beside_the_accounted_epsilon(run: Path, change: Change) -> None:
    change("audit", epsilon=[bound(1, 0.5), bound(10, 2.5), bound(None, 2.75), bound(10, 1.25, "fedavg")])
    found = [words(row) for table in section(run).iter("table") for row in table.findall("tbody/tr")]
    measured = [row for row in found if "coins" in row]
    assert len(measured) == 4
    assert "1 copyat least 0.503.10" in measured[0]
    assert "10 copies togetherat least 2.50accounted for one record only" in measured[1]
    assert "all canaries togetherat least 2.75accounted for one record only" in measured[2]
    assert "10 copies togetherat least 1.25no guarantee" in measured[3]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([bound(1, 0.5), bound(10, 2.5), bound(None, 2.75)], "private, 1 copy: at least 0.50 (accounted: 3.10)"),
        ([bound(10, 2.5)], "private, 10 copies together: at least 2.50 (accounted for one record only)"),
        (
            [bound(c, 3 / (c or 0.5), "fedavg") for c in (1, 10, None)],
            "fedavg, 10 copies together: at least 0.30 (no guarantee)",
        ),
        ([bound(1, 0.0)], "private, 1 copy: 0 not ruled out (accounted: 3.10)"),
    ],
)
def test_headline_of_measured_epsilon_is_not_picked_by_its_size(
    run: Path, change: Change, rows: list[dict[str, object]], says: str
) -> None:
    change("audit", epsilon=rows)
    assert f"Measured ε{says}" in words(section(run)).replace("Measured ε ", "Measured ε")


def test_a_single_secret_that_came_out_is_counted(run: Path, change: Change) -> None:
    audit = json.loads((run / "results/audit.json").read_bytes())
    leak = {"": {"value": 0.025, "low": 0.0, "high": 0.32, "n": 8}}
    leak |= {"ward": {"value": 0.125, "n": 8}, "record": {"value": 0.0, "n": 32}}
    for e in audit["extraction"]:
        if (e["model"], e["inserted"]) == ("private", True):
            e["secrets"] = leak
    change("audit", extraction=audit["extraction"])
    probes(run, lambda row: row | {"secrets_out": int(row["canary"] == "injuries/3x/000"), "exact": False})
    page = section(run)
    assert "Of the secrets behind it, 1 of 40 come out with 10 copies" in words(page)
    (table,) = [t for t in page.iter("table") if words(t).startswith("What comes out after")]
    private = [words(row[5]) for row in table.findall("tbody/tr") if words(row[0]) == "private"]
    assert private
    assert all(cell.startswith("1 of 40") for cell in private)
    assert "1 of 27" in rows(run, "By member")["injuries"]  # nine canaries of three secrets


def test_rates_that_need_more_non_members_say_so(run: Path) -> None:
    seen = [words(cell) for cell in section(run).iter("td")]
    assert "–needs 100 non-members" in seen
    assert "–needs 1,000 non-members" in seen


def test_exposure_stands_between_null_and_ceiling(run: Path) -> None:
    charts = [svg for svg in section(run).iter("svg") if (svg.get("aria-label") or "").startswith("Exposure of")]
    assert len(charts) == 3
    for chart in charts:
        null, ceiling = (chart.find(f".//line[@class='{css}']") for css in ("zero", "limit"))
        assert null is not None
        assert ceiling is not None
        assert float(ceiling.get("y1", "nan")) < float(null.get("y1", "nan"))  # higher up
    titles = [words(head) for head in section(run).iter("h3")]
    assert "ward: 144 values, 7.17 bits" in titles
    assert "record: 100,000,000 values, 26.6 bits; ranked against 1,000, at most 9.97 bits" in titles


def test_shares_and_lengths_of_prefixes_share_an_axis(run: Path, change: Change) -> None:
    audit = json.loads((run / "results/audit.json").read_bytes())
    further = [e | {"prefix": "50 %", "prefix_tokens": 24.5 + e["copies"] / 10} for e in audit["extraction"][:18]]
    change("audit", extraction=audit["extraction"] + further)
    page = section(run)
    chart = next(svg for svg in page.iter("svg") if svg.get("aria-label") == "exact match, fedavg")
    ticks = [
        text.text for text in chart.iter("text") if text.get("class") == "tick" and text.get("text-anchor") == "middle"
    ]
    assert ticks == ["10 tokens", "20 tokens", "50 %", "30 tokens"]


def test_views_name_who_looks_at_what(run: Path) -> None:
    text = words(section(run))
    assert "members the broadcast model" in text.replace("membersthe", "members the")
    assert "the update of mental-health" in text
    assert "coordinator from the update of mental-health, round 3" in text


def test_identifiers_are_counted_by_kind(run: Path, change: Change) -> None:
    change("audit", identifiers={"base": {"date": 1}, "fedavg": {"date": 1234, "phone": 2}})
    seen = rows(run, "What looks like personal data")
    assert "1,234" in seen["fedavg"]
    assert seen["base model"].endswith("10")  # one date, no phone
