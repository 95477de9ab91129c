"""LoRA's factors by layer, and their components."""

import pytest
import torch

from allmend.models.factors import first_components, layers_of_factors, with_components

A, B = "layer.lora_A.weight", "layer.lora_B.weight"


def made(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {A: torch.randn(3, 7, generator=generator), B: torch.randn(5, 3, generator=generator)}


def test_factors_stand_together_by_layer() -> None:
    assert layers_of_factors(made(0)) == {"layer": (A, B)}
    with pytest.raises(ValueError, match="something else learns"):
        layers_of_factors({"x": torch.zeros(1)})
    for name in (A, B):
        with pytest.raises(ValueError, match="come in pairs, and layer has one"):
            layers_of_factors({name: made(0)[name]})


@pytest.mark.parametrize("rank", [0, 1, 3, 4])
def test_the_product_is_that_of_the_first_components_and_the_rest(rank: int) -> None:
    one, other = made(0), made(1)
    first = first_components(one, rank)
    assert torch.equal(first[B] @ first[A], one[B][:, :rank] @ one[A][:rank])
    mixed = with_components(one, other, rank)
    whole = one[B][:, :rank] @ one[A][:rank] + other[B][:, rank:] @ other[A][rank:]
    assert torch.allclose(mixed[B] @ mixed[A], whole)


def test_one_factor_alone_has_no_components_that_training_leaves_alone() -> None:
    with pytest.raises(ValueError, match="come in pairs"):
        first_components({B: made(0)[B]}, 1)
