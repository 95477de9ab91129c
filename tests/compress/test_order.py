"""Orders: the counterexamples, the sum bound, and what a dot product comes to."""

from dataclasses import replace

import pytest
import torch

from allmend.compress.masks import NofM, Pattern, Unstructured, keep_mask
from allmend.compress.order import dot_product, order_analysis, prune_then_quantize, quantize_then_prune
from allmend.models.formats import Format, Integers, format_named, quantize

FORMATS = [format_named(name) for name in ("int8", "int6", "int4", "hbfp6", "mxfp8", "mxfp4")]
NARROW = Integers("int4", 4, 16, 4, narrow=True)


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def norm(error: torch.Tensor) -> float:
    return float(error.double().norm())


def test_ties_that_are_told_apart_by_place_break_the_sum_bound() -> None:
    """(7, 3.51, 4.49, 0), int4, 2:4: 3.51 and 4.49 both become 4, and the wrong one stays."""
    weight = torch.tensor([[7.0, 4.49, 3.51, 0.0]])
    pattern, quantized = NofM(2, 4), quantize(weight, NARROW)
    assert quantized.tolist() == [[7.0, 4.0, 4.0, 0.0]]
    late = quantize_then_prune(weight, torch.abs, pattern, NARROW)
    bound = norm(weight - quantized) + norm(weight * ~keep_mask(weight.abs(), pattern))
    assert bound == pytest.approx(0.693 + 3.51, abs=1e-3)
    assert norm(weight - late) == pytest.approx(4.517, abs=1e-3)
    assert norm(weight - late) > bound
    assert norm(weight - prune_then_quantize(weight, torch.abs, pattern, NARROW)) <= bound
    report = order_analysis(weight, torch.eye(4), pattern, NARROW)
    assert (report.sq.over_bound, report.qs.over_bound) == (0, 1)
    assert report.moved == 0.5


def test_groups_over_several_blocks_turn_the_order_without_a_tie() -> None:
    """(15, 1, 0, 0 | 0.9, 0, 0, 0): 1 becomes 0 beside 15, and 0.9 stays as it is."""
    weight = torch.tensor([[15.0, 1.0, 0.0, 0.0, 0.9, 0.0, 0.0, 0.0]])
    late = quantize_then_prune(weight, torch.abs, Unstructured(0.75), NARROW)
    assert late[0].nonzero()[:, 0].tolist() == [0, 4]
    assert prune_then_quantize(weight, torch.abs, Unstructured(0.75), NARROW)[0, 4] == 0


def test_without_the_largest_magnitude_the_step_is_another() -> None:
    """(7, 5, 3, 0) without the 7: quantising alone costs nothing, and after pruning it does."""
    weight = torch.tensor([[7.0, 5.0, 3.0, 0.0]])
    assert torch.equal(quantize(weight, NARROW), weight)
    keep = torch.tensor([[False, True, True, False]])
    both = quantize(weight * keep, NARROW)
    assert norm(weight - both) > norm(weight * ~keep)
    assert torch.equal(quantize(weight * keep, NARROW, scale_from=weight), weight * keep)


def test_affine_ranges_break_the_identity() -> None:
    fmt = format_named("int4_affine", group=32)
    weight = random(4, 32)
    keep = keep_mask(weight.abs(), NofM(2, 4))
    assert not torch.equal(quantize(weight * keep, fmt), keep * quantize(weight, fmt)) or not fmt.max_scaled


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("rounded", [False, True])
def test_where_the_original_decides_ties_both_orders_are_one(fmt: Format, rounded: bool) -> None:
    """As long as a group lies in one block, and the format takes no side: −8 has a code where 8 has none."""
    weight = random(8, 128, seed=2)
    if rounded:
        weight = (3 * weight).round()
        fmt = replace(fmt, narrow=True) if isinstance(fmt, Integers) else fmt
    for pattern in (NofM(2, 4), NofM(1, 4)):
        late = quantize_then_prune(weight, torch.abs, pattern, fmt, original_decides=True)
        assert torch.equal(late, prune_then_quantize(weight, torch.abs, pattern, fmt))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NofM(2, 4)], ids=str)
def test_pruned_first_no_row_is_over_the_bound(fmt: Format, pattern: Pattern) -> None:
    weight, x = random(64, 128, seed=4), random(300, 128, seed=5)
    report = order_analysis(weight, x.T @ x, pattern, fmt)
    assert report.sq.over_bound == 0
    assert report.sq.weights <= report.qs.weights * (1 + 1e-9)
    assert report.rows == 64


def test_errors_at_the_output_are_those_of_the_outputs() -> None:
    weight, x = random(6, 64), random(100, 64, seed=1)
    fmt, pattern = format_named("int4"), Unstructured(0.5)
    report = order_analysis(weight, x.T @ x, pattern, fmt)
    for found, changed in (
        (report.quantized, quantize(weight, fmt)),
        (report.pruned, weight * keep_mask(weight.abs(), pattern)),
        (report.sq, prune_then_quantize(weight, torch.abs, pattern, fmt)),
        (report.qs, quantize_then_prune(weight, torch.abs, pattern, fmt)),
        (report.size, torch.zeros_like(weight)),
    ):
        error = (weight - changed).double()
        assert found.weights == pytest.approx(float(error.square().sum()), rel=1e-9)
        assert found.output == pytest.approx(float((x.double() @ error.T).square().sum()), rel=1e-5)
    assert report.gap == pytest.approx(report.sq.output - report.quantized.output - report.pruned.output)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("exact", [False, True])
def test_the_parts_of_a_dot_product_s_error(fmt: Format, exact: bool) -> None:
    for seed in range(20):
        x, weight = random(1, 64, seed=seed)[0], random(1, 64, seed=100 + seed)[0]
        keep = keep_mask(weight[None].abs(), NofM(2, 4))[0]
        found = dot_product(x, weight, keep, (lambda x: x) if exact else (lambda x: quantize(x[None], fmt)[0]), fmt)
        assert found.both == pytest.approx(found.quantized + found.pruned - found.gap, abs=1e-10)
        assert abs(found.gap) <= found.bound + 1e-12
        assert found.gap != 0
