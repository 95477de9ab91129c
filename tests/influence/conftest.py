"""Records of random tokens, and a tiny model with an adapter."""

from collections.abc import Callable

import pytest
import torch

from allmend.data.chat import Encoded
from allmend.models.adapters import Trainable, add_lora

MakeRecords = Callable[[int, int], list[Encoded]]


@pytest.fixture(scope="session")
def make_records() -> MakeRecords:
    """So many, by a seed."""

    def make(count: int, seed: int) -> list[Encoded]:
        generator = torch.Generator().manual_seed(seed)
        made = []
        for index in range(count):
            length = int(torch.randint(4, 9, (), generator=generator))
            ids, place = torch.randint(0, 256, (length,), generator=generator), torch.arange(length)
            made.append(Encoded(f"{seed}-{index}", ids, place > 0, torch.zeros_like(place), place))
        return made

    return make


@pytest.fixture
def trainable(make_tiny_model: Callable[..., torch.nn.Module]) -> Trainable:
    """With factors B that are not zero any more."""
    made = add_lora(make_tiny_model(), rank=2, alpha=4.0, targets=["q_proj", "v_proj"], seed=0)
    generator = torch.Generator().manual_seed(0)
    made.load({name: 0.3 * torch.randn(one.shape, generator=generator) for name, one in made.state().items()})
    made.model.eval()
    return made
