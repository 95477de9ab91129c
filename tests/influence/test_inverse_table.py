"""Timing with a clock of its own, and who wins by it."""

import itertools

import pytest
import torch

from allmend.influence import inverse_table
from allmend.influence.inverse_table import (
    ROUNDS,
    WAYS,
    Timing,
    eigenvalues,
    fastest_of,
    spectrum_matrices,
    time_inverses,
    verdict,
)


def timing(seconds: dict[str, tuple[float, ...]], error: float = 1e-6) -> Timing:
    return Timing(
        batch=1,
        size=8,
        condition=9.0,
        seconds=seconds,
        error={name: error for name, one in seconds.items() if one},
        steps=3,
    )


CHOLESKY = {"cholesky": (1.0, 1.1), "eigen": (4.0, 5.0), "hyperpower": (8.0, 9.0), "full_inverse": (0.5, 0.5)}
HYPERPOWER = CHOLESKY | {"hyperpower": (0.2, 0.3)}


def test_matrices_have_the_spectrum_and_a_mean_damped_by_a_tenth() -> None:
    (one, other) = spectrum_matrices(2, 12, seed=0)
    assert torch.allclose(torch.linalg.eigvalsh(one), eigenvalues(12).flip(0), atol=1e-12)
    assert torch.allclose(torch.linalg.eigvalsh(other), eigenvalues(12).flip(0), atol=1e-12)
    power = torch.tensor([1 / j for j in range(1, 13)], dtype=torch.float64)
    assert torch.allclose(eigenvalues(12), power + power.sum() / 120)


def test_every_way_solves_and_takes_its_turn_in_every_round() -> None:
    ticks = itertools.count()
    (found, other) = time_inverses([(3, 6), (1, 9)], device=torch.device("cpu"), clock=lambda: next(ticks) / 1000)
    assert (found.batch, found.size, other.size) == (3, 6, 9)
    for one in (found, other):
        assert all(len(seconds) == ROUNDS for seconds in one.seconds.values())
        assert one.seconds.keys() == one.error.keys() == WAYS.keys()
        assert all(error < 1e-3 for error in one.error.values())
        assert one.error["cholesky"] < 1e-5
        assert one.steps is not None
    matrices = spectrum_matrices(3, 6, seed=0)
    assert found.condition == pytest.approx(float(torch.linalg.cond(matrices).max()))


def test_the_first_of_short_rounds_is_a_warm_up() -> None:
    ticks = itertools.count()
    (found,) = time_inverses([(1, 4)], device=torch.device("cpu"), clock=lambda: 1e-6 * next(ticks) ** 2)
    # every call looks at the clock twice, and between the looks numbered t and t + 1 lie 2 t + 1
    turns = [sorted(round(1e6 * one) for one in found.seconds[name]) for name in WAYS]
    per_round = 2 * len(WAYS)
    first = [2 * (per_round + 2 * place) + 1 for place in range(len(WAYS))]
    assert [one[0] for one in turns] == first


@pytest.mark.parametrize(("long", "rounds"), [(1e-9, inverse_table.FEW_ROUNDS), (1e9, ROUNDS)])
def test_long_rounds_are_few(long: float, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inverse_table, "LONG", long)
    (found,) = time_inverses([(1, 4)], device=torch.device("cpu"))
    assert len(found.seconds["cholesky"]) == rounds


def test_one_that_gives_up_has_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def indefinite(batch: int, size: int, *, seed: int) -> torch.Tensor:
        return torch.diag_embed(torch.tensor([[1.0, -1.0]] * batch, dtype=torch.float64))

    monkeypatch.setattr(inverse_table, "spectrum_matrices", indefinite)
    monkeypatch.setitem(WAYS, "full_inverse", torch.linalg.solve)
    (found,) = time_inverses([(1, 2)], device=torch.device("cpu"))
    assert [name for name, seconds in found.seconds.items() if seconds] == ["full_inverse"]
    assert found.steps is None
    assert found.winner == "cholesky"


@pytest.mark.parametrize(
    ("change", "winner"),
    [
        ({}, "cholesky"),
        ({"hyperpower": (0.2, 0.3)}, "hyperpower"),
        ({"hyperpower": (0.2, 1.05)}, "cholesky"),  # its rounds overlap with Cholesky's
        ({"eigen": (0.1, 0.1), "hyperpower": (0.2, 0.3)}, "eigen"),
        ({"cholesky": ()}, "eigen"),
    ],
)
def test_another_wins_only_clearly(change: dict[str, tuple[float, ...]], winner: str) -> None:
    assert timing(CHOLESKY | change).winner == winner


def test_an_inaccurate_one_does_not_win() -> None:
    fast = timing(HYPERPOWER)
    assert fast.model_copy(update={"error": fast.error | {"hyperpower": 0.01}}).winner == "cholesky"


def test_the_verdict_is_one_sentence_with_who_wins_and_what_auto_takes() -> None:
    a, b = timing(CHOLESKY), timing(HYPERPOWER)
    assert fastest_of([a, a]) == "cholesky"
    assert fastest_of([b, b]) == "hyperpower"
    assert fastest_of([a, b]) == "cholesky"  # not at every size
    words = verdict([a, a])
    assert words.startswith("Cholesky's factors win at 2 of 2 sizes, 4.3 to 8.1 times as fast as the others")
    assert words.endswith("`--inverse auto` takes cholesky on this device.")
    assert verdict([b, b]).startswith("The hyperpower iteration wins at 2 of 2 sizes")
    assert "takes hyperpower" in verdict([b, b])
    assert "takes cholesky" in verdict([a, b, b])
    assert verdict([b], lasting=False).endswith("goes by the usual sizes, and does not change.")
