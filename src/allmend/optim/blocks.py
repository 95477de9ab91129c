"""Large tensors a few rows at a time, so that what is worked on stays in a CPU's cache, and tensors in shards."""

from collections.abc import Iterator

import torch

BLOCK = 1 << 20
"""Elements that are updated together: few enough to stay in a CPU's caches, and enough for what each call costs."""


def blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same rows (of the first dimension) of several tensors, a few at a time where they are on a CPU."""
    first = tensors[0]
    if first.device.type != "cpu" or first.dim() == 0 or first.numel() <= BLOCK:
        yield tensors
        return
    rows = max(1, BLOCK * first.shape[0] // first.numel())
    yield from zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Of a tensor that is spread over processes (a DTensor), the part that lies here, sharing its memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Of a tensor that is spread over processes, what they all see."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def splits_rows(tensor: torch.Tensor, neuron_dim: int) -> bool:
    """Whether a process has parts of a neuron's weights only."""
    placements = getattr(tensor, "placements", ())
    return any(one.is_shard() and one.dim % tensor.dim() != (neuron_dim or 0) % tensor.dim() for one in placements)


def dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """⟨a, b⟩ over all processes."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return float(whole((a.to(wide) * b.to(wide)).sum()))
