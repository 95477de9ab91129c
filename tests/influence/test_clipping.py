"""No gradient is longer than the bound, short ones keep their bits, and long ones are counted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allmend.influence.blocks import fisher_blocks
from allmend.influence.clipping import Clipped
from allmend.influence.gradients import Given


def made(seed: int, n: int = 9) -> Given:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-3, 3, n, dtype=torch.float64).view(-1, 1, 1)
    shapes = {"a": (2, 5), "b": (3, 4)}
    gradients = {
        name: torch.randn(n, *shape, generator=generator, dtype=torch.float64) * scale for name, shape in shapes.items()
    }
    gradients["a"][0] = 0
    return Given(gradients, batch=4)


@given(seed=st.integers(0, 99), norm=st.floats(1e-4, 1e5))
def test_long_gradients_keep_their_direction_and_short_ones_their_bits(seed: int, norm: float) -> None:
    source = made(seed)
    clipped = Clipped(source, norm)
    assert len(clipped) == len(source)
    longer = 0
    for before, after in zip(source, clipped, strict=True):
        assert before.places == after.places
        for name, g in before.gradients.items():
            for one, short in zip(g, after.gradients[name], strict=True):
                if one.norm() > norm:
                    longer += 1
                    assert torch.allclose(short, one * (norm / one.norm()), rtol=1e-12)
                    assert float(short.norm()) <= norm * (1 + 1e-12)
                else:
                    assert torch.equal(short, one)
    assert clipped.count == longer
    list(clipped)
    assert clipped.count == longer, "each pass counts anew"


@given(seed=st.integers(0, 99), norm=st.floats(1e-4, 1e5))
def test_the_trace_of_a_block_is_bounded(seed: int, norm: float) -> None:
    for block in fisher_blocks(Clipped(made(seed), norm)).sums.values():
        assert float(block.trace()) <= 9 * norm**2 * (1 + 1e-12)


def test_a_bound_is_above_zero() -> None:
    with pytest.raises(ValueError, match="above 0"):
        Clipped(made(0), 0.0)
