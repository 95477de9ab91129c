"""Formats against brute force and against compressed-tensors."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allmend.compress.masks import NofM, Pattern, Unstructured, keep_mask
from allmend.models.formats import (
    E2M1,
    E2M3,
    E4M3,
    FORMATS,
    Format,
    Integers,
    Minifloat,
    fitted,
    format_named,
    groups_that_fit,
    quantize,
    scales_of,
    straight_through,
)

MAX_SCALED = [name for name in FORMATS if format_named(name).max_scaled]


def every_format() -> list[Format]:
    narrow = [format_named(name, range="narrow", group=32) for name in ("int8", "int6", "int4", "int3")]
    grouped = [format_named(name, group=group) for name in ("int8", "int4", "int4_affine") for group in (0, 32)]
    return [format_named(name) for name in FORMATS] + narrow + grouped


def described(fmt: Format) -> str:
    return f"{fmt.name}-{fmt.block}{'-narrow' if getattr(fmt, 'narrow', False) else ''}"


def random(rows: int, columns: int, *, seed: int = 0, scale: float = 1.0, dtype: Any = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator).double() * scale).to(dtype)


def numbers_of(element: Minifloat, exponents: int) -> torch.Tensor:
    """All numbers of a small float that are not negative, by counting their bits."""
    steps = 2**element.mantissa
    found = [number / steps * 2.0**element.least for number in range(steps)]
    for exponent in range(exponents):
        found += [(1 + number / steps) * 2.0 ** (element.least + exponent) for number in range(steps)]
    return torch.tensor([number for number in found if number <= element.largest], dtype=torch.float64)


@pytest.mark.parametrize(("element", "exponents"), [(E2M1, 3), (E2M3, 3), (E4M3, 15)])
def test_small_floats_are_the_nearest_of_all(element: Minifloat, exponents: int) -> None:
    grid = numbers_of(element, exponents)
    assert len(grid) == {E2M1: 8, E2M3: 32, E4M3: 127}[element]
    x = torch.cat([random(1, 4000, scale=size)[0] for size in (0.01, 1.0, 3.0, 200.0)] + [grid.float()])
    found = element.nearest(x).double()
    distances = (grid[None] - x.double().abs()[:, None]).abs()
    assert torch.isin(found.abs(), grid).all()
    assert torch.equal((found - x.double()).abs(), distances.amin(1))
    middles = ((grid[1:] + grid[:-1]) / 2).float()
    even = torch.where(torch.arange(len(grid) - 1) % 2 == 0, grid[:-1], grid[1:])  # its last bit is 0
    assert torch.equal(element.nearest(middles).double(), even)


def test_e4m3_is_torch_s() -> None:
    x = torch.cat([random(1, 5000, scale=size)[0] for size in (1e-3, 1.0, 150.0)])
    assert torch.equal(E4M3.nearest(x), x.clamp(-448, 448).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("fmt", every_format(), ids=described)
def test_values_are_the_nearest_that_the_scale_allows(fmt: Format) -> None:
    weight = random(6, 128, seed=1)
    scale = scales_of(weight, fmt)
    codes = fmt.codes(fmt.blocks(weight), scale)
    found = quantize(weight, fmt)

    assert torch.equal(fmt.values(codes, scale).view(6, 128), found)
    spread = _codes(fmt)
    zero = torch.zeros_like(scale.step) if scale.zero is None else scale.zero
    points = (spread[None, None, None] - zero[..., None]) * scale.step[..., None]
    nearest = (points - fmt.blocks(weight)[..., None]).abs().amin(-1).view(6, 128)
    assert torch.allclose((found - weight).abs(), nearest, rtol=1e-4, atol=1e-6)
    assert len(codes.unique()) > 4


def _codes(fmt: Format) -> torch.Tensor:
    """Every code of a format."""
    if fmt.name in ("mxfp8", "fp8"):
        one = numbers_of(E4M3, 15)
    elif fmt.name in ("mxfp4", "nvfp4"):
        one = numbers_of(E2M1, 3)
    elif fmt.name == "mxfp6":
        one = numbers_of(E2M3, 3)
    else:
        half = 2 ** (fmt.element_bits - 1)
        return torch.arange(-half + getattr(fmt, "narrow", False), half).float()
    return torch.cat([-one, one]).float()


@pytest.mark.parametrize("fmt", every_format(), ids=described)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shape_type_and_zeros_stay(fmt: Format, dtype: torch.dtype) -> None:
    weight = random(3, 64, dtype=dtype)
    weight[1] = 0
    weight[:, ::3] = 0
    found = quantize(weight, fmt)
    assert found.dtype == dtype
    assert found.shape == weight.shape
    assert not found[1].any()
    assert not found[:, ::3].any()
    assert (
        torch.equal(quantize(-weight, replace(fmt, narrow=True)), -quantize(weight, replace(fmt, narrow=True)))
        if (isinstance(fmt, Integers))
        else True
    )


@settings(deadline=None, max_examples=150)
@given(
    name=st.sampled_from(MAX_SCALED),
    narrow=st.booleans(),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    pattern=st.sampled_from([NofM(2, 4), NofM(1, 4), NofM(4, 8)]),
    rows=st.integers(1, 4),
    blocks=st.integers(1, 3),
    group=st.sampled_from([0, 32]),
    seed=st.integers(0, 10**6),
    rounded=st.sampled_from([0, 1, 2]),
)
def test_pruned_first_the_two_errors_lie_apart(
    name: str,
    narrow: bool,
    exponent: int,
    dtype: torch.dtype,
    pattern: Pattern,
    rows: int,
    blocks: int,
    group: int,
    seed: int,
    rounded: int,
) -> None:
    """q(m ⊙ x) = m ⊙ q(x) bit for bit, and ‖ε‖² is the sum of two."""
    options: dict[str, Any] = (
        {"group": group, "range": "narrow" if narrow else "full"} if name.startswith("int") else {}
    )
    fmt = format_named(name, **options)
    weight = random(rows, 32 * blocks, seed=seed)
    if rounded:  # with ties and zeros
        weight = (weight * rounded).round()
    weight = (weight.double() * 10.0**exponent).to(dtype)
    keep = keep_mask(weight.abs(), pattern)

    both = quantize(weight * keep, fmt)

    assert torch.equal(both, keep * quantize(weight, fmt))
    scale = float(weight.double().abs().max()) or 1.0
    wide, q = weight.double() / scale, quantize(weight, fmt).double() / scale
    whole = (wide - both.double() / scale).square().sum()
    apart = (wide * ~keep).square().sum() + ((wide - q) * keep).square().sum()
    assert float(whole) == pytest.approx(float(apart), rel=1e-6, abs=1e-12)
    assert float(whole.sqrt()) <= float((wide - q).norm() + (wide * ~keep).norm()) * (1 + 1e-9)


@pytest.mark.parametrize("name", MAX_SCALED)
@pytest.mark.parametrize("per", ["row", "tensor"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_pruned_first_unstructured(name: str, per: Any, share: float) -> None:
    """Blocks that keep nothing are zeros on both sides; every other one keeps its largest magnitude."""
    weight, fmt = random(5, 96, seed=3) * torch.logspace(-2, 0, 96), format_named(name)
    if fmt.block == 64:
        fmt = replace(fmt, block=32)
    keep = keep_mask(weight.abs(), Unstructured(share, per))
    assert torch.equal(quantize(weight * keep, fmt), keep * quantize(weight, fmt))


@pytest.mark.parametrize("name", ["int8", "int6", "int4", "int3"])
def test_integers_of_the_narrow_range_stay_as_they_are(name: str) -> None:
    for seed in range(3):
        for scale in (1e-20, 1.0, 1e20):
            once = quantize(random(4, 64, seed=seed, scale=scale), fmt := format_named(name, group=32, range="narrow"))
            assert torch.equal(quantize(once, fmt), once)


@pytest.mark.parametrize("fmt", every_format(), ids=described)
def test_with_the_scale_kept_nothing_changes_the_second_time(fmt: Format) -> None:
    weight = random(4, 64)
    once = quantize(weight, fmt)
    assert torch.equal(quantize(once, fmt, scale_from=weight), once)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    weight = random(2, 64)
    weight[1, 3] = bad
    for name in FORMATS:
        with pytest.raises(ValueError, match=f"not finite has no value in {name}"):
            quantize(weight, format_named(name))


def test_columns_must_be_cut_into_blocks() -> None:
    with pytest.raises(ValueError, match="48 columns cannot be cut into blocks of 32"):
        quantize(random(2, 48), format_named("mxfp4"))
    assert quantize(random(2, 48), format_named("int8")).shape == (2, 48)
    assert groups_that_fit([576, 1536]) == (64, 32)
    assert fitted(format_named("int4"), 576).block == 64
    assert fitted(format_named("int4"), 1536).block == 128
    assert fitted(format_named("int4"), 50).block == 0


def test_bits_of_a_weight() -> None:
    assert format_named("int4").bits(576) == 4.25
    assert format_named("int8").bits(576) == pytest.approx(8.03, abs=0.01)
    assert format_named("int4_affine", group=32).bits(576) == 4.625
    assert [format_named(name).bits(576) for name in ("mxfp8", "mxfp6", "mxfp4", "nvfp4", "hbfp6")] == [
        8.25,
        6.25,
        4.25,
        4.5,
        6.25,
    ]


@pytest.mark.parametrize(
    ("name", "options"),
    [("int5", {}), ("mxfp4", {"group": 64}), ("fp8", {"range": "narrow"}), ("int4_affine", {"range": "narrow"})],
)
def test_what_there_is_not_is_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=name):
        format_named(name, **options)


def test_a_gradient_passes_straight_through() -> None:
    weight = random(2, 64).requires_grad_(True)
    found = straight_through(weight, format_named("int4"))
    assert torch.allclose(found, quantize(weight.detach(), format_named("int4")), atol=1e-6)
    found.square().sum().backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, 2 * found.detach())
