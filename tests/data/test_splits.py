import pytest
from hypothesis import given
from hypothesis import strategies as st

from allmend.data.records import Record
from allmend.data.splits import is_held_out, split, uniform

shares = st.floats(0, 1)


@given(st.text(), st.text())
def test_uniform_lies_in_the_half_open_unit_interval(id: str, salt: str) -> None:
    assert 0 <= uniform(id, salt=salt) < 1


def test_uniform_is_spread_evenly() -> None:
    n = 20_000
    values = sorted(uniform(str(i)) for i in range(n))
    # Kolmogorov–Smirnov distance to the uniform distribution; 1.95/√n is exceeded once in a thousand draws
    assert max(max((i + 1) / n - u, u - i / n) for i, u in enumerate(values)) < 1.95 / n**0.5


def test_another_salt_gives_an_independent_split() -> None:
    both = [(is_held_out(str(i), 0.5, salt="a"), is_held_out(str(i), 0.5, salt="b")) for i in range(10_000)]
    assert sum(a and b for a, b in both) / len(both) == pytest.approx(0.25, abs=0.02)


def test_salt_and_id_do_not_run_together() -> None:
    assert uniform("bc", salt="a") != uniform("c", salt="ab")


@given(st.text(), shares, shares)
def test_what_is_held_out_stays_held_out_at_a_larger_share(id: str, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert is_held_out(id, high) or not is_held_out(id, low)
    assert not is_held_out(id, 0)
    assert is_held_out(id, 1)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_the_unit_interval_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        is_held_out("x", share)


record_lists = st.lists(
    st.builds(Record, id=st.text(), text=st.just("t"), held_out=st.sampled_from([None, True, False])),
    unique_by=lambda record: record.id,
)


@given(record_lists, st.floats(0, 1, exclude_max=True))
def test_split_is_a_partition_that_honours_the_data(records: list[Record], share: float) -> None:
    train, held_out = split(records, share)
    assert sorted([*train, *held_out], key=records.index) == records
    assert not any(record.held_out for record in train)
    assert not any(record.held_out is False for record in held_out)
    assert train or all(record.held_out for record in records)


@given(record_lists.filter(lambda records: any(r.held_out is False for r in records)), shares, st.integers(0, 20))
def test_a_record_falls_on_the_same_side_whatever_stands_beside_it(
    records: list[Record], share: float, drop: int
) -> None:
    anchor = next(record for record in records if record.held_out is False)
    fewer = [record for i, record in enumerate(records) if i != drop or record is anchor]
    assert set(split(fewer, share)[0]) == set(split(records, share)[0]) & set(fewer)


def test_one_record_is_learnt_from_whatever_its_hash() -> None:
    for i in range(50):
        train, held_out = split([Record(str(i), text="t")], 0.9)
        assert len(train) == 1
        assert not held_out


def test_a_share_of_one_holds_out_everything() -> None:
    assert split([Record("a", text="t")], 1.0) == ((), (Record("a", text="t"),))
