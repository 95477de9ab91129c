"""Gradients record by record: the norm of each, and the sum of all with none longer than a bound.

The loss of a record is the mean over its own targets, so that its gradient depends on nothing but the record. With
LoRA the gradients of all records in a packed row come out of one backward pass: the gradient of a linear layer
y = W x is Σ_t δ_t x_tᵀ over a record's tokens t with δ = ∂loss/∂y, and x and δ pass by anyway (Goodfellow, "Efficient
per-example gradient computations", arXiv:1510.01799, 2015; without a second pass for the clipped sum: Bu, Wang, Zha,
Karypis, "Differentially private optimization on large foundation models at small cost", ICML 2023). Whatever else
learns takes a pass for each record.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from allmend.data.chat import Encoded
from allmend.data.packing import Row, pack
from allmend.learn.objective import log_likelihood
from allmend.models.adapters import Trainable
from allmend.models.tensors import Tensors

ROUNDING = 1e-6
"""How far a sum of clipped gradients in float32 may be off, relatively; they stay below the bound by as much."""


def separable_rows(trainable: Trainable, records: Sequence[Encoded], tokens_per_pass: int) -> list[Row]:
    """`pack` as far as gradients can be told apart afterwards: with LoRA all the way, else a row for each record."""
    return pack(records, tokens_per_pass if trainable.kind == "lora" else 1)


def record_loss(model: Any, row: Row) -> tuple[torch.Tensor, float]:
    """The sum over the row's records of their losses, each the mean over its targets; and the sum over all targets."""
    losses = -log_likelihood(model, row)
    targets = row.owner.bincount()  # by record
    return (losses / targets[row.owner]).sum(), losses.detach().sum().item()


def clipped_sum(trainable: Trainable, rows: Sequence[Row], clip: float) -> float:
    """Leave Σ_i g_i min(1, C / ‖g_i‖) in the parameters' `grad`: over records i, g_i the gradient of i's loss.

    Where no record is clipped, it is bit for bit what backward passes of `record_loss` would leave there.

    Args:
        trainable: what learns; ‖g_i‖ is the norm over all of it.
        rows: from `separable_rows`, on the CPU; none make a sum of zeros.
        clip: C; infinity clips nothing.

    Returns:
        The sum of the losses of all targets (nats).

    Raises:
        ValueError: records cannot be told apart: one is spread over rows, several share one although the trainable is
            no LoRA, or a layer with LoRA does not see each token once.
    """
    records = [index for row in rows for index in _records(row)]
    if len(records) != len(set(records)):
        raise ValueError("a record is spread over several rows, so none of them gives its gradient")
    of_row = _clipped_factors if trainable.kind == "lora" else _clipped_whole
    total: Tensors = {}
    losses = 0.0
    for row in rows:
        gradients, loss = of_row(trainable, row, clip)
        losses += loss
        for name, gradient in gradients.items():
            total[name] = total[name].add_(gradient) if name in total else gradient
    for name, parameter in trainable.parameters().items():
        parameter.grad = total[name] if name in total else torch.zeros_like(parameter)
    return losses


def _clipped_whole(trainable: Trainable, row: Row, clip: float) -> tuple[Tensors, float]:
    if len(_records(row)) > 1:
        raise ValueError("several records share a row, and only LoRA can tell their gradients apart")
    gradients, loss = _gradients(trainable, row)
    factor = _factors([_norm(gradient) for gradient in gradients.values()], clip).item()
    return {name: gradient.mul_(factor) for name, gradient in gradients.items()}, loss


def _clipped_factors(trainable: Trainable, row: Row, clip: float) -> tuple[Tensors, float]:
    with by_layer(trainable, list(_records(row).values()), _layer) as layers:
        gradients, loss = _gradients(trainable, row)
    if unwatched := gradients.keys() - layers.keys():
        raise ValueError(f"{min(unwatched)} is no linear layer's weight, so records cannot be told apart in it")
    factors = _factors([layer.norms() for layer in layers.values()], clip)
    if (factors < 1).any():  # else backward has formed the sum already
        gradients = {name: layer.weighted_sum(factors) for name, layer in layers.items()}
    return gradients, loss


def _records(row: Row) -> Counter[int]:
    """Tokens of each record of the row, in their order there."""
    return Counter(row.record.tolist())


def _gradients(trainable: Trainable, row: Row) -> tuple[Tensors, float]:
    parameters = trainable.parameters()
    for parameter in parameters.values():
        parameter.grad = None
    device = next(iter(parameters.values())).device
    summed, losses = record_loss(trainable.model, row.to(device))
    summed.backward()  # type: ignore[no-untyped-call]
    return {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}, losses


