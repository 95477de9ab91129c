"""Members' own models on the page and on the terminal: an arm in a row, each model to unfold, and what passed on."""

from collections.abc import Mapping
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tests.report.conftest import body_of, part, said, share, table_of

from allmend.cli.outcome import show_audit
from allmend.report.page import write_report
from allmend.results import (
    BASE,
    AuditTable,
    Estimate,
    Extraction,
    KeptByMembers,
    LikelihoodGap,
    Membership,
    OverMembers,
    RankTest,
    Whose,
)
from allmend.run import RunFolder

NAMES = ("north", "south", "east")
LEVELS: Mapping[tuple[str, Whose], float] = {
    ("cobo", "own"): 3.0,
    ("cobo", "others"): 1.5,
    ("local", "own"): 2.5,
    ("local", "others"): 0.02,
}


def over(value: float) -> OverMembers:
    mean = Estimate(value=value, low=value - 0.01, high=value + 0.01, n=3)
    return OverMembers(mean=mean, least=0.5 * value, most=1.5 * value)


def audit() -> AuditTable:
    gaps, extraction, membership, ranks, members = [], [], [], [], []
    for copies in (1, 10):
        flat = Estimate(value=0.0, low=-0.1, high=0.1, n=18)
        gaps.append(LikelihoodGap(model=BASE, copies=copies, inserted=flat, control=flat, gap=flat))
        for (arm, whose), level in LEVELS.items():
            value = level * (1.0 if copies == 10 else 0.1)
            for name in NAMES:
                cell = {"model": f"{arm}/{name}", "copies": copies, "whose": whose}
                gaps.append(LikelihoodGap(**cell, inserted=flat, control=flat, gap=flat))
                for inserted in (True, False):
                    out = share(0.5 if inserted and level > 2 and copies == 10 else 0.0, 4)
                    shares = dict.fromkeys(("exact", "matched", "bleu", "approximate"), out)
                    about = {"prefix": "20 tokens", "prefix_tokens": 20, "inserted": inserted}
                    extraction.append(Extraction(**cell, **about, **shares))
                membership.append(Membership(**cell, records="canaries", score="ratio", auc=share(0.5, 8)))
                p = 1e-6 if (arm, whose, copies) == ("cobo", "others", 10) and name != "east" else 0.4
                ranks.append(RankTest(**cell, planted=4, controls=4, p=p))
            figures = {"gap": over(value), "exact": over(0.5), "exact_controls": over(0.0), "auc": over(0.6)}
            members.append(KeptByMembers(arm=arm, whose=whose, copies=copies, **figures, exposure=over(2.0)))
    membership.append(
        Membership(
            model="cobo/north", copies=None, whose="own", records="records of north", score="ratio", auc=share(0.7, 20)
        )
    )
    return AuditTable(
        extraction=tuple(extraction),
        gaps=tuple(gaps),
        membership=tuple(membership),
        ranks=tuple(ranks),
        members=tuple(members),
        canaries=18,
        controls=18,
        seed=0,
    )


@pytest.fixture
def page(tmp_path: Path) -> Path:
    run = RunFolder(tmp_path)
    run.write_table("audit", audit())
    (tmp_path / "recipe.toml").write_text("[canaries]\n")
    return write_report(tmp_path)


def test_says_plainly_in_whose_models_the_others_canaries_show(page: Path) -> None:
    section = part(body_of(page), "memorisation")
    cobo, local = [said(item) for item in section.findall("ul[@class='answers']/li")]
    assert cobo.startswith(
        "▲ passed oncobo: in 2 of 3 members’ models, planted canaries of other members rank above controls beyond "
        "chance (north, south; p ≤ 10⁻⁶ each). They recite 0 of 24 planted, 0 of 24 controls of others."
    )
    assert "Own canaries with 10 copies are +3.00 nats per token likelier than controls; 6 of 24 planted" in cobo
    assert local.startswith("○ nothing shown to passlocal: none of 3 members’ models is shown to know another")
    assert "least p of 6 tests: 0.40" in local
    summary = said(body_of(page))
    assert "2 of 6members’ models that know others’ canaries" in summary
    assert "In cobo, members’ own models tell planted canaries of other members" in summary


def test_an_arm_s_members_are_a_row_and_each_model_is_there_to_unfold(page: Path) -> None:
    section = part(body_of(page), "memorisation")
    arms = table_of(section, "Members’ own models")
    assert [row[:2] for row in arms[1:]] == [["cobo", "1"], ["cobo", "10"], ["local", "1"], ["local", "10"]]
    assert arms[2][2:5] == ["+3.00+1.50 to +4.50", "+1.50+0.75 to +2.25", "50 %25 % to 75 %; controls 0 %"]
    models = table_of(section, "Each member’s own model")
    assert len(models) == 1 + 2 * 2 * 2 * len(NAMES)
    marked = [row[:3] for row in models if "▲ above chance" in row[-1]]
    assert marked == [["cobo/north", "others’", "10"], ["cobo/south", "others’", "10"]]
    records = table_of(section, "Training records told from held-out ones")
    assert records[1][:3] == ["cobo/north", "own", "records of north"]


def test_they_stay_out_of_what_is_said_of_models_that_all_share(page: Path) -> None:
    section = part(body_of(page), "memorisation")
    gaps = table_of(section, "Mean log-likelihood per token")
    assert {row[0] for row in gaps[1:]} == {"base model"}


@pytest.mark.parametrize("width", [80, 100])
def test_the_terminal_has_a_row_for_an_arm_s_members_and_says_what_passed(width: int) -> None:
    out = StringIO()
    show_audit(Console(file=out, width=width), audit())
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    rows = [" ".join(line.split()) for line in lines]
    assert rows.index("cobo") < rows.index("own ×10 +3.00 (+1.50 to +4.50) 50 0 2.0 0.60 (0.30 to 0.90)")
    assert rows.index("local") < rows.index("others ×10 +0.02 (+0.01 to +0.03) 50 0 2.0 0.60 (0.30 to 0.90)")
    text = " ".join(out.getvalue().split())
    assert "cobo: 2 of 3 models know other members' planted canaries above chance: north, south." in text
    assert "local: none of 3 models is shown to know another member's planted canaries." in text
    assert "cobo/north" not in text
