"""The base-rate rule: no figure of extraction without that of its controls."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allmend import intervals
from allmend.report.base_rate import Outcome, Secrets, Verdict, hits, judged, outcomes, secrets_of
from allmend.results import AuditTable, Estimate, Extraction

N = 20
counts = st.integers(0, N)


def out(n: int) -> Estimate:
    return intervals.share(n, N)


def row(
    *, exact: Estimate, inserted: bool = True, prefix: str = "20 tokens", tokens: float = 20, **rest: object
) -> Extraction:
    plain = Estimate(value=0.1, n=N)
    fields = {"model": "arm", "copies": 1, "matched": plain, "bleu": plain, "approximate": plain} | rest
    return Extraction(inserted=inserted, prefix=prefix, prefix_tokens=tokens, exact=exact, **fields)  # type: ignore[arg-type]


def table(*rows: Extraction) -> AuditTable:
    return AuditTable(extraction=rows, gaps=(), canaries=N, controls=N, seed=0)


@given(counts, counts, st.booleans())
def test_what_comes_out_of_controls_as_well_is_guessed(planted: int, control: int, lucky: bool) -> None:
    verdict = judged(out(planted), out(control), lucky=lucky)
    assert (verdict is Verdict.NOTHING) == (planted == 0)
    assert (verdict is Verdict.GUESSED) == (0 < planted <= control)


@given(counts, counts, counts, st.booleans())
def test_more_out_of_canaries_or_less_out_of_controls_is_never_less_serious(
    a: int, b: int, c: int, lucky: bool
) -> None:
    few, many = sorted((a, b))
    assert judged(out(few), out(c), lucky=lucky) <= judged(out(many), out(c), lucky=lucky)
    if c:
        assert judged(out(c), out(many), lucky=lucky) <= judged(out(c), out(few), lucky=lucky)


@given(counts, counts)
def test_a_hit_that_can_be_luck_needs_intervals_apart(planted: int, control: int) -> None:
    strict, lucky = judged(out(planted), out(control)), judged(out(planted), out(control), lucky=True)
    assert lucky <= strict
    assert (lucky is Verdict.MEMORISED) == ((out(planted).low or 0) > (out(control).high or 1))


def test_one_whole_text_is_enough_where_no_control_comes_out_and_one_lucky_secret_is_not() -> None:
    assert judged(out(1), out(0)) is Verdict.MEMORISED
    assert judged(out(1), out(0), lucky=True) is Verdict.UNCLEAR


def test_without_controls_nothing_is_said_to_be_memorised() -> None:
    assert judged(out(N), None) is Verdict.UNCLEAR
    assert judged(out(0), None) is Verdict.NOTHING


def test_secrets_weigh_as_much_as_whole_texts() -> None:
    silent = row(exact=out(0), secrets={"": out(0)})
    loud = row(exact=out(0), secrets={"": out(15)})
    assert Outcome("arm", 1, loud, silent).verdict is Verdict.MEMORISED
    assert Outcome("arm", 1, loud, loud).verdict is Verdict.GUESSED
    assert Outcome("arm", 1, silent, loud).verdict is Verdict.NOTHING


@pytest.mark.parametrize("planted", [[1.0] * 8, [0.4, 0.6, 0.8, 0.6, 0.4, 0.8, 0.6, 0.6]])
def test_secrets_that_come_out_of_canaries_and_never_of_controls_are_memorised(planted: list[float]) -> None:
    shares = [[0.0] * len(planted), planted]
    silent, loud = (row(exact=out(0), secrets={"": intervals.mean_share(each)}) for each in shares)
    assert Outcome("arm", 1, loud, silent).verdict is Verdict.MEMORISED
    assert Outcome("arm", 1, silent, silent).verdict is Verdict.NOTHING


def test_a_single_secret_of_many_is_counted_as_one() -> None:
    one = {"": intervals.mean_share([0.2, *[0.0] * 7]), "a": intervals.share(1, 16), "b": intervals.share(0, 24)}
    found = secrets_of(row(exact=out(0), secrets=one))
    assert found == Secrets(1, 40, one[""])
    assert Outcome("arm", 1, row(exact=out(0), secrets=one), None).verdict is not Verdict.NOTHING
    assert secrets_of(row(exact=out(0))) is None
    assert secrets_of(None) is None


def test_outcomes_set_canaries_beside_controls_of_their_own_cell() -> None:
    rows = [
        row(copies=copies, inserted=inserted, exact=out(copies if inserted else 0), model=model)
        for copies in (10, 1)
        for inserted in (True, False)
        for model in ("arm", "other")
    ]
    found = outcomes(table(*rows[:-1]), "other")  # the last control is missing
    assert [o.copies for o in found] == [1, 10]
    assert [o.model for o in found] == ["other", "other"]
    assert found[0].control is None
    assert found[1].control is not None
    assert not found[1].control.inserted
    assert (found[1].planted.copies, found[1].control.copies) == (10, 10)


def test_hits_add_up() -> None:
    assert hits([out(3), out(0), intervals.share(2, 7)]) == (5, 2 * N + 7)
    assert hits([]) == (0, 0)


@pytest.mark.parametrize("verdict", Verdict)
def test_every_verdict_has_words_of_its_own(verdict: Verdict) -> None:
    assert [v for v in Verdict if v.words == verdict.words] == [verdict]
