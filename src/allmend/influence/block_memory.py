"""Whether blocks have room in memory, before anything is computed."""

from collections.abc import Mapping

import psutil
import torch

from allmend.errors import UserError
from allmend.influence.blocks import Side

BYTES = 4
"""Of a number in a block."""


def block_sizes(shapes: Mapping[str, tuple[int, ...]], side: Side) -> dict[str, int]:
    """d of each weight's block, or r, from the shapes of the factors A [r, d] and B [d, r]."""
    pick = max if side == "wide" else min
    return {name: pick(shape) for name, shape in shapes.items()}


def check_room(shapes: Mapping[str, tuple[int, ...]], side: Side, *, device: torch.device) -> None:
    """Raise where all blocks together take more memory than is free.

    Args:
        shapes: of the weights that count.
        side: of their gradients.
        device: where blocks will lie.

    Raises:
        UserError: names the largest block with its size, and what to do.
    """
    sizes = block_sizes(shapes, side)
    need, free = sum(BYTES * size**2 for size in sizes.values()), free_memory(device)
    if need <= free:
        return
    name, size = max(sizes.items(), key=lambda one: one[1])
    raise UserError(
        f"{len(sizes)} blocks take {need / 1e9:.1f} GB together and {free / 1e9:.1f} GB are free on {device}; the "
        f"largest is {name}, {size:,}² × {BYTES} B = {BYTES * size**2 / 1e9:.1f} GB",
        where="modules",
        hint="Use --side rank, or leave it out with --modules." if side == "wide" else "Choose fewer with --modules.",
    )


def free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    available: int = psutil.virtual_memory().available
    return available
