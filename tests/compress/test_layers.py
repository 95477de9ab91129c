"""A weight's way: sizes that are the file's, and candidates that are judged on windows they have not seen."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from allmend.compress.calibration import Products
from allmend.compress.layers import DAMPINGS, Inputs, Method, Option, compress_weight, judged
from allmend.compress.masks import NofM, Pattern, Unstructured, keep_mask, wanda
from allmend.compress.order import quantize_then_prune
from allmend.compress.sweep import prune_and_quantize
from allmend.compress.whole import packed_of, weight_of
from allmend.models.formats import FORMATS, Format, format_named, quantize
from allmend.models.packing import decode_sparse, encode_two_of_four

EVERY = [
    *(format_named(name) for name in FORMATS),
    *(format_named(name, group=32) for name in ("int8", "int6", "int4", "int3", "int4_affine")),
]
INT4 = format_named("int4", group=32)


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def inputs(columns: int, tokens: int, seed: int = 0) -> Inputs:
    mixed = random(columns, columns, seed=100) / columns**0.5 + torch.eye(columns)
    x = random(tokens, columns, seed) @ mixed
    y = random(tokens // 3, columns, seed + 1) @ mixed
    return Inputs(Products(x.T @ x, len(x)), Products(y.T @ y, len(y)))


@pytest.mark.parametrize("fmt", [*EVERY, None], ids=lambda fmt: f"{fmt.name}-{fmt.block}" if fmt else "none")
@pytest.mark.parametrize("shape", [(7, 192), (33, 64), (64, 192)])
@pytest.mark.parametrize("pattern", [None, Unstructured(0.5), Unstructured(0.29), NofM(2, 4), NofM(1, 4)], ids=str)
def test_bytes_are_those_of_the_file(fmt: Format | None, shape: tuple[int, int], pattern: Pattern | None) -> None:
    weight, option = random(*shape), Option(fmt, pattern)
    found = compress_weight(weight, option)
    packed = packed_of(found, option)
    assert option.bytes(shape) == packed.bytes
    assert torch.equal(weight_of(packed, option), found.weight)


def test_bits_of_a_weight_in_all() -> None:
    def bits(option: Option) -> float:
        return 8 * option.bytes((1536, 576)) / (1536 * 576)

    assert bits(Option(None)) == 16
    assert bits(Option(format_named("int4"))) == 4.25
    assert bits(Option(format_named("int4"), Unstructured(0.5))) == pytest.approx(3.25, abs=1e-4)
    assert bits(Option(format_named("int3"))) == 3.25
    assert bits(Option(format_named("int4"), NofM(2, 4))) == pytest.approx(3.0, abs=1e-4)
    assert bits(Option(format_named("int8"), Unstructured(0.5))) == pytest.approx(5.03, abs=0.01)


@pytest.mark.parametrize("pattern", [None, Unstructured(0.5), NofM(2, 4)], ids=str)
def test_without_inputs_a_weight_is_rounded(pattern: Pattern | None) -> None:
    weight = random(8, 64)
    found = compress_weight(weight, Option(INT4, pattern))
    masked = weight if pattern is None else weight * keep_mask(weight.abs(), pattern)
    assert torch.equal(found.weight, quantize(masked, INT4))
    assert (found.method, found.damping, found.held_out) == ("round", None, None)
    with pytest.raises(ValueError, match="sweep: each needs text"):
        compress_weight(weight, Option(INT4), methods=("sweep",))


def test_without_a_format_it_is_half_precision() -> None:
    weight = random(8, 64)
    assert torch.equal(compress_weight(weight, Option(None)).weight, weight.bfloat16().float())
    sparse = compress_weight(weight, Option(None, Unstructured(0.5)), inputs(64, 300))
    assert sparse.keep is not None
    assert torch.equal(sparse.weight == 0, ~sparse.keep)
    assert torch.equal(sparse.weight, sparse.weight.bfloat16().float())
    assert sparse.scale is None


@pytest.mark.parametrize("pattern", [None, Unstructured(0.5), NofM(2, 4)], ids=str)
@pytest.mark.parametrize("fmt", [INT4, format_named("mxfp4"), format_named("int8")], ids=lambda fmt: fmt.name)
def test_the_best_by_what_none_has_seen_is_taken(fmt: Format, pattern: Pattern | None) -> None:
    weight, some = random(8, 64), inputs(64, 300)
    found = compress_weight(weight, Option(fmt, pattern), some)
    x = torch.linalg.cholesky(some.held_out.matrix.double() + 1e-9 * torch.eye(64)).T  # xᵀx is the product

    def error(values: torch.Tensor) -> float:
        size = (x @ weight.double().T).square().sum()
        return float((x @ (weight - values).double().T).square().sum() / size)

    assert found.held_out == pytest.approx(error(found.weight), rel=1e-4)
    masked = [weight] if pattern is None else [
        weight * keep_mask(score, pattern) for score in (weight.abs(), wanda(weight, (some.seen + some.held_out).norms))
    ]  # fmt: skip
    others = [quantize(one, fmt) for one in masked]
    for damping in DAMPINGS:
        others.append(prune_and_quantize(weight, some.seen.matrix, pattern, fmt, damping=damping).weight)
        if pattern is not None:
            pruned = prune_and_quantize(weight, some.seen.matrix, pattern, None, damping=damping).weight
            others.append(quantize(pruned, fmt))
    assert found.held_out == pytest.approx(min(map(error, others)), rel=1e-4)
    assert any(torch.equal(found.weight, one) for one in others)


def test_of_few_tokens_the_sweep_s_own_error_is_no_measure() -> None:
    """With fewer tokens than inputs, what is best on the seen windows is not on others."""
    weight, few = random(16, 64), inputs(64, 24)
    least = compress_weight(weight, Option(INT4), few, methods=("sweep",), dampings=(1e-4,))
    chosen = compress_weight(weight, Option(INT4), few)
    assert least.seen is not None
    assert least.held_out is not None
    assert chosen.seen is not None
    assert chosen.held_out is not None
    assert least.seen < least.held_out
    assert chosen.held_out < least.held_out


@pytest.mark.parametrize(
    ("methods", "expected"), [(("round",), "round"), (("wanda",), "wanda"), (("sparsegpt",), "sparsegpt")]
)
def test_a_method_can_be_asked_for(methods: tuple[Method, ...], expected: str) -> None:
    found: Any = compress_weight(random(8, 64), Option(INT4, NofM(2, 4)), inputs(64, 300), methods=methods)
    assert found.method == expected
    assert (found.damping in DAMPINGS) == (expected == "sparsegpt")
    again = judged(replace(found, seen=None, held_out=None), random(8, 64), inputs(64, 300))
    assert again.held_out == found.held_out


def test_quantised_first_the_mask_is_by_the_values() -> None:
    weight, some = random(8, 64), inputs(64, 300)
    option = Option(INT4, NofM(2, 4))
    found = compress_weight(weight, option, some, methods=("round",), order="qs")
    assert torch.equal(found.weight, quantize_then_prune(weight, torch.abs, NofM(2, 4), INT4))
    norms = (some.seen + some.held_out).norms
    by_wanda = compress_weight(weight, option, some, methods=("wanda",), order="qs")
    expected = quantize_then_prune(weight, lambda w: wanda(w, norms), NofM(2, 4), INT4)
    assert torch.equal(by_wanda.weight, expected)
    assert by_wanda.keep is not None
    packed = encode_two_of_four(by_wanda.weight, by_wanda.keep, INT4, scale=by_wanda.scale)
    assert torch.equal(decode_sparse(packed, INT4), by_wanda.weight)
    with pytest.raises(ValueError, match="has no order"):
        compress_weight(weight, option, some, order="qs")
