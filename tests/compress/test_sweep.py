"""The sweep against one that solves for all columns that are left, after each."""

from typing import Any

import pytest
import torch

from allmend.compress.masks import NofM, Pattern, Unstructured, keep_mask
from allmend.compress.order import output_error
from allmend.compress.sweep import prune_and_quantize
from allmend.models.formats import Format, Scale, format_named, quantize

FORMATS = [None, format_named("int4", group=32), format_named("int8"), format_named("int4_affine", group=32),
           format_named("mxfp4"), format_named("nvfp4"), format_named("hbfp6")]  # fmt: skip
PATTERNS = [None, Unstructured(0.5), NofM(2, 4)]


def problem(rows: int, columns: int, *, seed: int = 0, tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mixed = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ (mixed + torch.eye(columns))
    return weight, x.T @ x


def textbook(weight: torch.Tensor, hessian: torch.Tensor, pattern: Pattern | None, fmt: Format | None) -> torch.Tensor:
    """Column after column: those that are left are moved by −(w_j − q_j) / [H_F⁻¹]_jj [H_F⁻¹]_j, H_F of those left."""
    left, columns = weight.clone(), weight.shape[1]
    wide = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    keep = torch.ones_like(weight, dtype=torch.bool)
    block = columns if fmt is None else fmt.blocks(weight).shape[-1]
    largest, scale = weight.abs().max().float(), Scale(torch.ones(1))

    def chosen(first: int, last: int) -> torch.Tensor:
        scores = []
        for column in range(first, last):
            inverse = torch.linalg.inv(wide[column:, column:])
            scores.append(left[:, column].square() / inverse[0, 0])
        assert pattern is not None
        return keep_mask(torch.stack(scores, dim=1), pattern)

    for column in range(columns):
        if isinstance(pattern, Unstructured) and column % 128 == 0:
            keep[:, column : column + 128] = chosen(column, min(column + 128, columns))
        if isinstance(pattern, NofM) and column % pattern.m == 0:
            keep[:, column : column + pattern.m] = chosen(column, column + pattern.m)
        if fmt is not None and column % block == 0:
            stays = keep[:, column : column + block].clone()
            if isinstance(pattern, NofM):
                stays = chosen(column, column + block)
            scale = fmt.scales((left[:, column : column + block] * stays).float(), largest)
        own = left[:, column].clone()
        new = own if fmt is None else fmt.values(fmt.codes(own.float()[:, None], scale), scale)[:, 0].double()
        new = torch.where(keep[:, column], new, 0)
        inverse = torch.linalg.inv(wide[column:, column:])
        left[:, column:] -= torch.outer((own - new) / inverse[0, 0], inverse[0])
        left[:, column] = new
    return left


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: getattr(fmt, "name", "none"))
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_it_is_the_textbook_s(fmt: Format | None, pattern: Pattern | None) -> None:
    weight, hessian = problem(5, 64)
    found = prune_and_quantize(weight, hessian, pattern, fmt)
    assert torch.allclose(found.weight, textbook(weight, hessian, pattern, fmt), rtol=0, atol=1e-8)
    if pattern is None and fmt is None:
        assert torch.equal(found.weight, weight)


def test_it_is_the_textbook_s_beyond_one_stretch_of_columns() -> None:
    weight, hessian = problem(2, 160, tokens=400)
    for pattern, fmt in ((Unstructured(0.5), FORMATS[1]), (NofM(2, 4), FORMATS[2])):
        found = prune_and_quantize(weight, hessian, pattern, fmt)
        assert torch.allclose(found.weight, textbook(weight, hessian, pattern, fmt), rtol=0, atol=1e-8)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: getattr(fmt, "name", "none"))
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_of_white_inputs_it_is_rounding_and_masking(fmt: Format | None, pattern: Pattern | None) -> None:
    weight = problem(5, 64)[0].float()
    found = prune_and_quantize(weight, torch.eye(64), pattern, fmt)
    masked = weight if pattern is None else weight * keep_mask(weight.abs(), pattern)
    assert torch.allclose(found.weight, masked if fmt is None else quantize(masked, fmt), atol=1e-6)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: getattr(fmt, "name", "none"))
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_rows_do_not_know_of_each_other(fmt: Format | None, pattern: Pattern | None) -> None:
    weight, hessian = problem(6, 64, seed=1)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    found, turned = (prune_and_quantize(one, hessian, pattern, fmt).weight for one in (weight, weight[order]))
    assert torch.equal(found[order], turned)


def test_the_output_s_error_is_less_than_without_making_up_for_it() -> None:
    better, tried = 0, 0
    for seed in range(20):
        weight, hessian = problem(16, 64, seed=seed)
        for pattern, fmt in ((None, FORMATS[1]), (Unstructured(0.5), None), (NofM(2, 4), FORMATS[1])):
            found = prune_and_quantize(weight, hessian, pattern, fmt)
            plain = weight * found.keep if fmt is None else quantize(weight * found.keep, fmt)
            better += output_error(weight - found.weight, hessian) <= output_error(weight - plain, hessian)
            tried += 1
    assert better >= 0.95 * tried


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.3), NofM(2, 4)], ids=str)
def test_as_many_zeros_as_asked_for(pattern: Any) -> None:
    weight, hessian = problem(4, 192, tokens=500)
    found = prune_and_quantize(weight, hessian, pattern, None)
    zeros = (~found.keep).sum(1)
    assert torch.equal(found.weight == 0, ~found.keep)
    assert zeros.tolist() == [int(pattern.share * 192)] * 4
    if isinstance(pattern, NofM):
        assert bool((found.keep.view(4, -1, 4).sum(-1) == 2).all())


def test_inputs_that_are_never_there_go_first() -> None:
    weight, hessian = problem(3, 64)
    hessian[:, [5, 9]] = 0
    hessian[[5, 9]] = 0
    found = prune_and_quantize(weight, hessian, None, FORMATS[1])
    assert found.dead == 2
    assert not found.weight[:, [5, 9]].any()
    rest = [place for place in range(64) if place not in (5, 9)]
    assert bool((found.weight[:, rest] - weight[:, rest]).abs().max() < 1)


def test_scales_are_those_of_the_values() -> None:
    weight, hessian = problem(3, 64)
    fmt = format_named("int4", group=32)
    found = prune_and_quantize(weight, hessian, Unstructured(0.5), fmt)
    assert found.scale is not None
    assert found.scale.step.shape == (3, 2, 1)
    codes = fmt.blocks(found.weight) / found.scale.step
    assert torch.equal(codes, codes.round())
    assert codes.abs().max() <= 8


def test_columns_that_cannot_be_cut_are_refused() -> None:
    weight, hessian = problem(3, 66)
    with pytest.raises(ValueError, match="groups of 4"):
        prune_and_quantize(weight, hessian, NofM(2, 4), None)
    with pytest.raises(ValueError, match="blocks of 32"):
        prune_and_quantize(weight, hessian, None, FORMATS[1])
