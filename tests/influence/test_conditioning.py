"""Figures of blocks against the matrices written out, and when they are a reason for care."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.influence.test_methods import made

from allmend.influence.blocks import FisherBlocks
from allmend.influence.conditioning import BlockFigures, block_figures, cautions
from allmend.influence.gradients import Given, mean_gradient
from allmend.influence.inverses import hyperpower
from allmend.influence.methods import Gfim


def figures(train: Given, **options: object) -> dict[str, BlockFigures]:
    _, means = mean_gradient(made(5, r=train.gradients["a"].shape[1], seed=1))
    return dict(Gfim(**options).solve(train, means).figures)  # type: ignore[arg-type]


@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 99), st.sampled_from(["wide", "rank"]))
def test_fit_is_the_share_of_the_norm_that_the_nearest_block_keeps(r: int, n: int, seed: int, side: str) -> None:
    train = made(n, r=r, seed=seed)
    for name, one in figures(train, side=side).items():
        g = train.gradients[name]
        d = g.shape[2]
        flat = g.flatten(1)
        f = flat.T @ flat / n
        four = f.view(r, d, r, d)
        if side == "wide":
            nearest = torch.kron(torch.eye(r, dtype=f.dtype), torch.einsum("idie->de", four) / r)
        else:
            nearest = torch.kron(torch.einsum("idjd->ij", four) / d, torch.eye(d, dtype=f.dtype))
        # nearest in Frobenius norm: a projection, so that the rest is at a right angle
        expected = 1 - float((f - nearest).square().sum() / f.square().sum())
        assert one.fit == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert one.fit is not None
        assert 0 < one.fit <= 1
        if r == 1 and side == "wide":
            assert one.fit == pytest.approx(1)


def test_condition_and_smallest_eigenvalue_are_those_of_the_matrix() -> None:
    train = made(40, r=3)
    for name, one in figures(train, damping=0.01).items():
        g = train.gradients[name].flatten(0, 1)
        m = g.T @ g / len(g)
        values = torch.linalg.eigvalsh(m)
        assert one.condition == pytest.approx(float(torch.linalg.cond(m + one.damping * torch.eye(len(m)))), rel=1e-8)
        assert one.smallest == pytest.approx(float(values[0] / m.trace()), rel=1e-8)
        assert (one.size, one.rows, one.dtype) == (len(m), 120, "float64")


def test_the_residual_is_what_a_solver_has_left() -> None:
    train = made(40)
    assert all(one.residual < 1e-12 for one in figures(train).values())
    loose = figures(train, inverse=hyperpower(tol=0.05))
    assert all(1e-6 < one.residual < 0.5 for one in loose.values())
    side = figures(train, side="rank")
    assert all(one.residual < 1e-12 for one in side.values())


def test_nothing_is_said_of_many_records_in_well_conditioned_blocks() -> None:
    assert cautions(figures(made(40)), 40) == ()
    assert cautions({}, 40) == ()


GOOD = {"size": 4, "rows": 100, "damping": 0.1, "smallest": 0.01, "condition": 9.0, "residual": 0.0, "fit": 0.5}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": 7}, "1 of 2 blocks is known along few directions: b sums 7 rows"),
        ({"smallest": -1e-5}, "1 of 2 blocks is no sum of squares: b has an eigenvalue of -1e-05"),
        ({"condition": 2e5}, "1 of 2 blocks is badly conditioned: b with its damping has a condition number of 2e+05"),
        ({"condition": None}, "a condition number of inf"),
        ({"residual": 0.1}, "1 of 2 blocks is solved badly: the residual of b is 0.1"),
    ],
)
def test_what_is_off_is_told_with_its_block_and_its_figure(change: dict[str, float], words: str) -> None:
    good = BlockFigures.model_validate(GOOD | {"dtype": "float32"})
    (told,) = cautions({"a": good, "b": good.model_copy(update=change)}, 40)
    assert words in told


def test_few_records_are_told_whatever_the_blocks_are() -> None:
    (told,) = cautions({}, 31)
    assert told == "Curvature comes from 31 records, fewer than 32."
    assert cautions({}, 32) == ()


def test_a_block_that_is_none_is_seen() -> None:
    matrix = torch.diag(torch.tensor([1.0, 1.0, -0.5]))
    blocks = FisherBlocks({"a": matrix * 6}, {"a": 6}, 3)
    v = torch.ones(1, 2, 3)
    one = block_figures(blocks, "a", damping=0.1, target=v, direction=v, squared_norm=None, dtype=torch.float32)
    assert one.smallest == pytest.approx(-1 / 3)
    assert one.condition is None
    assert one.fit is None
