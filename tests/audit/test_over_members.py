"""An arm's members in one row: means, intervals over members, and the range."""

from collections.abc import Sequence

from allmend.audit.memorisation import Findings
from allmend.audit.over_members import kept_by_members
from allmend.intervals import mean
from allmend.results import Estimate, Exposure, Extraction, LikelihoodGap, Membership, Whose

CELLS: tuple[tuple[Whose, int], ...] = (("own", 1), ("own", 10), ("others", 1), ("others", 10))


def about(value: float) -> Estimate:
    return Estimate(value=value, n=5)


def findings(model: str, level: float, cells: Sequence[tuple[Whose, int]] = CELLS) -> Findings:
    """Every figure is `level`, more with ten copies, less of others' canaries; bits are 10 × that, controls a tenth."""
    gaps, extraction, exposure, membership = [], [], [], []
    for whose, copies in cells:
        value = level * (2 if copies == 10 else 1) / (4 if whose == "others" else 1)
        cell = {"model": model, "copies": copies, "whose": whose}
        gaps.append(LikelihoodGap(**cell, inserted=about(0), control=about(0), gap=about(value)))
        membership.append(Membership(**cell, records="canaries", score="ratio", auc=about(value)))
        membership.append(Membership(**cell, records="canaries", score="loss", auc=about(0.9)))
        for inserted, share in ((True, value), (False, value / 10)):
            for prefix, tokens, more in (("20 tokens", 20, 1.0), ("10 tokens", 10, 0.0)):
                shares = dict.fromkeys(("exact", "matched", "bleu", "approximate"), about(share * more))
                row = {"inserted": inserted, "prefix": prefix, "prefix_tokens": tokens}
                extraction.append(Extraction(**cell, **row, **shares))
            for slot, bits in (("ward", 15 * share), ("town", 5 * share)):
                known = {"inserted": inserted, "slot": slot, "values": 100, "compared": 100}
                exposure.append(Exposure(**cell, **known, exposure=about(bits)))
    return Findings(
        model=model,
        extraction=tuple(extraction),
        discoverable=(),
        gaps=tuple(gaps),
        exposure=tuple(exposure),
        membership=tuple(membership),
        epsilon=(),
        probes=(),
        skipped=0,
        refused=(),
        identifiers={},
        ranks=(),
        readings=(),
        group_readings={},
    )


def test_a_row_is_the_mean_over_members_and_their_range() -> None:
    levels = (0.2, 0.1, 0.4)
    rows = kept_by_members("cobo", [findings(f"cobo/{place}", level) for place, level in enumerate(levels)])
    assert [(row.arm, row.whose, row.copies) for row in rows] == [("cobo", *cell) for cell in CELLS]
    for row in rows:
        factor = (2 if row.copies == 10 else 1) / (4 if row.whose == "others" else 1)
        expected = mean([factor * level for level in levels])
        for found, times in ((row.gap, 1), (row.exact, 1), (row.exact_controls, 0.1), (row.exposure, 10), (row.auc, 1)):
            assert found is not None
            assert abs(found.mean.value - times * expected.value) < 1e-12
            assert (found.mean.n, found.least, found.most) == (3, min(found.least, found.mean.value), found.most)
            assert abs(found.most - times * factor * 0.4) < 1e-12
            assert abs(found.least - times * factor * 0.1) < 1e-12
        assert row.gap is not None
        assert row.gap.mean.low is not None
        assert expected.low is not None
        assert abs(row.gap.mean.low - expected.low) < 1e-12


def test_a_member_without_such_canaries_is_not_counted() -> None:
    rows = kept_by_members("cobo", [findings("cobo/a", 0.1), findings("cobo/b", 0.2, CELLS[1:])])
    assert [(row.whose, row.copies, row.gap.mean.n) for row in rows if row.gap] == [
        ("own", 1, 1),
        ("own", 10, 2),
        ("others", 1, 2),
        ("others", 10, 2),
    ]
    assert kept_by_members("fedavg", []) == []
