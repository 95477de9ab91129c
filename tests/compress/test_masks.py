"""Masks by brute force, and what they may not do."""

import itertools

import pytest
import torch

from allmend.compress.masks import (
    NofM,
    Pattern,
    Unstructured,
    damped,
    keep_mask,
    kept,
    magnitude,
    obs,
    pattern_named,
    wanda,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.29, 0.5, 0.7, 0.99])
@pytest.mark.parametrize("columns", [1, 7, 100])
def test_a_share_of_each_row_goes_and_no_more(share: float, columns: int) -> None:
    score = random(5, columns).abs()
    keep = keep_mask(score, Unstructured(share))
    gone = round(share * 100) * columns // 100
    assert (~keep).sum(1).tolist() == [gone] * 5
    for row, stays in zip(score, keep, strict=True):
        assert not stays.all() or gone == 0
        if 0 < gone < columns:
            assert row[stays].min() >= row[~stays].max()


def test_a_share_of_the_tensor() -> None:
    score = random(5, 20).abs()
    score[0] *= 100
    keep = keep_mask(score, Unstructured(0.5, "tensor"))
    assert keep.sum() == 50
    assert keep[0].all()
    assert score[keep].min() >= score[~keep].max()


def test_of_each_group_those_that_score_most() -> None:
    score = random(3, 16).abs()
    keep = keep_mask(score, NofM(2, 4))
    for row in range(3):
        for first in range(0, 16, 4):
            group = score[row, first : first + 4]
            best = max(itertools.combinations(range(4), 2), key=lambda pair: float(group[list(pair)].sum()))
            assert keep[row, first : first + 4].nonzero()[:, 0].tolist() == sorted(best)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.5, "tensor"), NofM(2, 4)])
def test_equal_scores_are_told_apart_by_the_tie_and_then_by_place(pattern: Pattern) -> None:
    score = torch.ones(1, 8)
    assert keep_mask(score, NofM(2, 4)).tolist() == [[False, False, True, True] * 2]
    tie = torch.tensor([[5.0, 1.0, 6.0, 2.0, 7.0, 3.0, 8.0, 4.0]])
    assert keep_mask(score, pattern, tie=tie).tolist() == [[True, False] * 4]
    score[0, 1] = 2.0  # the score goes first
    assert keep_mask(score, pattern, tie=tie)[0, 1]


@pytest.mark.parametrize("pattern", [None, NofM(2, 4), Unstructured(0.3), Unstructured(0.29, "tensor")])
def test_how_many_stay_is_known_beforehand(pattern: Pattern | None) -> None:
    score = random(5, 100).abs()
    found = 500 if pattern is None else int(keep_mask(score, pattern).sum())
    assert kept(pattern, (5, 100)) == found


def test_columns_must_be_cut_into_groups() -> None:
    with pytest.raises(ValueError, match="6 columns cannot be cut into groups of 4"):
        keep_mask(torch.ones(2, 6), NofM(2, 4))


def test_scores() -> None:
    weight, x = random(4, 6), random(50, 6, seed=1).double()
    assert torch.equal(magnitude(weight), weight.abs())
    norm = x.norm(dim=0)
    assert torch.allclose(wanda(weight, norm.float()), weight.abs() * norm.float())
    hessian = x.T @ x
    wide = weight.double()
    # what is lost if one weight goes and the others of its row are fitted again
    found = obs(wide, hessian, damping=0.0)
    for row, column in ((0, 0), (3, 4)):
        rest = [place for place in range(6) if place != column]
        target = x @ wide[row]
        fitted = torch.linalg.lstsq(x[:, rest], target[:, None]).solution[:, 0]
        lost = (target - x[:, rest] @ fitted).square().sum()
        assert float(found[row, column]) == pytest.approx(float(lost), rel=1e-9)


def test_damping_leaves_an_inverse() -> None:
    hessian = torch.zeros(3, 3)
    hessian[0, 0] = 6.0
    assert damped(hessian, 0.5).diagonal().tolist() == [7.0, 2.0, 2.0]
    assert damped(torch.zeros(2, 2), 0.1).diagonal().tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("text", "expected"), [("none", None), ("0.5", Unstructured(0.5)), ("2:4", NofM(2, 4))])
def test_patterns_have_names(text: str, expected: Pattern | None) -> None:
    assert pattern_named(text) == expected


@pytest.mark.parametrize("text", ["half", "1.0", "-0.1", "5:4", "0:4", "2:4:8", "nan", ""])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no sparsity"):
        pattern_named(text)
