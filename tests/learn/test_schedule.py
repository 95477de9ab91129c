import math
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allmend.learn.schedule import batches, learning_rate, steps_per_round
from allmend.recipe import Train


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 2**48), st.integers(0, 40))
def test_epochs_are_permutations_and_any_start_continues(records: int, size: int, seed: int, first: int) -> None:
    per_epoch = math.ceil(records / size)
    stream = list(islice(batches(records, size, seed=seed, first=0), first + 3 * per_epoch))
    for start in range(0, len(stream) - per_epoch + 1, per_epoch):
        epoch = stream[start : start + per_epoch]
        assert sorted(index for batch in epoch for index in batch) == list(range(records))
        assert all(len(batch) == size for batch in epoch[:-1])
    assert list(islice(batches(records, size, seed=seed, first=first), 3 * per_epoch)) == stream[first:]


def test_epochs_and_seeds_differ() -> None:
    one = list(islice(batches(50, 50, seed=1, first=0), 2))
    assert one[0] != one[1]
    assert one[0] != next(batches(50, 50, seed=2, first=0))


@given(st.integers(1, 60), st.integers(0, 20), st.sampled_from(["cosine", "constant"]))
def test_the_schedule_rises_and_falls(total: int, warmup: int, schedule: str) -> None:
    settings = Train(learning_rate=0.1, warmup_steps=warmup, schedule=schedule)
    rates = [learning_rate(step, total, settings) for step in range(total)]
    assert all(0 < rate <= 0.1 + 1e-15 for rate in rates)
    rising, falling = rates[: warmup + 1], rates[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if warmup < total:
        assert falling[0] == 0.1
    if schedule == "constant":
        assert set(falling) <= {0.1}
    else:  # point symmetry of the half cosine around its middle
        assert learning_rate(max(total, warmup), total, settings) == pytest.approx(0.0 if total > warmup else 0.1)
        span = total - warmup
        assert all(
            learning_rate(warmup + step, total, settings) + learning_rate(total - step, total, settings)
            == pytest.approx(0.1)
            for step in range(span)
        )


@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 5))
def test_steps_of_whole_epochs_are_their_batches(records: int, size: int, epochs: int) -> None:
    steps = steps_per_round(records, Train(batch_size=size, local_epochs=float(epochs)))
    seen = [index for batch in islice(batches(records, size, seed=0, first=0), steps) for index in batch]
    assert sorted(seen) == sorted(list(range(records)) * epochs)


def test_steps_per_round() -> None:
    assert steps_per_round(7, Train(batch_size=4)) == 2
    assert steps_per_round(40, Train(batch_size=4, local_epochs=0.25)) == 3
    assert steps_per_round(3, Train(batch_size=4, local_epochs=0.01)) == 1
    assert steps_per_round(7, Train(local_steps=5)) == 5