def _norm(gradient: torch.Tensor, dim: tuple[int, ...] | None = None) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(_with_float64(gradient), dim=dim, dtype=torch.float64)
    return norm


def _with_float64(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, where there are numbers of double precision: not on Apple's GPUs."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def _factors(norms: Sequence[torch.Tensor], clip: float) -> torch.Tensor:
    """min(1, C / ‖g‖), float64 on the CPU, from the norms of g's parts."""
    whole = torch.linalg.vector_norm(torch.stack([norm.cpu() for norm in norms]), dim=0)
    return torch.clamp(clip * (1 - ROUNDING) / whole, max=1)


Made = TypeVar("Made")


class _Layer(Protocol):
    """The gradients of one layer's weight [out, in] for n records."""

    def norms(self) -> torch.Tensor:
        """Float64 [n]: in float32 the norm of many numbers comes out too small, by 1e-3 for an embedding's."""
        ...

    def weighted_sum(self, weights: torch.Tensor) -> torch.Tensor:
        """Σ_i weights_i g_i for weights [n]."""
        ...


@dataclass(frozen=True)
class _Direct:
    """The gradients themselves, [n, out, in]."""

    gradients: torch.Tensor

    def norms(self) -> torch.Tensor:
        return _norm(self.gradients, dim=(1, 2))

    def weighted_sum(self, weights: torch.Tensor) -> torch.Tensor:
        return torch.einsum("n,noi->oi", weights.to(self.gradients), self.gradients)


@dataclass(frozen=True)
class _Ghost:
    """Their factors: ‖Σ_t δ_t x_tᵀ‖² = Σ_{t,u} (x_t · x_u) (δ_t · δ_u), x [T, in] and δ [T, out]."""

    x: torch.Tensor
    delta: torch.Tensor
    lengths: list[int]

    def norms(self) -> torch.Tensor:
        pairs = _by_record(_with_float64(self.x).double(), _with_float64(self.delta).double(), self.lengths)
        squares = [((x @ x.T) * (delta @ delta.T)).sum() for x, delta in pairs]
        return torch.stack(squares).clamp(min=0).sqrt()

    def weighted_sum(self, weights: torch.Tensor) -> torch.Tensor:
        by_token = weights.to(self.delta).repeat_interleave(torch.tensor(self.lengths, device=self.delta.device))
        return (self.delta * by_token[:, None]).T @ self.x


def _layer(x: torch.Tensor, delta: torch.Tensor, lengths: list[int]) -> _Layer:
    """Whichever of the two takes fewer multiplications for the norms."""
    wide, high = x.shape[1], delta.shape[1]
    if sum(length**2 for length in lengths) * (wide + high) < sum(lengths) * wide * high:
        return _Ghost(x, delta, lengths)
    return _Direct(torch.stack([delta.T @ x for x, delta in _by_record(x, delta, lengths)]))


def _by_record(x: torch.Tensor, delta: torch.Tensor, lengths: list[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(x.split_with_sizes(lengths), delta.split_with_sizes(lengths), strict=True)


@contextlib.contextmanager
def by_layer(
    trainable: Trainable, lengths: list[int], make: Callable[[torch.Tensor, torch.Tensor, list[int]], Made]
) -> Iterator[dict[str, Made]]:
    """What the backward pass of a row in this context tells of the layers that learn, by the names of their weights.

    Args:
        trainable: whose linear layers are watched.
        lengths: tokens of each of the row's records, in their order.
        make: of inputs x [T, in], gradients δ [T, out] of the outputs, and `lengths`, whatever is to be kept.

    Raises:
        ValueError: in the backward pass, where a layer does not see each token once.
    """
    names = {id(parameter): name for name, parameter in trainable.parameters().items()}
    found: dict[str, Made] = {}

    def forward(name: str, layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        output.register_hook(partial(backward, name, inputs[0].detach()))  # type: ignore[no-untyped-call]

    def backward(name: str, x: torch.Tensor, delta: torch.Tensor) -> None:
        if name in found or x.shape[:-1] != (1, sum(lengths)):
            raise ValueError(f"records cannot be told apart in {name}: it does not see each token once")
        found[name] = make(x[0], delta[0], lengths)

    handles = [
        module.register_forward_hook(partial(forward, names[id(module.weight)]))
        for module in trainable.model.modules()
        if isinstance(module, nn.Linear) and id(module.weight) in names
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
