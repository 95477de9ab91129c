"""What a layer's inputs look like: XᵀX over the tokens of some text, for every linear layer.

Products are sums over tokens, so that those of several texts, or of several members' texts, add up. Layers that get the
same input, as queries, keys and values do, share one product.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

ROOM = 2**30
"""Bytes of products that are kept at a time."""


@dataclass(frozen=True)
class Products:
    """Of one input.

    Attributes:
        matrix: XᵀX, float32 [d, d].
        tokens: rows of X.
    """

    matrix: torch.Tensor
    tokens: int

    @property
    def norms(self) -> torch.Tensor:
        """‖x_j‖ of each input over the tokens, [d]."""
        return self.matrix.diagonal().clamp_min(0).sqrt()

    def __add__(self, other: "Products") -> "Products":
        return Products(self.matrix + other.matrix, self.tokens + other.tokens)


def input_products(
    model: nn.Module,
    ids: torch.Tensor,
    layers: Sequence[str],
    *,
    on_window: Callable[[], None] = lambda: None,
) -> dict[str, Products]:
    """XᵀX of the inputs of some linear layers.

    Args:
        model: takes ids [1, tokens]; it is left as it is.
        ids: int64 [windows, tokens].
        layers: names of modules; those that share an input share one product.
        on_window: called when a window is done.

    Raises:
        ValueError: a layer got no input, or one that is not finite.
    """
    sums = _Sums(model, layers)
    with torch.no_grad(), sums.listening():
        for window in ids:
            model(window[None].to(next(model.parameters()).device))
            sums.forget()
            on_window()
    return sums.found()


class _Sums:
    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self.modules = {name: model.get_submodule(name) for name in layers}
        self.leader: dict[str, str] = {}
        self.matrices: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.last: tuple[torch.Tensor, str] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in self.modules.items():
                handle = module.register_forward_pre_hook(self._hook(name))
                stack.callback(handle.remove)
            yield

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x: torch.Tensor = inputs[0]
            if name not in self.leader:
                self.leader[name] = self.last[1] if self.last is not None and self.last[0] is x else name
            self.last = (x, self.leader[name])
            if self.leader[name] != name:
                return
            rows = x.reshape(-1, x.shape[-1]).float()
            if name not in self.matrices:
                self.matrices[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
                self.tokens[name] = 0
            self.matrices[name].addmm_(rows.T, rows)
            self.tokens[name] += len(rows)

        return add

    def forget(self) -> None:
        """No tensor of this window is one of the next."""
        self.last = None

    def found(self) -> dict[str, Products]:
        if missing := [name for name in self.modules if name not in self.leader]:
            raise ValueError(f"{missing[0]} got no input")
        leaders = {name: Products(matrix.cpu(), self.tokens[name]) for name, matrix in self.matrices.items()}
        for name, products in leaders.items():
            if not bool(products.matrix.isfinite().all()):
                raise ValueError(f"the inputs of {name} are not finite")
        return {name: leaders[self.leader[name]] for name in self.modules}


def portions(shapes: Mapping[str, tuple[int, int]], *, room: int = ROOM) -> list[list[str]]:
    """Layers, in their order, in portions whose products fit into some bytes; one layer at least in each.

    Args:
        shapes: (out, in) of each layer.
        room: bytes, as if no two layers shared an input.
    """
    found: list[list[str]] = []
    left = 0
    for name, (_, columns) in shapes.items():
        need = 4 * columns**2
        if not found or need > left:
            found.append([])
            left = room
        found[-1].append(name)
        left -= need
    return found
