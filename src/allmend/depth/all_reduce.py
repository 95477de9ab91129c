"""Sums over processes, counted and timed, and a decoder in slices that needs nothing else of its neighbours.

`tensor_parallel_plan` is for `parallelize_module`, whose tensors know how they are spread. Each operation on them costs
the processor time that has nothing to do with the sum, and on small layers hides it. Here the same slices are ordinary
tensors, as in an engine that serves; for running only, no gradient goes through the sums.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.parallel.style import ParallelStyle

from allmend.depth.tensor_parallel import FusedColwise, LocalGains, LocalHeads

SUMS, GROUPS = 20, 10
"""All-reduces between two looks at the clock, and how often."""


class AllReduce:
    """Sums tensors over all processes, in place.

    Attributes:
        count: sums so far.
        timed: whether to time each one, which on CUDA costs the processor a few microseconds.
    """

    def __init__(self) -> None:
        self.count, self.timed = 0, False
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, tensor: torch.Tensor) -> None:
        self.count += 1
        if not self.timed:
            dist.all_reduce(tensor)
        elif tensor.is_cuda:
            event: Any = torch.cuda.Event
            began, ended = (event(enable_timing=True) for _ in range(2))
            began.record()
            dist.all_reduce(tensor)
            ended.record()
            self._events.append((began, ended))
        else:
            start = time.perf_counter()
            dist.all_reduce(tensor)
            self._seconds += time.perf_counter() - start

    def take(self) -> tuple[int, float]:
        """Sums since the last call, and the seconds of those that were timed: waiting for the slowest is in them."""
        if self._events:
            torch.cuda.synchronize()
            self._seconds += sum(began.elapsed_time(ended) for began, ended in self._events) / 1e3
        found = self.count, self._seconds
        self.count, self._seconds = 0, 0.0
        self._events.clear()
        return found


class SummedLinear(nn.Module):
    """A projection whose input columns are spread over processes: the sum of their shares, and the bias once.

    Args:
        weight: the process's columns, [out, in / world].
        bias: the whole one, or none.
        reduce: sums over processes.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, reduce: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.reduce = reduce

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[…, in / world] to [..., out]."""
        out = nn.functional.linear(hidden_states, self.weight)
        self.reduce(out)
        return out if self.bias is None else out + self.bias


@torch.no_grad()
def shard(
    model: Any, plan: Mapping[str, ParallelStyle], *, rank: int, world: int, reduce: Callable[[torch.Tensor], None]
) -> None:
    """Leave a model, in place, with one process's slices as ordinary tensors.

    Parameters that it shares with another model stay what they are there.

    Args:
        model: whole, the same on every process.
        plan: `tensor_parallel_plan(model, world)`.
        rank: of the process.
        world: processes.
        reduce: sums a tensor over them, in place.
    """
    for name, style in plan.items():
        module: Any = model.get_submodule(name)
        match style:
            case LocalHeads():
                style.apply(module, world=world)
            case LocalGains():
                style.apply(module, rank=rank, world=world)
            case RowwiseParallel():
                weight = module.weight.detach().chunk(world, dim=1)[rank].clone()
                bias = None if module.bias is None else module.bias.detach()
                model.set_submodule(name, SummedLinear(weight, bias, reduce))
            case ColwiseParallel():
                if isinstance(style, FusedColwise):
                    style.rearrange(module)
                for part, parameter in list(module.named_parameters()):
                    rows = parameter.detach().chunk(world)[rank].clone()
                    module.register_parameter(part, nn.Parameter(rows, requires_grad=False))
            case _:
                raise TypeError(f"{type(style).__name__} of {name} is not known here")


def seconds_each(work: Callable[[], None], *, finish: Callable[[], None], times: int, groups: int) -> list[float]:
    """Seconds of a piece of work that all processes do at once: means of `times` of them, `groups` times.

    Args:
        work: does it once.
        finish: waits until the device has done what it was told.
        times: pieces between two looks at the clock.
        groups: looks; one more goes before, to warm up.
    """
    found = []
    for _ in range(groups + 1):
        dist.barrier()
        finish()
        start = time.perf_counter()
        for _ in range(times):
            work()
        finish()
        found.append((time.perf_counter() - start) / times)
    return found[1:]


def latency(tensor: torch.Tensor, *, finish: Callable[[], None]) -> list[float]:
    """Seconds of an all-reduce of a tensor of this size, several times."""
    zeros = torch.zeros_like(tensor)

    def work() -> None:
        dist.all_reduce(zeros)

    return seconds_each(work, finish=finish, times=SUMS, groups=GROUPS)


def matrices(model: nn.Module) -> list[torch.Tensor]:
    """The matrices that a decoding step reads from end to end, each once: all but the embeddings that are looked up."""
    found = {}
    for module in model.modules():
        if isinstance(module, (nn.Linear, SummedLinear)):
            found[module.weight.data_ptr()] = module.weight.detach()
    return list(found.values())


def bandwidth(weights: list[torch.Tensor], *, batch: int, finish: Callable[[], None]) -> list[float]:
    """Bytes a second that a device reads as it multiplies these matrices with `batch` vectors, several times.

    All processes read at once: where they share a memory, each gets its share.

    Args:
        weights: the process's own, [out, in] each.
        batch: sequences.
        finish: waits for the device.
    """
    vectors = {one.shape[1]: torch.ones(batch, one.shape[1], dtype=one.dtype, device=one.device) for one in weights}

    def work() -> None:
        for one in weights:
            nn.functional.linear(vectors[one.shape[1]], one)

    amount = sum(one.nbytes for one in weights)
    return [amount / seconds for seconds in seconds_each(work, finish=finish, times=1, groups=GROUPS)]
