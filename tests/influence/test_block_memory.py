"""What does not fit into memory is refused with its size, before anything is computed."""

import pytest
import torch

from allmend.errors import UserError
from allmend.influence import block_memory
from allmend.influence.block_memory import block_sizes, check_room, free_memory

SHAPES = {"q.lora_A.weight": (8, 576), "lm_head.lora_B.weight": (49_152, 8)}
CPU = torch.device("cpu")


def test_sizes_are_those_of_each_side() -> None:
    assert block_sizes(SHAPES, "wide") == {"q.lora_A.weight": 576, "lm_head.lora_B.weight": 49_152}
    assert set(block_sizes(SHAPES, "rank").values()) == {8}


def test_the_largest_block_is_named_with_its_size_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    need = 4 * (576**2 + 49_152**2)
    monkeypatch.setattr(block_memory, "free_memory", lambda device: need)
    check_room(SHAPES, "wide", device=CPU)
    monkeypatch.setattr(block_memory, "free_memory", lambda device: need - 1)
    with pytest.raises(UserError, match=r"lm_head.lora_B.weight, 49,152² × 4 B = 9.7 GB\n.*--side rank") as raised:
        check_room(SHAPES, "wide", device=CPU)
    assert "2 blocks take 9.7 GB" in raised.value.what
    check_room(SHAPES, "rank", device=CPU)


def test_some_memory_is_free_here() -> None:
    assert free_memory(CPU) > 2**20
