"""Kernels against the dense product of what they hold."""

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from allmend.compress.runtime import GROUPS, PackedLinear, has_kernel, packed_linear, swap
from allmend.errors import UserError
from allmend.models.formats import Format, format_named, scales_of
from allmend.models.load import linear_layers_of

KNOWN = [format_named("int8"), *(format_named("int4", group=group) for group in (32, 64, 128))]


def packed(weight: torch.Tensor, fmt: Format, bias: torch.Tensor | None = None) -> tuple[PackedLinear, torch.Tensor]:
    scale = scales_of(weight, fmt)
    codes = fmt.codes(fmt.blocks(weight), scale)
    values = fmt.values(codes, scale).view(weight.shape)
    return packed_linear(codes.view(weight.shape), scale, fmt, bias), values


@pytest.mark.parametrize("fmt", KNOWN, ids=lambda fmt: f"{fmt.name}-{fmt.block}")
@pytest.mark.parametrize("rows", [32, 80])
@pytest.mark.parametrize("batch", [(1,), (3,), (2, 5), (1, 1)])
def test_products_are_those_of_the_values(fmt: Format, rows: int, batch: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(rows, 256, generator=generator), torch.randn(rows, generator=generator)
    x = torch.randn(*batch, 256, generator=generator).bfloat16()
    for own in (None, bias):
        layer, values = packed(weight, fmt, own)
        expected = x.double() @ values.double().T + (0 if own is None else own.bfloat16().double())
        found = layer(x)
        assert found.shape == (*batch, rows)
        assert found.dtype == torch.bfloat16
        assert float((found.double() - expected).norm() / expected.norm()) < 5e-3


def test_other_activations_are_refused() -> None:
    layer, _ = packed(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), KNOWN[0])
    with pytest.raises(TypeError, match=r"multiplied with bfloat16, got torch\.float32"):
        layer(torch.ones(1, 64))


@pytest.mark.parametrize(
    ("name", "options", "rows"),
    [
        ("int4", {"group": 0}, 32),
        ("int4", {"group": 64}, 40),
        ("int8", {"group": 64}, 32),
        ("int6", {}, 32),
        ("mxfp4", {}, 32),
    ],
)
def test_formats_without_a_kernel_are_named(name: str, options: dict[str, Any], rows: int) -> None:
    fmt = format_named(name, **options)
    assert not has_kernel(fmt, rows)
    with pytest.raises(UserError, match=f"no kernel for {name}"):
        packed(torch.ones(rows, 64), fmt)


def test_groups_are_those_of_the_kernel() -> None:
    assert all(has_kernel(format_named("int4", group=group), 64) for group in GROUPS)
    assert not has_kernel(None, 64)


def test_a_model_decodes_with_packed_layers() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval().bfloat16()
    simulated, fast = copy.deepcopy(model), copy.deepcopy(model)
    layers = {}
    for name in linear_layers_of(model):
        weight = model.get_submodule(name).weight.detach().float()
        layers[name], values = packed(weight, format_named("int4"))
        simulated.get_submodule(name).weight.data = values.bfloat16()
    swap(fast, layers)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        found, expected = fast(ids).logits.float(), simulated(ids).logits.float()
    assert float((found - expected).norm() / expected.norm()) < 0.02
    made = fast.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert made.shape == (2, 10)
