import pytest
import torch

from allmend.optim import LionA, trapezoidal_schedule


@pytest.mark.parametrize(("warmup", "cooldown"), [(0, None), (5, 4), (0, 0), (10, 10)])
def test_it_rises_stays_and_falls_to_nothing(warmup: int, cooldown: int | None) -> None:
    optimizer = LionA([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = trapezoidal_schedule(optimizer, steps=20, warmup=warmup, cooldown=cooldown)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    down = 10 if cooldown is None else cooldown
    expected = [
        2.0 * min(step / warmup if step < warmup else 1.0, (20 - step) / down if down else 1.0) for step in range(20)
    ]
    assert rates == pytest.approx(expected)


def test_parts_that_are_longer_than_the_whole_are_refused() -> None:
    optimizer = LionA([torch.nn.Parameter(torch.zeros(1))])
    for warmup, cooldown in ((11, 10), (-1, 0)):
        with pytest.raises(ValueError, match="20 steps have no room"):
            trapezoidal_schedule(optimizer, steps=20, warmup=warmup, cooldown=cooldown)
